"""Positions that do not count tokens: images in Qwen2-VL, and positions that a user gives."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from everytoken.core.errors import BadInputError
from everytoken.generation.tokenselect import TokenSelect

from ...conftest import tiny_llama
from ...decoding.matrix import PADDED, PROMPT, close, generate

IMAGE, START, END = 28, 26, 27


@functools.cache
def qwen2_vl(layers=2):
    """A tiny random Qwen2-VL: rotary positions have three axes, each for some of the channels."""
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config=dict(
                vocab_size=29, hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
                pad_token_id=0,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            ),
            vision_config=dict(
                depth=1, embed_dim=16, hidden_size=32, num_heads=2, patch_size=2, spatial_merge_size=2,
                temporal_patch_size=1, mlp_ratio=2,
            ),
            image_token_id=IMAGE, vision_start_token_id=START, vision_end_token_id=END,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.25)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


@pytest.mark.parametrize("chunk", [64, 5])
@pytest.mark.parametrize("ids", [PROMPT.clamp(max=20), PADDED.clamp(max=20)], ids=["one row", "padded"])
def test_a_text_in_qwen2_vl_is_selected_from_as_in_other_models(ids, chunk):
    model = qwen2_vl()
    decoder = TokenSelect(top_k=0, n_init=0, n_local=64, chunk_size=chunk, score_dtype="float32")
    assert close(generate(model, ids, 6, decoder), generate(model, ids, 6))


def test_a_selection_in_qwen2_vl_has_positions_of_its_own():
    """One layer over the last tokens is that layer over a shorter text, with three axes as with one."""
    model, text = qwen2_vl(layers=1), PROMPT.clamp(max=20)
    decoder = TokenSelect(top_k=0, n_init=0, n_local=5, chunk_size=1, score_dtype="float32")
    ours = generate(model, text, 1, decoder).logits[0]
    short, whole = (generate(model, part, 1).logits[0] for part in (text[:, -5:], text))
    assert torch.allclose(ours, short, atol=1e-4)
    assert not torch.allclose(ours, whole, atol=1e-2)


def test_images_with_places_on_several_axes_are_refused_before_any_forward():
    model = qwen2_vl()
    ids = torch.tensor([[3, 4, START, *[IMAGE] * 4, END, 5, 6]])
    image = {
        "pixel_values": torch.randn(16, 12), "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }  # fmt: skip
    assert generate(model, ids, 2, **image).sequences.shape == (1, 12)  # plain generate serves it
    ran = []
    hook = model.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(BadInputError, match=r"Qwen2VL.* do not go up by one"):
            generate(model, ids, 2, TokenSelect(), **image)
    finally:
        hook.remove()
    assert not ran


def test_positions_that_leap_are_refused_and_those_that_count_from_elsewhere_are_not():
    model = tiny_llama(29)
    count = torch.arange(PROMPT.shape[1])[None]
    every = TokenSelect(top_k=0, n_init=0, n_local=64, score_dtype="float32", chunk_size=64)
    plain = generate(model, PROMPT, 6, position_ids=count + 7)
    assert close(generate(model, PROMPT, 6, every, position_ids=count + 7), plain)
    for leaping in (2 * count, count.flip(1), count + (count > 5)):
        with pytest.raises(BadInputError, match="go up by one"):
            generate(model, PROMPT, 6, every, position_ids=leaping)


def test_holes_in_the_mask_are_no_leaps():
    model, mask = tiny_llama(29), torch.ones_like(PROMPT)
    mask[:, 3:5] = 0
    every = TokenSelect(top_k=0, n_init=0, n_local=64, score_dtype="float32", chunk_size=64)
    assert close(generate(model, PROMPT, 6, every, mask=mask), generate(model, PROMPT, 6, mask=mask))
