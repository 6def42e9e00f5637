"""Decoding with a compiled forward: the text of ``generate``, the same cache afterwards, and when it is not used."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from everytoken.core.grouped.linear import group_linears
from everytoken.decoding.lean import LeanRowCache, lean_forward, row_cache
from everytoken.decoding.plain import PlainDecoding
from everytoken.decoding.row_cache import RowCache
from everytoken.generation.dyspec import DySpec
from everytoken.testing.decoder import DecoderConformance

from ..conftest import tiny_llama
from ..core.grouped.conftest import small_llama


def lean_model(**settings):
    model = small_llama(**settings)
    group_linears(model)
    return model


class TestPlainDecoding(DecoderConformance):
    decoders = (PlainDecoding,)
    draws = 300


@pytest.fixture
def model():
    return lean_model()


IDS = torch.tensor([[1, 5, 3, 9]])
GREEDY = {"max_new_tokens": 24, "do_sample": False}


@pytest.mark.parametrize("arguments", [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}])
@pytest.mark.parametrize("tied", [False, True])
def test_greedy_text_is_that_of_generate(arguments, tied):
    model = lean_model(tied=tied)
    expected = model.generate(IDS, **GREEDY, **arguments)
    assert torch.equal(model.generate(IDS, custom_generate=PlainDecoding(), **GREEDY, **arguments), expected)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("draft", ["itself", "random"])
def test_a_tree_is_read_as_its_paths_would_be(model, draft, adaptive):
    """Every token and every logit is the same, bit for bit: a tree changes no sum of its nodes."""
    arguments = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(IDS, custom_generate=PlainDecoding(), **arguments)
    helper = model if draft == "itself" else tiny_llama(24, seed=3)
    decoder = DySpec(helper, budget=6, threshold=None, adaptive=adaptive)
    output = model.generate(IDS, custom_generate=decoder, **arguments)
    assert torch.equal(output.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(output.logits, plain.logits, strict=True))
    assert decoder.stats.proposed > 0
    if draft == "itself" and not adaptive:
        assert decoder.stats.target_forwards < 24


def test_samples_do_not_look_at_the_clock(model):
    decoder, texts = DySpec(tiny_llama(24, seed=3), adaptive=True), []
    for _ in range(3):
        torch.manual_seed(0)
        texts.append(model.generate(IDS, custom_generate=decoder, max_new_tokens=16, do_sample=True).tolist())
    assert texts[0] == texts[1] == texts[2]


def test_the_cache_afterwards_is_that_of_generate_and_can_be_continued(model):
    arguments = GREEDY | {"return_dict_in_generate": True}
    expected = model.generate(IDS, **arguments)
    ours = model.generate(IDS, custom_generate=PlainDecoding(), **arguments)
    for a, b in zip(ours.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert torch.allclose(a.keys, b.keys, atol=1e-2) and torch.allclose(a.values, b.values, atol=1e-2)
    longer = model.generate(expected.sequences, max_new_tokens=5, do_sample=False)
    for decoder in (None, PlainDecoding(), DySpec(tiny_llama(24, seed=3))):
        again = copy.deepcopy(ours.past_key_values)
        output = model.generate(
            ours.sequences, past_key_values=again, custom_generate=decoder, max_new_tokens=5, do_sample=False
        )
        assert torch.equal(output, longer)


def test_a_long_text_outgrows_its_room(model):
    lean, plain = row_cache(model), RowCache(model)
    text = torch.randint(0, 24, (400,)).tolist()
    with torch.no_grad():
        for end in (3, 4, 70, 300, 301, 400):
            ours, theirs = lean.read(text[:end])["logits"][0, -1], plain.read(text[:end])["logits"][0, -1]
            assert torch.allclose(ours, theirs, atol=1e-2)


def test_transformers_forward_runs_where_someone_looks(model):
    assert isinstance(row_cache(model), LeanRowCache)
    assert lean_forward(small_llama()) is None
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert lean_forward(model) is None
    hook.remove()
    assert lean_forward(model) is not None
    assert lean_forward(model, DynamicCache()) is not None
    norm = model.model.norm
    norm.forward = norm.forward  # someone's replacement
    assert lean_forward(model) is None
    del norm.forward
    model.config.output_hidden_states = True
    assert lean_forward(model) is None
    model.config.output_hidden_states = False
    assert lean_forward(model.train()) is None
    model.eval()
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert lean_forward(model) is None


def test_a_copy_has_a_forward_of_its_own(model):
    other = copy.deepcopy(model)
    text = model.generate(IDS, custom_generate=PlainDecoding(), **GREEDY)
    assert torch.equal(other.generate(IDS, custom_generate=PlainDecoding(), **GREEDY), text)
