"""Training and trial of M3 on the shipped tiny model, in a few steps; and training on a file of one's own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from everytoken.catalog import find_card
from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.core.vision import load_processor, load_vlm
from everytoken.core.weights import weights_folder
from everytoken.decoding.trial import Trial, TrialRequest
from everytoken.reduction.m3 import MatryoshkaPool, scale_loss
from everytoken.reduction.m3_training import TRAINING, M3Training, by_scale, train_scales
from everytoken.reduction.vision_training import SceneQuestions, scene_maker
from everytoken.testing.models import tiny_llava
from everytoken.training.base import TrainingContext
from everytoken.training.datasets.image_questions import read_image_questions

pytest.importorskip("PIL")


def images(folder, rows=3):
    from PIL import Image

    lines = []
    for number in range(rows):
        pixels = np.random.default_rng(number).integers(0, 255, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "prompt": "shape? red", "answer": "disc"}))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.slow
def test_the_shipped_model_answers_at_every_scale_and_the_plain_one_does_not():
    trained, plain = load_vlm(weights_folder("scenes-vlm-m3")), load_vlm()
    nested, pooled = by_scale(trained, [64, 16, 4]), by_scale(plain, [16, 4])
    assert nested[64] > 0.8
    assert nested[16] > pooled[16] + 0.1 and nested[4] > pooled[4] + 0.1


def test_one_step_moves_all_weights_or_all_but_the_encoder():
    for encoder in (True, False):
        model = load_vlm()
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        config = M3Training(batch=2, steps=1, train_encoder=encoder)
        train_scales(model, SceneQuestions(64, scene_maker(model)), [64, 4], config)
        moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
        assert any("language_model" in name for name in moved) and any("projector" in name for name in moved)
        assert any("vision_tower" in name for name in moved) is encoder


@pytest.mark.slow
def test_the_command_trains_and_writes_a_model_that_loads(tmp_path):
    result = TRAINING.run(M3Training(batch=4, steps=2), TrainingContext(None, None, tmp_path))
    assert {"loss", "right answers with 64 tokens", "right answers with 1 tokens"} <= set(result.figures)
    model = load_vlm(result.files[0])
    assert model.config.image_seq_length == 64 and load_processor(result.files[0]).patch_size == 8
    assert json.loads((result.files[0] / "training.json").read_text())["settings"]["steps"] == 2


def test_questions_of_ones_own(tmp_path):
    file = images(tmp_path)
    result = TRAINING.run(M3Training(batch=2, steps=1), TrainingContext(None, str(file), tmp_path / "out"))
    assert set(result.figures) == {"loss"}


def test_a_batch_of_ones_own_questions(tmp_path):
    from everytoken.training.datasets.image_questions import ImageQuestions

    rows = read_image_questions(str(images(tmp_path)))
    processor = load_processor()
    rows[1]["answer"] = "disc red"
    batch = ImageQuestions(processor, rows).collate(rows[:2])
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    words = [processor.tokenizer.convert_ids_to_tokens(row[row >= 0].tolist()) for row in batch["labels"]]
    assert words == [["disc", "</s>"], ["disc", "red", "</s>"]]
    assert batch["attention_mask"].sum(1).tolist() == [68, 69] and batch["input_ids"].shape == (2, 69)
    model = load_vlm()
    assert torch.isfinite(scale_loss(model, batch, torch.zeros(2, 64, 96), 4))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{}", "line 1: no object"),
        ('{"image": "0.png", "prompt": "", "answer": "a"}', "not empty"),
        ('{"image": "9.png", "prompt": "p", "answer": "a"}', "no image"),
        ("", "no question"),
    ],
)
def test_files_that_cannot_be_read(line, words, tmp_path):
    images(tmp_path)
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    with pytest.raises(BadInputError, match=words):
        read_image_questions(str(tmp_path / "bad.jsonl"))


@pytest.mark.slow
def test_the_trial_shows_trained_and_untrained_beside_all_tokens():
    card = find_card("m3")
    result = card.load_trial()(TrialRequest([Trial("m3", MatryoshkaPool, {"num_tokens": 16})]))
    assert list(result.rows) == ["all tokens", "m3", "m3, untrained"]
    assert [row["image tokens"] for row in result.rows.values()] == [64, 16, 16]
    assert result.rows["m3"]["right answers"] > result.rows["m3, untrained"]["right answers"]
    assert [len(trace) for trace in result.traces] == [66, 18, 18]
    assert card.load_training() is TRAINING


def test_what_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="64, 16, 4, 1"):
        TRAINING.run(M3Training(scales="64,9"), TrainingContext(None, None, tmp_path))
    with pytest.raises(BadInputError, match="64, 16, 4, 1"):
        find_card("m3").load_trial()(TrialRequest([Trial("m3", MatryoshkaPool, {"num_tokens": 9})]))
    with pytest.raises(BadInputError, match="scenes of its own"):
        find_card("m3").load_trial()(TrialRequest([], prompt="Hello"))
    with pytest.raises(UnsupportedModelError, match="does not know scenes"):
        scene_maker(tiny_llava())
