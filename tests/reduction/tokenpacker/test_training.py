"""Training and trial of TokenPacker on the shipped tiny model: who learns when, and that what ships answers."""

from __future__ import annotations

import pytest
import torch

from everytoken.catalog import find_card
from everytoken.core.errors import BadInputError
from everytoken.core.vision import load_processor, load_vlm
from everytoken.decoding.trial import Trial, TrialRequest
from everytoken.reduction.tokenpacker.packing import TokenPacker, new_projector, packed, packed_processor
from everytoken.reduction.tokenpacker.training import TRAINING, TokenPackerTraining, train_projector
from everytoken.reduction.vision_training import SceneQuestions, scene_maker
from everytoken.training.base import TrainingContext
from everytoken.training.vision import held_out, right_answers

pytest.importorskip("PIL")
MEASURED = [64, 16]


def test_what_ships_answers_with_a_quarter_of_the_tokens():
    model = load_vlm()
    scenes, asked = held_out(128, 5)
    with packed(model, TokenPacker()):
        right = right_answers(model, scenes, asked)
    assert sum(right) / len(right) > 0.75
    assert sum(right_answers(model, scenes[:50], asked[:50])) > 38  # the model is as before


def test_it_generates_from_images_as_any_llava():
    model, processor = load_vlm(), load_processor()
    scenes, asked = held_out(4, 6)
    with packed(model, TokenPacker()) as projector:
        inputs = packed_processor(processor, projector)(
            images=[scene.image() for scene in scenes], text=[item.text for item in asked], return_tensors="pt"
        )
        assert inputs["input_ids"].shape == (4, 18)
        said = processor.batch_decode(model.generate(**inputs, max_new_tokens=1, do_sample=False)[:, 18:])
        right = right_answers(model, scenes, asked)
    assert [float(a == item.answer) for a, item in zip(said, asked, strict=True)] == right


def test_the_encoder_never_learns_and_the_language_model_only_in_the_second_stage():
    moved = {}
    for steps in (0, 1):
        model = load_vlm()
        projector = new_projector(model)
        before = {name: weight.clone() for name, weight in [*model.named_parameters(), *projector.named_parameters()]}
        config = TokenPackerTraining(batch=2, align_steps=1, steps=steps)
        with packed(model, projector):
            trained, curves = train_projector(model, projector, SceneQuestions(64, scene_maker(model)), config)
        after = [*model.named_parameters(), *projector.named_parameters()]
        moved[steps] = {name.split(".")[1] for name, weight in after if not torch.equal(weight, before[name])}
        assert all("language_model" in name for name in trained) and len(curves["both"]) == steps
    assert not {"vision_tower", "language_model"} & moved[0]
    assert "language_model" in moved[1] and "vision_tower" not in moved[1]


@pytest.mark.slow
def test_the_command_trains_and_writes_what_loads(tmp_path):
    config = TokenPackerTraining(batch=4, align_steps=2, steps=2, scale=4)
    result = TRAINING.run(config, TrainingContext(None, None, tmp_path))
    assert result.figures["tokens an image"] == 4
    model = load_vlm()
    with packed(model, TokenPacker(4, weights=str(result.files[0]))) as projector:
        assert projector.config.scale == 4
        scenes, asked = held_out(256, 1)
        right = right_answers(model, scenes, asked)
    assert sum(right) / 256 == pytest.approx(result.figures["right answers"])


@pytest.mark.slow
def test_the_trial_shows_it_beside_all_tokens():
    card = find_card("tokenpacker")
    result = card.load_trial()(TrialRequest([Trial("tokenpacker", TokenPacker, {})]))
    assert [row["image tokens"] for row in result.rows.values()] == MEASURED
    assert result.rows["tokenpacker"]["right answers"] > 0.75
    assert [len(trace) for trace in result.traces] == [66, 18]


def test_what_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="trained for scale 2"):
        find_card("tokenpacker").load_trial()(TrialRequest([Trial("t", TokenPacker, {"scale": 4})]))
    with pytest.raises(BadInputError, match="do not tile"):
        TRAINING.run(TokenPackerTraining(scale=3), TrainingContext(None, None, tmp_path))
    for settings, words in (({"scale": 0}, "scale is 1"), ({"query_pool": "max"}, "bilinear, mean")):
        with pytest.raises(BadInputError, match=words):
            TokenPackerTraining(**settings)
