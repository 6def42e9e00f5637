"""Training of the tiny vision-language model: what its stages do, cheaply; the shipped one is tested in core."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.training.vision import (
    VLMTraining,
    alignment_loss,
    held_out,
    image_features,
    new_vlm,
    question_loss,
    right_answers,
    train_vlm,
    vlm_config,
)

SMALL = VLMTraining(align_steps=2, align_batch=4, steps=3, batch=4, more=1)


def test_keys_start_as_queries_and_embeddings_are_tied():
    model = new_vlm(vlm_config(), seed=3)
    for layer in model.model.language_model.layers:
        assert torch.equal(layer.self_attn.k_proj.weight, layer.self_attn.q_proj.weight)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings().weight.std() > 0.05
    assert torch.equal(new_vlm(vlm_config(), 3).lm_head.weight, model.lm_head.weight)


def test_the_easy_scenes_come_first():
    counts = [{len(scene.things) for scene in SMALL.curriculum(share).draw(12, 0)} for share in (0.0, 0.1, 0.4, 0.9)]
    assert counts[0] == {1} and counts[1] == {2} and counts[2] <= {2, 3, 4} and counts[3] == {3, 4, 5}


def test_alignment_teaches_the_encoder_and_the_words_alone():
    model = new_vlm(vlm_config())
    alignment_loss(model, SMALL)(0).backward()
    assert model.model.vision_tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in model.model.language_model.layers.parameters())


def test_the_loss_of_a_step_follows_from_its_number():
    model = new_vlm(vlm_config())
    with torch.no_grad():
        first, again, other = (question_loss(model, SMALL)(step) for step in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_few_steps_of_both_stages(tmp_path):
    model, curves = train_vlm(SMALL, tmp_path)
    assert [step for step, _ in curves["alignment"]] == [1, 2] and len(curves["questions"]) == 3
    assert [len(curves[name]) for name in list(curves)[2:]] == [1]
    again, _ = train_vlm(SMALL, tmp_path)  # both stages are finished: nothing is trained
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    with pytest.raises(BadInputError, match="was written by"):
        train_vlm(dataclasses.replace(SMALL, steps=4), tmp_path)


def test_answers_are_those_of_the_forward_with_any_number_of_placeholders():
    model = new_vlm(vlm_config())
    scenes, questions = held_out(6)
    plain = right_answers(model, scenes, questions, batch=4)

    def by_features(inputs):
        assert inputs["input_ids"].shape[1] == 66
        outputs = model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
        return model(**inputs, mm_encoder_outputs={"image": outputs}).logits[:, -1]

    assert right_answers(model, scenes, questions, by_features) == plain
    assert image_features(model, torch.zeros(2, 3, 64, 64)).shape == (2, 64, 96)


@pytest.mark.parametrize(
    ("settings", "words"), [({"steps": 0}, "1 or more"), ({"patch": 7}, "do not tile"), ({"most": 9}, "from 1 to 6")]
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(BadInputError, match=words):
        VLMTraining(**settings)
