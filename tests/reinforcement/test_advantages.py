"""Advantages by brute force: the recursion of GAE, returns to go, a double loop over groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.reinforcement.advantages import gae, group_advantages, last_token, whiten

SEEDS = st.integers(0, 300)


def problem(seed, batch=4, length=7):
    """Token rewards ``[B, T]``, 0 outside the mask, sequence rewards ``[B]``, and the mask: contiguous tokens, some
    rows empty.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, length + 1, (batch,), generator=generator)
    mask = torch.arange(length) < lengths[:, None]
    rewards = torch.randn(batch, length, generator=generator) * mask
    return rewards, 20 * torch.randn(batch, generator=generator), mask


def test_the_last_token_is_the_last_unmasked_one():
    mask = torch.tensor([[True, True, False, False], [False] * 4, [True, False, True, False]])
    assert last_token(mask).tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]


@given(seed=SEEDS, gamma=st.sampled_from([0.9, 1.0]), lam=st.sampled_from([0.0, 0.95, 1.0]))
@settings(max_examples=60, deadline=None)
def test_gae_by_the_recursion_and_returns_to_go(seed, gamma, lam):
    rewards, _, mask = problem(seed)
    values = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed + 1))
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row in range(len(mask)):
        running = 0.0
        to_go = 0.0
        for t in reversed(range(mask.shape[1])):
            if not mask[row, t]:
                assert advantages[row, t] == returns[row, t] == 0
                continue
            following = values[row, t + 1].item() if t + 1 < mask.shape[1] and mask[row, t + 1] else 0.0
            running = rewards[row, t].item() + gamma * following - values[row, t].item() + gamma * lam * running
            to_go = rewards[row, t].item() + gamma * to_go
            assert advantages[row, t].item() == pytest.approx(running, abs=1e-3)
            if lam == 1.0:  # the return to go, whatever the critic
                assert returns[row, t].item() == pytest.approx(to_go, abs=1e-3)


def test_whitening():
    values, mask = torch.randn(5, 9) * 3 + 2, torch.rand(5, 9) < 0.6
    found = whiten(values, mask)
    assert found[mask].mean().abs() < 1e-5
    assert found[mask].std(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert (found[~mask] == 0).all()
    assert torch.equal(whiten(torch.ones(2, 3), torch.ones(2, 3)), torch.zeros(2, 3))


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_group_advantages(seed):
    _, reward, mask = problem(seed, batch=8)
    none = torch.zeros(mask.shape)
    plain = group_advantages(none, reward, mask, 4)
    groups = reward.view(2, 4)
    expected = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(8, 1) * mask
    assert torch.allclose(plain, expected, atol=1e-5)  # without token rewards this is GRPO
    # token rewards: return to go less the group's mean return to go, by a double loop
    shaping = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed)) * mask
    found = group_advantages(shaping, reward, mask, 4, gamma=0.9, scale=False)
    for row in range(8):
        group = range(4 * (row // 4), 4 * (row // 4) + 4)
        for t in range(mask.shape[1]):
            to_go = {
                j: sum(0.9 ** (i - t) * shaping[j, i].item() for i in range(t, mask.shape[1])) if mask[j, t] else 0.0
                for j in group
            }
            value = to_go[row] - sum(to_go.values()) / 4 + (reward[row] - reward[list(group)].mean()).item()
            assert found[row, t].item() == pytest.approx(value if mask[row, t] else 0.0, abs=1e-4)
    # all alike: zero, never NaN
    same = group_advantages(torch.ones(mask.shape) * mask[:1], torch.ones(8), mask[:1].expand(8, -1), 4)
    assert torch.equal(same, torch.zeros_like(same))
