"""D3S: the scan against all subsets, the printed example, and what the selections keep."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.core.errors import BadInputError
from everytoken.reinforcement.d3s import (
    D3S,
    AdvantageEntropyTokens,
    LinearSchedule,
    MaxVarianceRollouts,
    max_variance_subset,
)

from .common import batch_of

SEEDS = st.integers(0, 500)


@given(seed=SEEDS, count=st.integers(2, 10), keep=st.integers(2, 10), ties=st.booleans())
@settings(max_examples=80)
def test_the_scan_finds_the_largest_variance(seed, count, keep, ties):
    keep = min(keep, count)
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)).double()
    values = values.round() if ties else values
    chosen = max_variance_subset(values, keep)
    assert chosen.sum() == keep
    best = max(values[list(rows)].var(correction=0).item() for rows in itertools.combinations(range(count), keep))
    assert values[chosen].var(correction=0).item() == pytest.approx(best, abs=1e-9)
    # with the sample variance the best subset is never below the whole; with the population variance it can be
    assert values[chosen].var().item() >= values.var().item() - 1e-9


def test_the_population_variance_of_a_subset_can_be_smaller():
    values = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    assert values[max_variance_subset(values, 3)].var(correction=0).item() == pytest.approx(8 / 9)


REWARDS = torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 1, 0], [0.0, 0, 0, 0]])


def example():
    spread = REWARDS.std(1, correction=0, keepdim=True)
    advantages = ((REWARDS - REWARDS.mean(1, keepdim=True)) / spread.clamp(min=1e-9)).flatten()
    return batch_of(REWARDS.flatten(), group=4), advantages[:, None].expand(-1, 3)


@pytest.mark.parametrize(("keep", "variance"), [(2, 3.0), (4, 1.6667), (6, 1.2222), (8, 1.0)])
def test_the_printed_example(keep, variance):
    batch, advantages = example()
    piece = MaxVarianceRollouts(LinearSchedule(keep / 12, 1.0))
    chosen = piece(batch, advantages)
    assert chosen.sum() == keep
    assert piece.metrics["advantage_variance"] == pytest.approx(variance, abs=1e-4)
    if keep <= 8:
        assert piece.metrics["useful_rollouts"] == 1.0
    if keep == 2:
        assert sorted(advantages[chosen, 0].tolist()) == pytest.approx([-math.sqrt(3), math.sqrt(3)], abs=1e-4)


def test_binary_rewards_are_taken_half_and_half_and_groups_by_themselves():
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 1])
    advantages = (rewards - rewards.mean())[:, None].expand(-1, 3)
    chosen = MaxVarianceRollouts(LinearSchedule(0.5, 1.0))(batch_of(rewards), advantages)
    assert rewards[chosen].sum() == 2
    piece = MaxVarianceRollouts(LinearSchedule(0.5, 1.0), scope="group")
    assert piece(batch_of(rewards, group=4), advantages).view(2, 4).sum(1).tolist() == [2, 2]


def test_rollouts_without_advantage():
    """They can be chosen where the signs are unbalanced, unless they are dropped beforehand."""
    values = torch.tensor([2.0, 2.0, 2.0, -0.01, 0.0, 0.0, 0.0, 0.0])
    batch, advantages, share = batch_of(values), values[:, None].expand(-1, 3), LinearSchedule(0.5, 1.0)
    assert sorted(values[MaxVarianceRollouts(share)(batch, advantages)].tolist()) == pytest.approx([-0.01, 0, 2, 2])
    dropped = MaxVarianceRollouts(share, drop_zero_advantage=True)(batch, advantages)
    assert sorted(values[dropped].tolist()) == pytest.approx([-0.01, 2, 2, 2])
    assert not MaxVarianceRollouts(share)(batch, torch.zeros(8, 3)).any()


def test_ties_are_drawn_anew_every_step_and_the_same_twice():
    rewards = torch.tensor([1.0, 0] * 16)
    advantages = (rewards - 0.5)[:, None].expand(-1, 3)
    piece = MaxVarianceRollouts(LinearSchedule(0.25, 0.25))
    one, again, other = (piece(batch_of(rewards, step=step), advantages) for step in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)


@given(seed=SEEDS, share=st.sampled_from([0.01, 0.1, 0.3, 0.5, 1.0]), scope=st.sampled_from(["batch", "response"]))
@settings(max_examples=60)
def test_tokens(seed, share, scope):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 9, (6,), generator=generator).clamp(max=8)
    lengths[0] = 8
    batch = batch_of(torch.zeros(6), lengths, 8, entropies=torch.rand(6, 8, generator=generator))
    advantages = torch.randn(6, 8, generator=generator)
    kept = batch.mask.clone()
    kept[1] = False
    piece = AdvantageEntropyTokens(LinearSchedule(share, share), scope)
    chosen = piece(batch, advantages, kept)
    assert not (chosen & ~kept).any()
    keys = advantages.abs() * batch.entropies
    for rows in [list(range(6))] if scope == "batch" else [[row] for row in range(6)]:
        inside, outside = chosen[rows], kept[rows] & ~chosen[rows]
        assert inside.sum() == math.ceil(round(share * int(kept[rows].sum()), 9))
        if inside.any() and outside.any():
            assert keys[rows][inside].min() >= keys[rows][outside].max()
    assert torch.equal(piece(batch, -3 * advantages, kept), chosen)
    batch.entropies = 2 * batch.entropies
    assert torch.equal(piece(batch, advantages, kept), chosen)


def test_where_no_entropy_is_left_the_advantage_decides():
    batch = batch_of([0.0, 0.0], entropies=torch.zeros(2, 3))
    advantages = torch.tensor([[1.0, 1, 1], [-3, -3, -3]])
    chosen = AdvantageEntropyTokens(LinearSchedule(0.5, 0.5))(batch, advantages, batch.mask)
    assert chosen.tolist() == [[False] * 3, [True] * 3]


def test_the_schedule_and_what_keeps_all():
    schedule = LinearSchedule(0.25, 0.75)
    found = [schedule(progress) for progress in (0.0, 0.5, 1.0)]
    assert found == [0.25, 0.5, 0.75]
    batch, advantages = example()
    batch.entropies = torch.rand(12, 3)
    rollouts, tokens = D3S(1.0, 1.0, 1.0, 1.0).recipe().pieces
    assert rollouts(batch, advantages).all() and tokens(batch, advantages, batch.mask).all()
    assert MaxVarianceRollouts(LinearSchedule(1e-3, 1.0))(batch, advantages).sum() == 2  # one has no variance


def test_bad_settings():
    for changes, name in (
        ({"rollouts_start": 0.0}, "Shares"), ({"tokens_end": 1.5}, "Shares"), ({"scope": "world"}, "scope"),
        ({"token_scope": "group"}, "token_scope"), ({"divisor": "none"}, "divisor"),
    ):  # fmt: skip
        with pytest.raises(BadInputError, match=name):
            D3S(**changes)
