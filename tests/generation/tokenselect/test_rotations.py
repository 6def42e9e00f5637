"""How layers of other families rotate, share keys, or know no positions at all, and that a selection follows them."""

from __future__ import annotations

import pytest
import torch

from everytoken.core.errors import UnsupportedModelError
from everytoken.generation.tokenselect import TokenSelect
from everytoken.generation.tokenselect.attention import angles_of, rotate_pairs
from everytoken.generation.tokenselect.rotations import at_rest, plan_layers, rotaries_of, same

from ...decoding.families import build
from ...decoding.matrix import PROMPT, generate

WINDOW = 5
ONE_LAYER = {
    "llama": {},
    "cohere": {},
    "glm": {},
    "deepseek_v2": {},
    "llama4_text": {"layer_types": ["full_attention"], "no_rope_layers": [1]},
}


@pytest.mark.parametrize("name", ONE_LAYER)
def test_a_selection_of_the_last_tokens_is_a_text_of_them(name):
    """Rotary attention knows distances alone: one layer over the last tokens is that layer over a shorter text."""
    model = build(name, num_hidden_layers=1, **ONE_LAYER[name])
    decoder = TokenSelect(top_k=0, n_init=0, n_local=WINDOW, chunk_size=1, score_dtype="float32")
    ours = generate(model, PROMPT, 1, decoder).logits[0]
    with torch.no_grad():
        short, whole = (model(PROMPT[:, -length:]).logits[:, -1] for length in (WINDOW, PROMPT.shape[1]))
    assert torch.allclose(ours, short, atol=1e-4)
    assert not torch.allclose(ours, whole, atol=1e-2)


def test_complex_angles_turn_pairs_as_the_models_own_function_does():
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb

    angles = torch.polar(torch.ones(1, 6, 4), torch.randn(1, 6, 4))
    query, key = torch.randn(1, 3, 6, 8), torch.randn(1, 1, 6, 8)
    for ours, theirs in zip(rotate_pairs(query, key, angles), apply_rotary_emb(query, key, angles), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    rest = at_rest(angles, (2, 7))
    assert rest.shape == (2, 7, 4)
    still = rotate_pairs(torch.ones(2, 3, 7, 8), torch.ones(2, 3, 7, 8), rest)[0]
    assert torch.equal(still, torch.ones(2, 3, 7, 8))
    assert same(rest, rest)
    assert not same(rest, rest.clone())
    with pytest.raises(UnsupportedModelError, match="another form"):
        angles_of(torch.ones(1, 6, 4))


def test_layers_that_borrow_keys_are_refused():
    """Such a model cuts its last layers' inputs to the tokens whose logits are kept: the selection cannot follow."""
    kinds = ["sliding_attention", "full_attention"] * 2
    model = build("gemma4_text", num_kv_shared_layers=2, layer_types=kinds)
    with pytest.raises(UnsupportedModelError, match="borrow keys"):
        generate(model, PROMPT, 6, TokenSelect())


@pytest.mark.parametrize("name", ["jamba", "nemotron_h"])
def test_attention_that_knows_no_positions_is_selected_from_as_it_is(name):
    """Its recurrent layers tell the order of the tokens."""
    model = build(name)
    assert rotaries_of(model) == []
    decoder = TokenSelect(top_k=2, n_init=1, n_local=4, chunk_size=2)
    assert generate(model, PROMPT, 6, decoder).sequences.shape == (1, 18)
    assert 0 < decoder.attended < decoder.available


def test_layers_that_select_keys_themselves_are_refused():
    with pytest.raises(UnsupportedModelError, match="selects keys itself"):
        plan_layers(build("dots3_note_text"))
    with pytest.raises(UnsupportedModelError, match="0 rotary embeddings"):
        rotaries_of(build("gpt2"))


@pytest.mark.parametrize("padded", [False, True])
def test_a_prompt_in_one_forward_is_read_as_in_chunks(padded):
    """As models with recurrent layers are given it: each layer takes the chunks by itself."""
    model, chunk = build("llama"), 3
    decoder = TokenSelect(top_k=2, n_init=1, n_local=4, chunk_size=chunk, score_dtype="float32")
    mask = torch.ones_like(PROMPT)
    mask[:, : 3 * padded] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with decoder.attention(model), torch.no_grad():
        whole = model(PROMPT, past_key_values=decoder.new_cache(model), **inputs).logits
        cache, parts = decoder.new_cache(model), []
        for start in range(0, PROMPT.shape[1], chunk):
            part = slice(start, start + chunk)
            parts.append(
                model(
                    PROMPT[:, part], attention_mask=mask[:, : start + chunk], past_key_values=cache,
                    position_ids=inputs["position_ids"][:, part],
                ).logits
            )  # fmt: skip
    assert torch.allclose(whole[:, 3 * padded :], torch.cat(parts, 1)[:, 3 * padded :], atol=1e-4)
