"""Discounted sums against a double loop, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.core import credit


def brute_force(values, gamma):
    length = values.shape[-1]
    columns = []
    for t in range(length):
        columns.append(sum(gamma ** (i - t) * values[..., i] for i in range(t, length)))
    return torch.stack(columns, -1)


@given(
    length=st.integers(1, 40),
    gamma=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
    seed=st.integers(0, 100),
    block=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_equals_a_double_loop_in_value_and_gradient(length, gamma, seed, block):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, 3, length, generator=generator, dtype=torch.float64).requires_grad_(True)
    weights = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    before, credit.BLOCK = credit.BLOCK, block
    try:
        found = credit.discounted_sums(values, gamma)
    finally:
        credit.BLOCK = before
    expected = brute_force(values, gamma) if gamma else values.clone()
    assert torch.allclose(found, expected)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), values, retain_graph=True)[0] for x in (found, expected))
    assert torch.allclose(ours, theirs)


def test_gamma_one_is_a_reversed_cumulative_sum_and_long_rows_stay_finite():
    values = torch.rand(2, 5000)
    assert torch.allclose(credit.discounted_sums(values, 1.0), values.flip(-1).cumsum(-1).flip(-1), rtol=1e-4)
    assert credit.discounted_sums(values, 0.5).isfinite().all()
    assert credit.discounted_sums(values, 0.5)[:, 0].max() <= 2
    assert credit.discounted_sums(torch.zeros(3, 0), 0.9).shape == (3, 0)
    with pytest.raises(IndexError):
        credit.discounted_sums(torch.zeros(()), 0.9)
