"""Scoring of rows: against full logits, whatever the padding and the order; guides that do not fit."""

from __future__ import annotations

import pytest
import torch

from everytoken.core.errors import BadInputError, TokenizerMismatchError, UnsupportedModelError
from everytoken.core.scoring import check_guide, head_module, model_fingerprint, pad_rows, response_logps, score_rows

from ..conftest import tiny_llama

ROWS = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9, 1]), ([2, 2], [3])]


def alone(model, prompt, response):
    logp = torch.log_softmax(model(torch.tensor([prompt + response])).logits[0].detach(), -1)
    return torch.stack([logp[len(prompt) + i - 1, token] for i, token in enumerate(response)])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_rows_are_scored_as_if_alone(size):
    model = tiny_llama(seed=1)
    found = score_rows(ROWS, lambda *batch: response_logps(model, *batch), size)
    for (prompt, response), values in zip(ROWS, found, strict=True):
        assert torch.allclose(values, alone(model, prompt, response), atol=1e-5)


def test_left_padding_changes_nothing():
    model = tiny_llama(seed=1)
    ids, attention, mask = pad_rows([([1, 2, 3], [4, 5]), ([6], [7])])
    moved = [torch.tensor([[0, 0, 0, 6, 7]]), torch.tensor([[0, 0, 0, 1, 1]]), torch.tensor([[False] * 4 + [True]])]
    right = response_logps(model, ids, mask, attention)[1, 1]
    assert response_logps(model, moved[0], moved[2], moved[1])[0, 4].item() == pytest.approx(right.item(), abs=1e-5)


def test_empty_rows_are_named_and_progress_is_reported():
    model, seen = tiny_llama(), []
    with pytest.raises(BadInputError, match="Row 1 has an empty response"):
        score_rows([([1], [2]), ([1], [])], lambda *b: response_logps(model, *b))
    with pytest.raises(BadInputError, match="Row 0 has an empty prompt"):
        score_rows([([], [2])], lambda *b: response_logps(model, *b))
    score_rows(ROWS, lambda *b: response_logps(model, *b), 2, report=lambda *x: seen.append(x))
    assert seen == [("scoring rows", 2, 3), ("scoring rows", 3, 3)]


def test_guides_must_share_the_tokenizer(embedded_tokenizer):
    import copy

    check_guide(tiny_llama(11), tiny_llama(11))
    with pytest.raises(TokenizerMismatchError, match="12 tokens and the policy of 11"):
        check_guide(tiny_llama(11), tiny_llama(12))
    other = copy.deepcopy(embedded_tokenizer)
    other.add_tokens(["<new>"])
    check_guide(tiny_llama(11), tiny_llama(11), "guide", embedded_tokenizer, embedded_tokenizer)
    with pytest.raises(TokenizerMismatchError, match="<new>"):
        check_guide(tiny_llama(11), tiny_llama(11), "guide", embedded_tokenizer, other)
    other_way = tiny_llama()
    other_way.config.logits_soft_cap = 30.0  # RecurrentGemma's
    with pytest.raises(UnsupportedModelError, match="logits_soft_cap"):
        head_module(other_way)


def test_fingerprints_follow_the_weights():
    one, same, other = tiny_llama(seed=1), tiny_llama(seed=1), tiny_llama(seed=2)
    assert model_fingerprint(one) == model_fingerprint(same) != model_fingerprint(other)
    with torch.no_grad():
        same.model.layers[0].mlp.up_proj.weight[3, 5] += 0.01
    assert model_fingerprint(one) != model_fingerprint(same)
