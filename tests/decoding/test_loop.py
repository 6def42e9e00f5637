"""Decoders in transformers' loops: following a matcher, and where a row ends."""

from __future__ import annotations

import types

import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.decoding.loop import LoopDecoder, MatcherLogitsProcessor, by_row, new_tokens
from everytoken.decoding.matcher import fill_mask

from ..conftest import tiny_llama
from ..generation.common import ToyMatcher


def test_masks_are_filled_from_bits():
    matcher, scores = ToyMatcher(70), torch.zeros(70)
    fill_mask(matcher, scores)
    assert [place for place, value in enumerate(scores.tolist()) if value == 0] == list(range(0, 70, 2))
    done = ToyMatcher(70, length=0, end=3)
    done.accept_token(3)
    free = torch.zeros(70)
    fill_mask(done, free)
    assert free.eq(0).all()


def test_a_matcher_follows_rows_that_are_reordered_or_begin_anew():
    processor = MatcherLogitsProcessor(ToyMatcher(6), prompt_length=1)
    scores = torch.zeros(2, 6)
    first = processor(torch.tensor([[5], [5]]), scores)
    assert first.isfinite().tolist() == [[True, False] * 3] * 2
    processor(torch.tensor([[5, 0], [5, 2]]), scores)
    swapped = processor(torch.tensor([[5, 2, 1], [5, 2, 3]]), scores)  # both beams come from the second row
    assert swapped.isfinite().tolist() == [[True, False] * 3] * 2
    fresh = processor(torch.tensor([[5, 4], [5, 0]]), scores)  # another call: nothing known but the start
    assert fresh.isfinite().tolist() == [[False, True] * 3] * 2


def test_forbidden_tokens_are_an_error_but_in_beams():
    scores, text = torch.zeros(1, 6), torch.tensor([[5, 1]])
    with pytest.raises(BadInputError, match="forbids"):
        MatcherLogitsProcessor(ToyMatcher(6), 1)(text, scores)
    assert MatcherLogitsProcessor(ToyMatcher(6), 1, strict=False)(text, scores).isfinite().all()


def test_rows_end_with_their_first_end_token():
    config = types.SimpleNamespace(_eos_token_tensor=torch.tensor([7, 8]))
    sequences = torch.tensor([[1, 2, 3, 7, 0], [1, 2, 3, 4, 5], [1, 8, 7, 0, 0]])
    assert new_tokens(sequences, 1, config) == [[2, 3, 7], [2, 3, 4, 5], [8]]
    assert new_tokens(sequences[:1], 1, types.SimpleNamespace()) == [[2, 3, 7, 0]]
    assert by_row([[1, 2], [3]], [9, 8, 7]) == [[9, 8], [9]]


def test_the_base_is_abstract():
    model = tiny_llama(13)
    with pytest.raises(NotImplementedError):
        LoopDecoder()(model, torch.tensor([[1, 2]]), generation_config=model.generation_config)
