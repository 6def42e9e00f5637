"""Grouped weights: exact for what GGUF files hold, the nearest steps for everything else."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from everytoken.core.errors import UnsupportedModelError
from everytoken.core.grouped.weights import group_weight


def random_weights(rows=24, columns=96, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q4_1", 4), ("Q8_0", 8)])
def test_the_weights_of_a_gguf_file_come_back_bit_by_bit(kind, bits):
    kind = gguf.GGMLQuantizationType[kind]
    stored = gguf.dequantize(gguf.quantize(random_weights(), kind), kind)
    grouped = group_weight(torch.from_numpy(stored), bits)
    assert grouped.exact == 1
    assert torch.equal(grouped.dequantised(), torch.from_numpy(stored))


def test_groups_that_leave_steps_out_are_exact_too():
    """Steps of a quarter, of which a group uses 0 to 9 only; and a group of one value."""
    numbers = np.random.default_rng(1).integers(0, 10, (8, 64))
    numbers[:, 0], numbers[:, 1], numbers[:, 32:] = 0, 9, 3
    values = torch.from_numpy((numbers * 0.25 - 1).astype(np.float32))
    grouped = group_weight(values)
    assert grouped.exact == 1 and torch.equal(grouped.dequantised(), values)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 8, 21])
def test_other_weights_go_to_the_nearest_step(bits, rows):
    values = torch.from_numpy(random_weights(rows, 64))
    grouped = group_weight(values, bits)
    groups = values.reshape(rows, 2, 32)
    step = (groups.amax(-1) - groups.amin(-1)) / 15 if bits == 4 else groups.abs().amax(-1) / 127
    error = (grouped.dequantised() - values).reshape(rows, 2, 32).abs().amax(-1)
    assert grouped.dequantised().shape == values.shape
    assert bool((error <= 0.51 * step + 2e-3 * groups.abs().amax(-1)).all())


def test_rows_that_do_not_fall_into_groups_are_refused():
    with pytest.raises(UnsupportedModelError, match="groups of 32"):
        group_weight(torch.zeros(8, 48))
