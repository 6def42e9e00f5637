"""A row's cache: windows, recurrent states, padding, rotary embeddings that change with the length, short drafts."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.decoding.row_cache import (
    RowCache,
    check_rewindable,
    new_cache,
    restore_padding,
    rope_switch,
    strip_padding,
    takes_trees,
)
from everytoken.generation.dyspec import DySpec
from everytoken.generation.r2r import R2R
from everytoken.generation.tokenselect import TokenSelect
from everytoken.testing.models import tiny_llama

from .families import VOCAB, build
from .matrix import PADDED, PROMPT, Turns, close, generate, nearly


def family(name, **settings):
    model = build(name, **settings)
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", ["mistral", "gemma2", "lfm3", "deepseek_v3"])
def test_tokens_are_taken_back_without_a_trace(name):
    model, text = family(name), PROMPT[0].tolist()
    plain, held = RowCache(model), RowCache(model)
    plain.read(text)
    held.read(text)
    for length in (3, 5):  # wrong tokens come and go
        held.mark()
        held.read_tree([7] * length, list(range(length)), None)
        assert held.back()
    for token in (4, 9, 2):
        text.append(token)
        ours, theirs = held.read(text)["logits"], plain.read(text)["logits"]
        assert torch.allclose(ours, theirs, atol=1e-4)
    held.close()
    assert held.length == plain.length == len(text)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "cohere2", "llama4_text"])
def test_a_tree_reads_as_its_paths_do(name):
    """Logits behind each node are those of its own path, also where windows end between the text and the node."""
    model, text = family(name), PROMPT[0].tolist()
    held = RowCache(model)
    assert held.trees
    held.read(text)
    held.mark()
    tokens, parents, depths = [5, 3, 8, 9, 4], [-1, 0, 0, 1, 2], [0, 1, 1, 2, 2]
    seen = torch.eye(5, dtype=torch.bool)
    for node in range(1, 5):
        seen[node] |= seen[parents[node]]
    allowed = torch.cat([torch.ones(5, len(text), dtype=torch.bool), seen], 1)
    logits = held.read_tree(tokens, depths, allowed)["logits"][0]
    for node, path in enumerate([[5], [5, 3], [5, 8], [5, 3, 9], [5, 8, 4]]):
        expected = model(torch.tensor([text + path])).logits[0, -1]
        assert torch.allclose(logits[node], expected, atol=1e-4)
    held.keep([0, 2, 4])
    after = held.read([*text, 5, 8, 4, 6])["logits"][0, -1]
    assert torch.allclose(after, model(torch.tensor([[*text, 5, 8, 4, 6]])).logits[0, -1], atol=1e-4)


def test_padding_goes_out_of_a_cache_and_back():
    model = family("gemma2")
    first = generate(model, PADDED[:1], 3)
    cache, alone = first.past_key_values, generate(model, PADDED[:1, 4:], 3).past_key_values
    lengths = [layer.keys.shape[-2] for layer in cache.layers]
    strip_padding(cache, 4)
    assert cache.get_seq_length() == alone.get_seq_length()
    for ours, theirs in zip(cache.layers, alone.layers, strict=True):
        assert torch.allclose(ours.keys[:, :, -6:], theirs.keys[:, :, -6:], atol=1e-4)
    restore_padding(cache, 4)
    assert [layer.keys.shape[-2] for layer in cache.layers] == lengths
    assert [layer.get_seq_length() for layer in cache.layers] == [14] * len(cache.layers)


@pytest.mark.parametrize("decoder", ["DySpec", "R2R"])
def test_a_window_behind_a_dynamic_cache_of_the_users(decoder):
    """``DynamicCache()`` keeps every key of a model with windows: masks must end them."""
    model = family("mistral")
    made = {"DySpec": lambda: DySpec(nearly(model)), "R2R": lambda: R2R(copy.deepcopy(model), Turns())}[decoder]()
    expected = generate(model, PROMPT, 12, past_key_values=DynamicCache())
    assert close(generate(model, PROMPT, 12, made, past_key_values=DynamicCache()), expected)


ROPES = {
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}, 16),
    "longrope": (
        "phi3",
        {
            "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 10000.0,
            "original_max_position_embeddings": 16, "partial_rotary_factor": 1.0,
        },
        64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("decoder", ["DySpec", "R2R"])
@pytest.mark.parametrize("rope", ROPES)
def test_a_text_crosses_a_change_of_its_rotary_embedding(rope, decoder):
    name, parameters, context = ROPES[rope]
    settings = {"rope_parameters": parameters, "max_position_embeddings": context, "sliding_window": None}
    if rope == "longrope":
        settings["original_max_position_embeddings"] = 16
    else:
        settings.pop("sliding_window")
    model = family(name, **settings)
    assert rope_switch(model.config) == (16, rope == "dynamic")
    made = {"DySpec": lambda: DySpec(nearly(model)), "R2R": lambda: R2R(copy.deepcopy(model), Turns())}[decoder]()
    assert close(generate(model, PROMPT, 12, made), generate(model, PROMPT, 12))


def test_a_draft_with_a_shorter_context():
    """Its position embeddings end at 16: behind that the target writes alone."""
    model, short = family("llama"), family("gpt2", max_position_embeddings=16)
    assert close(generate(model, PROMPT, 12, DySpec(short)), generate(model, PROMPT, 12))
    mixed = R2R(short, threshold=100.0)
    output = generate(model, PROMPT, 12, mixed)
    assert output.sequences.shape[1] == 24
    assert 0 < mixed.stats.target_forwards < 12
    beyond = torch.cat([PROMPT, PROMPT], 1)
    assert close(generate(model, beyond, 4, DySpec(short)), generate(model, beyond, 4))


def test_drafts_are_one_path_where_masks_are_the_models_own():
    """GPT-Neo masks its local layers itself, and Bloom counts positions in its mask."""
    for name in ("gpt_neo", "bloom"):
        model = family(name)
        assert not takes_trees(model, new_cache(model))
        decoder = DySpec(nearly(model), budget=4, threshold=None)
        assert close(generate(model, PROMPT, 12, decoder), generate(model, PROMPT, 12))
        assert decoder.stats.accepted > 0


def test_caches_of_a_fixed_size_are_refused():
    model = tiny_llama(VOCAB)
    check_rewindable("X", new_cache(model))
    with pytest.raises(UnsupportedModelError, match="StaticLayer"):
        check_rewindable("X", StaticCache(config=model.config, max_cache_len=8))


def test_token_select_refuses_padding_on_the_right_and_reads_around_holes():
    model = family("gemma2")
    decoder = TokenSelect(top_k=0, n_init=0, n_local=64, chunk_size=64)
    mask = torch.ones_like(PROMPT)
    mask[0, -2:] = 0
    with pytest.raises(BadInputError, match="on the left"):
        generate(model, PROMPT, 3, decoder, mask=mask)
    holes = torch.ones_like(PROMPT)
    holes[0, 4:6] = 0
    full = family("smollm3")
    assert close(generate(full, PROMPT, 6, decoder, mask=holes), generate(full, PROMPT, 6, mask=holes))
    with pytest.raises(BadInputError, match="new_cache"):
        generate(full, PROMPT, 3, decoder, past_key_values=DynamicCache())
