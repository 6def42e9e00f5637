"""Curriculum GRPO: its budgets, its rewards, and one budget in prompt and reward."""

from __future__ import annotations

import itertools
import re
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everytoken.core.errors import BadInputError
from everytoken.reinforcement.budgets import length_reward
from everytoken.reinforcement.curriculum_grpo import (
    BudgetPrompt,
    CurriculumGRPO,
    CurriculumLengthReward,
    ExponentialBudget,
    LinearBudget,
    StableAdvantage,
    format_parts,
)

from .common import TOKENIZER, batch_of, made


def test_budgets():
    budget = ExponentialBudget(256, 0.7, 150)
    found = [budget(step, 600) for step in range(600)]
    assert [found[step] for step in (0, 149, 150, 300, 450, 599)] == [256, 256, 179, 125, 87, 87]
    assert all(one >= other for one, other in itertools.pairwise(found))
    assert budget(600, 600) == 61 and ExponentialBudget(256, 0.7, 150, floor=87)(6000, 600) == 87
    assert budget(10**6, 600) == 1
    assert {ExponentialBudget(87, 1.0, 150)(step, 600) for step in (0, 500)} == {87}
    for drops, gamma in ((3, 0.698), (1, 0.340), (7, 0.857)):
        made_ = ExponentialBudget.between(256, 87, drops, 600)
        assert made_.gamma == pytest.approx(gamma, abs=1e-3) and made_.interval == 600 // (drops + 1)
    three = ExponentialBudget.between(256, 87, 3, 600)
    assert [three.start * three.gamma**k for k in range(4)] == pytest.approx([256, 178.6, 124.7, 87.0], abs=0.1)
    linear = LinearBudget(256, 87, 3)
    assert [linear(step, 600) for step in (0, 149, 150, 300, 450, 700)] == [256, 256, 199, 143, 87, 87]


def test_the_triangle_and_the_band():
    assert [length_reward(n, 87) for n in (0, 44, 87, 130, 174, 175)] == pytest.approx(
        [0, 0.5057, 1, 0.5057, 0, 0], abs=1e-4
    )
    assert [length_reward(n, 1) for n in (0, 1, 2)] == [0, 1, 0]
    for n in range(200):
        assert 0 <= length_reward(n, 87) <= length_reward(n, 87, "band") <= 1
        assert n < 87 or length_reward(n, 87) == length_reward(n, 87, "band")


def test_format():
    cases = {
        "<think>a</think><answer>b</answer>": (True, True), "<think>a</think>": (True, False),
        "<answer>b</answer>": (False, True), "<think>a<answer>b</answer></think>": (False, False),
        "<answer>b</answer><think>a</think>": (False, False), "<think>a</think><think>b</think>": (False, False),
        "<think>a": (False, False), "</think>a<think>": (False, False), "": (False, False),
    }  # fmt: skip
    assert {text: format_parts(text) for text in cases} == cases


# steps of 2^-20, which float32 still tells apart behind a 2: otherwise the shift itself would round the rewards
STEPS = st.integers(0, 2**20).map(lambda number: number / 2**20)


@given(st.lists(STEPS, min_size=3, max_size=6), st.floats(0.5, 4))
def test_advantages(rewards, factor):
    piece = StableAdvantage(eps=1e-12)
    found = piece(batch_of(rewards))
    assert torch.allclose(piece(batch_of([reward + 2 for reward in rewards])), found, atol=0.05)
    values = torch.tensor(rewards).double()
    spread = ((values - values.mean()).square().mean() + 1e-12).sqrt()
    assert torch.allclose(found.double(), (values - values.mean()) / spread, atol=1e-4)
    if spread > 0.01:
        assert torch.allclose(piece(batch_of([factor * reward for reward in rewards])), found, atol=1e-3)


def test_who_comes_closest_to_the_budget_gains_most():
    rewards = [length_reward(n, 20) for n in (3, 18, 30, 60)]
    advantages = StableAdvantage()(batch_of(rewards))
    assert advantages.argsort(descending=True).tolist() == [1, 2, 0, 3]
    assert not StableAdvantage()(batch_of([1.0] * 4)).any()
    unscored = StableAdvantage()(batch_of([1.0, float("nan"), 0.0]))
    assert unscored[1] == 0 and unscored[0] > 0


def test_what_is_counted():
    reward = CurriculumLengthReward(ExponentialBudget(4, 1.0, 1))
    reward.use_tokenizer(TOKENIZER)
    state = types.SimpleNamespace(global_step=0, max_steps=1)
    texts, ids = ["abc", "abcd"], [[2, 3, 4, 0], [2, 3, 4, 5]]  # the first ends by itself
    assert reward(texts, ids, state) == [0.75, 1.0]
    reward.count = "thinking"
    assert reward(["<think>ab</think>c", "none"], ids, state) == [0.5, 0.0]


def test_prompt_and_reward_have_one_budget_in_every_sample(tmp_path):
    """Over steps at which the budget falls, within a batch that is used twice; completions end at twice the budget."""
    budget, seen = ExponentialBudget(3, 0.5, 1), []

    class Watched(CurriculumLengthReward):
        def __call__(self, completions, completion_ids, trainer_state, prompts=None, **more):
            at = self.budget(trainer_state.global_step, trainer_state.max_steps)
            assert all(f"j{at}" in re.sub(r"[^j\d]", "", prompt) for prompt in prompts)
            assert max(map(len, completion_ids)) <= 2 * at
            seen.append(at)
            return super().__call__(completions, completion_ids, trainer_state, **more)

    pieces = (BudgetPrompt(budget, "{prompt}j{budget}"), Watched(budget))
    from everytoken.testing.models import tiny_llama

    model = tiny_llama(300, eos=0)
    model.generation_config.pad_token_id = 1
    trainer = made(tmp_path, *pieces, model=model, max_steps=4, num_iterations=2, steps_per_generation=1)
    trainer.train()
    assert seen == [3, 1]
    assert trainer.generation_config.max_new_tokens == 6


def test_conversations_and_ends_of_prompts():
    piece = BudgetPrompt(ExponentialBudget(8))
    row = {"prompt": [{"role": "user", "content": "What?"}]}
    assert piece(row, 0, 1)["prompt"][0]["content"] == "What? (Use exactly 8 tokens.)"
    assert row["prompt"][0]["content"] == "What?"
    assert piece({"prompt": "1+1=\n"}, 0, 1)["prompt"] == "1+1= (Use exactly 8 tokens.)\n"


def test_without_length_and_format_it_is_grpo_with_another_spread():
    recipe = CurriculumGRPO(weight_length=0.0, weight_format=0.0).recipe()
    assert not recipe.of("reward")
    assert [piece.weight for piece in CurriculumGRPO().recipe().of("reward")] == [0.3, 0.1]
    assert CurriculumGRPO().arguments()["reward_weights"] == [0.6]


def test_an_answer_is_written_behind_thinking_of_twice_the_budget():
    """The budget counts the thinking alone there, so the limit of a completion must leave room for the answer."""

    def limit(**settings):
        return CurriculumGRPO(budget_start=8, budget_end=8, **settings).recipe().of("prompt")[0].max_new_tokens(0, 1)

    assert limit() == 16
    assert limit(length_count="thinking", answer_tokens=5) == 21


def test_bad_settings():
    for changes, name in (
        ({"budget_shape": "cosine"}, "budget_shape"), ({"length_shape": "flat"}, "length_shape"),
        ({"length_count": "words"}, "length_count"), ({"weight_length": -1.0}, "weight_length"),
        ({"budget_end": 300}, "budget_end"), ({"budget_gamma": 0.0}, "gamma"),
        ({"budget_prompt": "{prompt}"}, "budget"), ({"answer_tokens": 0}, "answer_tokens"),
    ):  # fmt: skip
        with pytest.raises(BadInputError, match=name):
            CurriculumGRPO(**changes)
