"""Prompt tokens inside a LLaVA: behind the image's, equal to gathered embeddings, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.reduction.sphinx_v.configuration_visual_prompts import VisualPromptConfig
from everytoken.reduction.sphinx_v.modeling_visual_prompts import VisualPromptEncoder
from everytoken.reduction.sphinx_v.prompting import (
    prompted_inputs,
    prompting,
    save_prompting,
    stage_weights,
    with_prompts,
)
from everytoken.reduction.sphinx_v.prompts import BOX, Box, Point, encode_prompts
from everytoken.testing.models import tiny_llama, tiny_llava

IMAGE = 12
SIZES = [(8, 8)] * 2


def encoder(**settings):
    torch.manual_seed(0)
    return VisualPromptEncoder(
        VisualPromptConfig(**{"hidden_size": 16, "width": 8, "max_prompts": 3, **settings})
    ).eval()


def batch(before=0):
    """Two rows, the second with ``before`` words more in front of its image and padding behind the first."""
    rows = [[IMAGE] * 4 + [3, 4, 5] + [0] * before, [2] * before + [IMAGE] * 4 + [6, 7, 8]]
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids)
    if before:
        mask[0, -before:] = 0
    labels = torch.where((mask > 0) & (ids != IMAGE), ids, -100)
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("before", [0, 2])
def test_it_equals_the_gathered_embeddings(before):
    model, made, rows = tiny_llava(), encoder(), batch(before)
    prompts = encode_prompts([[Point(2, 3)], [Box(1, 1, 4, 6), Point(7, 7)]], SIZES, 3)
    inputs = with_prompts(model, made, rows, prompts)
    assert inputs["input_ids"].shape[1] == rows["input_ids"].shape[1] + 5
    found = model(**inputs)
    table = model.get_input_embeddings()
    features = model.get_image_features(rows["pixel_values"], return_dict=True).pooler_output
    for row in range(2):
        ids, first = rows["input_ids"][row], before * row
        whole = [table(ids[:first]), features[row], made.tokens(prompts)[row], table(ids[first + 4 :])]
        length = int(inputs["attention_mask"][row].sum())
        logits = model(inputs_embeds=torch.cat(whole)[None, :length]).logits[0]
        assert torch.allclose(found.logits[row, :length], logits, atol=1e-5)
        there = inputs["labels"][row] != -100
        assert inputs["labels"][row][there].tolist() == [item for item in rows["labels"][row].tolist() if item != -100]
        assert torch.equal(inputs["input_ids"][row][there], inputs["labels"][row][there])
    assert torch.isfinite(found.loss)
    del inputs["labels"]
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2


def test_without_empty_slots_there_are_fewer_tokens():
    model, made = tiny_llava(), encoder(drop_empty=True)
    one = encode_prompts([[Point(2, 3)], [Point(1, 1)]], SIZES, 3)
    assert with_prompts(model, made, batch(), one)["input_ids"].shape[1] == 7 + 3
    unequal = encode_prompts([[Point(2, 3)], []], SIZES, 3)
    with pytest.raises(BadInputError, match="different numbers of prompts"):
        with_prompts(model, made, batch(), unequal)


def test_the_model_has_the_trained_weights_inside_the_block_only(tmp_path):
    model, made = tiny_llava(), encoder()
    save_prompting(made, tmp_path, {"model.language_model.norm.weight": torch.full((16,), 3.0)})
    before = model.model.language_model.norm.weight.clone()
    with prompting(model, tmp_path) as loaded:
        assert (model.model.language_model.norm.weight == 3).all()
        assert torch.equal(loaded.frequencies, made.frequencies)
    assert torch.equal(model.model.language_model.norm.weight, before)


def test_images_and_texts_through_a_processor():
    pytest.importorskip("PIL")
    from PIL import Image

    from everytoken.training.vlm_files import scene_processor

    model, made = tiny_llava(41), encoder()
    model.config.image_token_index = 3
    processor = scene_processor(8, 4)
    square = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    text = "<image> shape? <prompt>"
    inputs = prompted_inputs(model, processor, made, [square], [text], [[Point(8, 8)]])
    assert inputs["input_ids"].shape == (1, 4 + 5 + 2)
    same = encode_prompts([[Point(4, 4)]], [(8, 8)], 3)  # the same place in the smaller image that the model reads
    assert torch.allclose(inputs["mm_encoder_outputs"]["image"].pooler_output[0][4:], made.tokens(same)[0])
    wide = square.resize((32, 16))
    with pytest.raises(BadInputError, match="cuts off the ends"):
        prompted_inputs(model, processor, made, [wide], [text], [[]])


def test_what_is_refused(tmp_path):
    model, made, rows = tiny_llava(), encoder(), batch()
    none = encode_prompts([[], []], SIZES, 3, empty=BOX)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        with_prompts(tiny_llama(), made, rows, none)
    with pytest.raises(BadInputError, match="width 20"):
        with_prompts(model, encoder(hidden_size=20), rows, none)
    with pytest.raises(BadInputError, match="one image"):
        with_prompts(model, made, {"input_ids": rows["input_ids"]}, none)
    with pytest.raises(BadInputError, match="as many image tokens"):
        with_prompts(model, made, {**rows, "input_ids": rows["input_ids"][:, 1:]}, none)
    with pytest.raises(BadInputError, match="no visual prompt encoder in"), prompting(model, tmp_path):
        pass


def test_what_learns_in_each_stage():
    model, made = tiny_llava(), encoder()
    first, second = (set(stage_weights(model, made, stage)) for stage in ("alignment", "instructions"))
    own = {f"prompts.{name}" for name, _ in made.named_parameters()}
    assert own <= first and not any("layers" in name for name in first)
    assert {name.split(".")[1] for name in second if name.startswith("prompts.")} == {"project", "norm", "ends"}
    assert any("language_model.layers.0" in name for name in second)
    assert not any("vision_tower" in name for name in first | second)
    assert not any("multi_modal_projector" in name for name in second) and "frequencies" not in str(first)
    with pytest.raises(BadInputError, match="no stage"):
        stage_weights(model, made, "third")


@pytest.mark.parametrize("stage", ["alignment", "instructions"])
def test_a_step_leaves_what_is_frozen_as_it_was(stage):
    model, made = tiny_llava(), encoder()
    chosen = stage_weights(model, made, stage)
    everything = {**dict(model.named_parameters()), **{f"prompts.{k}": v for k, v in made.named_parameters()}}
    before = {name: weight.detach().clone() for name, weight in everything.items()}
    frequencies = made.frequencies.clone()
    for name, weight in everything.items():
        weight.requires_grad_(name in chosen)
    prompts = encode_prompts([[Point(2, 3)], [Box(1, 1, 4, 6)]], SIZES, 3)
    optimizer = torch.optim.AdamW(chosen.values(), lr=0.1)
    model(**with_prompts(model, made, batch(), prompts)).loss.backward()
    optimizer.step()
    changed = {name for name, weight in everything.items() if not torch.equal(weight, before[name])}
    assert changed <= set(chosen) and "prompts.project.weight" in changed
    assert torch.equal(made.frequencies, frequencies)
