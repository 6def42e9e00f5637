"""Beam search over Q*: exhaustive search, greedy, transformers' beams, value search by brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.generation.qstar_beam import QStarBeam

from ..conftest import tiny_llama

PROMPT = torch.tensor([[1, 2]])


def run(model, decoder, prompt=PROMPT, new=3, **kwargs):
    kwargs = {"do_sample": False, "attention_mask": torch.ones_like(prompt)} | kwargs
    return model.generate(prompt, max_new_tokens=new, custom_generate=decoder, **kwargs)


def sums(model, prompt, steps, reference=None):
    """The log-probability of every continuation (minus the reference's), by enumeration."""
    table = {}
    for tail in itertools.product(range(model.config.vocab_size), repeat=steps):
        ids = torch.tensor([prompt + list(tail)])
        total = 0.0
        for sign, item in ((1, model), (-1, reference)):
            if item is not None:
                logps = torch.log_softmax(item(ids).logits[0, len(prompt) - 1 : -1].detach(), -1)
                total += sign * float(logps.gather(1, torch.tensor(tail)[:, None]).sum())
        table[tail] = total
    return table


@pytest.mark.parametrize("seed", range(4))
def test_a_beam_of_all_sequences_is_exhaustive_search(seed):
    model = tiny_llama(3, seed=seed, scale=0.3)
    table = sums(model, [1, 2], 3)
    best = max(table, key=table.get)
    assert run(model, QStarBeam(27))[0, 2:].tolist() == list(best)


@pytest.mark.parametrize("seed", range(3))
def test_a_value_beam_of_all_sequences_finds_the_largest_implicit_reward(seed):
    model, reference = tiny_llama(3, seed=seed, scale=0.3), tiny_llama(3, seed=seed + 10, scale=0.3)
    table = sums(model, [1, 2], 3, reference)
    best = max(table, key=table.get)
    assert run(model, QStarBeam(27, reference, score="value"))[0, 2:].tolist() == list(best)


def test_value_search_on_ragged_batches():
    model, reference = tiny_llama(5, seed=1, scale=0.3), tiny_llama(5, seed=4, scale=0.3)
    decoder = QStarBeam(4, reference, score="value")
    single = [run(model, decoder, torch.tensor([p]), 5)[0, len(p) :].tolist() for p in ([1, 2, 3, 4], [4, 4])]
    ids = torch.tensor([[1, 2, 3, 4], [0, 0, 4, 4]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    assert run(model, decoder, ids, 5, attention_mask=mask)[:, 4:].tolist() == single


@pytest.mark.parametrize("seed", range(3))
def test_one_beam_is_greedy_and_several_are_transformers_own(seed):
    model = tiny_llama(13, seed=seed)
    assert run(model, QStarBeam(1), new=12).tolist() == run(model, None, new=12).tolist()
    for width in (2, 5):
        theirs = run(model, None, new=12, num_beams=width, length_penalty=0.0, eos_token_id=4)
        assert run(model, QStarBeam(width), new=12, eos_token_id=4).tolist() == theirs.tolist()
        given = run(model, QStarBeam(1), new=12, num_beams=width, eos_token_id=4)
        assert given.tolist() == theirs.tolist()


def test_several_sequences_are_returned_with_their_traces():
    model, reference = tiny_llama(13, seed=1), tiny_llama(13, seed=2)
    decoder = QStarBeam(4, reference, beta=0.2, trace_enabled=True)
    ids = torch.tensor([[0, 1, 2], [3, 4, 5]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    output = run(model, decoder, ids, 6, attention_mask=mask, num_beams=4, num_return_sequences=2)
    assert output.shape[0] == len(decoder.trace) == 4
    text = output[0, 1:]
    ratios = [torch.log_softmax(item(text[None]).logits[0].detach(), -1) for item in (model, reference)]
    for place in range(6):
        token = int(text[2 + place])
        logp, ref = (float(item[1 + place, token]) for item in ratios)
        assert decoder.trace[0].columns["logp"][place] == pytest.approx(logp, abs=1e-4)
        assert decoder.trace[0].columns["implicit_reward"][place] == pytest.approx(0.2 * (logp - ref), abs=1e-4)


def test_bad_input():
    for settings, words in (
        ({"width": 0}, "width >= 1"),
        ({"beta": 0}, "beta > 0"),
        ({"score": "luck"}, "likelihood"),
        ({"score": "value"}, "compares with a reference"),
    ):
        with pytest.raises(BadInputError, match=words):
            QStarBeam(**settings)
    model = tiny_llama(13)
    first = run(model, None, return_dict_in_generate=True)
    with pytest.raises(BadInputError, match="empty cache"):
        run(model, QStarBeam(3), first.sequences, past_key_values=first.past_key_values)
    with pytest.raises(BadInputError, match="num_beams"):
        run(model, QStarBeam(3), do_sample=True, num_return_sequences=2)
