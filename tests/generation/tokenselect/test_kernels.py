"""Compiled pieces against plain definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers.models.llama.modeling_llama as llama
from hypothesis import given
from hypothesis import strategies as st

from everytoken.generation.tokenselect.attention import Extras, Rotation, _attend, find_rotary
from everytoken.generation.tokenselect.kernels import attend_rotated, top_indices

from ...conftest import tiny_llama


@given(seed=st.integers(0, 10_000), size=st.integers(1, 400), kind=st.sampled_from(["plain", "ties", "tiny", "zeros"]))
def test_top_indices_are_the_largest(seed, size, kind):
    rng = np.random.default_rng(seed)
    values = rng.random(size).astype(np.float32)
    if kind == "ties":
        values = np.round(values * 4).astype(np.float32)
    elif kind == "tiny":
        values = (values * 1e-39).astype(np.float32)
    elif kind == "zeros":
        values[rng.random(size) < 0.9] = 0
    k = int(rng.integers(1, size + 1))
    chosen = top_indices(values, k)
    assert len(chosen) == k
    assert (np.diff(chosen) > 0).all()
    rest = np.delete(values, chosen)
    assert not len(rest) or values[chosen].min() >= rest.max()


@pytest.mark.parametrize("groups", [1, 3])
def test_compiled_attention_equals_torchs(groups):
    torch.manual_seed(0)
    model = tiny_llama(13, hidden=64)
    rotation = Rotation(find_rotary(model), llama.apply_rotary_pos_emb)
    assert rotation.compiled
    query, keys, values = torch.randn(1, 2 * groups, 1, 16), torch.randn(1, 2, 90, 16), torch.randn(1, 2, 90, 16)
    kept = torch.randperm(90)[:40].sort().values
    expected = _attend(rotation, query, keys[:, :, kept], values[:, :, kept], Extras(0.25))[0, :, 0]
    turned = rotation(query, 39)[0, :, 0].unflatten(0, (2, groups)).numpy()
    cos, sin = (part[0].numpy() for part in rotation.table)
    for head in range(2):
        got = attend_rotated(turned[head], keys[0, head, kept].numpy(), values[0, head, kept].numpy(), cos, sin, 0.25)
        assert torch.allclose(torch.from_numpy(got), expected[head * groups : (head + 1) * groups], atol=1e-5)
