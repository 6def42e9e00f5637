"""TW-GRPO's weights by brute force and closed form, its rewards, and its questions."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.core.errors import BadInputError
from everytoken.reinforcement import tw_grpo
from everytoken.reinforcement.tw_grpo import (
    TWGRPO,
    group_divergence,
    hard_multichoice_reward,
    invert_question,
    position_weights,
    soft_multichoice_reward,
    think_answer_format_reward,
)

from .common import distance, made, stock, weights


def problem(seed, rows=3, length=5, vocab=6):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, length, vocab, generator=generator)
    mask = torch.arange(length) < torch.randint(0, length + 1, (rows, 1), generator=generator)
    return logits, mask


@given(seed=st.integers(0, 200))
@settings(max_examples=25)
def test_divergence_by_three_loops(seed):
    logits, mask = problem(seed)
    logps = torch.log_softmax(logits, -1)
    found = group_divergence(logits, mask)
    for t in range(5):
        rows = [logps[i, t].tolist() if mask[i, t] else [-math.log(6)] * 6 for i in range(3)]
        total = 0.0
        for row in rows:
            for v in range(6):
                gap = max(-11.0, min(11.0, sum(other[v] for other in rows) / 3 - row[v]))
                total += (math.exp(gap) - gap - 1) / 3
        assert found[t].item() == pytest.approx(total, rel=1e-4, abs=1e-5)


def test_closed_form_and_invariances(monkeypatch):
    a, b = math.log(0.9), math.log(0.1)
    x = (b - a) / 2
    two = torch.tensor([[[a, b]], [[b, a]]])
    assert group_divergence(two, torch.ones(2, 1)).item() == pytest.approx(2 * math.cosh(x) - 2, rel=1e-5)
    logits, mask = problem(3)
    found = group_divergence(logits, mask)
    order = torch.randperm(6)
    assert torch.allclose(group_divergence(logits[..., order], mask), found, rtol=1e-4, atol=1e-6)
    assert torch.allclose(group_divergence(logits[[2, 0, 1]], mask[[2, 0, 1]]), found, rtol=1e-4, atol=1e-6)
    assert torch.allclose(group_divergence(logits + 5, mask), found, rtol=1e-3, atol=1e-5)
    monkeypatch.setattr(tw_grpo, "CHUNK", 20)
    assert torch.allclose(group_divergence(logits, mask), found)
    same = logits[:1].expand(3, -1, -1)
    assert torch.allclose(group_divergence(same, torch.ones(3, 5)), torch.zeros(5), atol=1e-5)


def test_weights():
    divergence, mask = torch.tensor([1.0, 3.0, 2.0, 0.0]), torch.ones(2, 4)
    found = position_weights(divergence, mask, 1.7)
    assert found[0].tolist() == pytest.approx([1 + 0.7 / 3, 1.7, 1 + 1.4 / 3, 1.0])
    assert torch.allclose(position_weights(2 * divergence, mask, 1.7), found)
    assert torch.equal(position_weights(divergence, mask, 1.0), mask)
    assert torch.equal(position_weights(torch.full((4,), 2.0), mask, 1.7), mask)
    ragged = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0]])
    assert torch.equal(position_weights(divergence, ragged, 1.7, min_active=2), ragged)
    assert torch.equal(position_weights(divergence, ragged, 1.7), found * ragged)


@pytest.mark.slow
def test_alpha_one_is_grpo_and_other_weights_are_not(tmp_path):
    arguments = TWGRPO().arguments()
    trainers = [
        made(tmp_path / "one", *TWGRPO(1.0).recipe().pieces, **arguments),
        stock(tmp_path / "stock", **arguments),
        made(tmp_path / "more", *TWGRPO(1.7).recipe().pieces, **arguments),
    ]
    for trainer in trainers:
        torch.manual_seed(3)
        trainer.train()
    found = [weights(trainer) for trainer in trainers]
    assert distance(found[0], found[1]) == 0.0
    assert distance(found[1], found[2]) > 1e-5
    logged = [entry for entry in trainers[2].state.log_history if "recipe/mean_weight" in entry]
    assert 1 < logged[0]["recipe/mean_weight"] <= 1.7
    with pytest.raises(BadInputError, match="beta"):
        made(tmp_path, *TWGRPO().recipe().pieces, beta=0.1)


def test_multichoice_rewards():
    answers = ["A", "A,C", "C, A", "A,B", "", "A,B,C"]
    texts = [f"<think>so</think><answer>{answer}</answer>" for answer in answers]
    truth = ["<answer>A,C</answer>"] * len(texts)
    assert soft_multichoice_reward(texts, truth) == [0.5, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert hard_multichoice_reward(texts, truth) == [0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert soft_multichoice_reward(["A"], ["A"]) == [0.0]  # no answer was given
    assert soft_multichoice_reward([[{"role": "assistant", "content": texts[0]}]], ["A"]) == [1.0]


def test_partial_credit_is_never_below_that_of_exact_sets():
    sets = [",".join(some) for size in range(4) for some in itertools.combinations("ABC", size)]
    for truth in sets[1:]:
        texts = [f"<think>so</think><answer>{answer}</answer>" for answer in sets]
        soft, hard = (
            reward(texts, [truth] * len(sets)) for reward in (soft_multichoice_reward, hard_multichoice_reward)
        )
        assert all(one >= other for one, other in zip(soft, hard, strict=True))
        assert len(truth) > 1 or soft == hard


def test_format_rewards():
    good = "<think>a</think> <answer>b</answer>"
    cases = {good: 1, good + " !": 1, good + "x": 0, good + good: 0, "<answer>b</answer><think>a</think>": 0,
             "<think>a<answer>b</answer></think>": 0, "<think>a</think>": 0, "": 0}  # fmt: skip
    assert think_answer_format_reward(list(cases)) == [float(value) for value in cases.values()]


@given(seed=st.integers(0, 200), count=st.integers(2, 5))
@settings(max_examples=40)
def test_questions_are_inverted(seed, count):
    rng = random.Random(seed)
    choices, correct = [f"choice {index}" for index in range(count)], rng.randrange(count)
    question, kept, right = invert_question("What did he take?", choices, correct, rng)
    assert question == "What didn't he take?"
    letters = {chr(ord("A") + place): choice for place, choice in enumerate(kept)}
    answers = {letters[letter] for letter in right.split(",")}
    assert answers and set(kept) - answers == {choices[correct]}


def test_what_cannot_be_inverted():
    assert invert_question("What next?", ["a", "b"], 0, random.Random(0)) is None
    with pytest.raises(BadInputError, match="two choices"):
        invert_question("What is it?", ["a"], 0, random.Random(0))
    for changes, name in (({"alpha": 0.5}, "alpha"), ({"min_active": -1}, "min_active")):
        with pytest.raises(BadInputError, match=name):
            TWGRPO(**changes)
