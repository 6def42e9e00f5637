"""The algebra of strategies through the one contract, the package token, and costs."""

from __future__ import annotations

import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.reduction.base import ReductionContext, combination, selection
from everytoken.reduction.divprune import DivPrune
from everytoken.reduction.measure import cache_bytes, prefill_flops
from everytoken.reduction.package import with_package
from everytoken.reduction.seam import reduce_tokens

from .models import inputs_of, llama, tiny

FEATURES = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))


def one_hot(rows):
    return torch.nn.functional.one_hot(torch.tensor(rows), 8).float()


def test_selection_is_merging_with_singletons_and_distillation_with_one_hot_attention():
    kept = torch.tensor([1, 4, 6])
    chosen = selection(FEATURES, kept)
    merged = combination(FEATURES, one_hot([1, 4, 6]), torch.ones(3))
    assert torch.equal(merged.features, chosen.features) and torch.equal(merged.anchors, chosen.anchors)
    assert torch.equal(merged.groups(), chosen.groups())
    sharp = torch.softmax(1e4 * one_hot([1, 4, 6]), -1)
    torch.testing.assert_close(combination(FEATURES, sharp, torch.ones(3)).features, chosen.features)


def test_pooling_is_merging_with_a_fixed_partition():
    pooled = torch.nn.functional.avg_pool1d(FEATURES.T[None], 4)[0].T
    member = torch.eye(2).repeat_interleave(4, 1) / 4
    merged = combination(FEATURES, member, torch.full((2,), 4))
    torch.testing.assert_close(merged.features, pooled)
    assert merged.anchors.tolist() == [0, 4]


def test_overlapping_parts_are_spread_evenly():
    everything = combination(FEATURES, torch.full((2, 8), 1 / 8), torch.full((2,), 8))
    assert everything.anchors.tolist() == [2, 6]


def test_the_package_token():
    chosen = selection(FEATURES, torch.tensor([0, 5, 7]))
    packed = with_package(FEATURES, chosen)
    assert packed.anchors.tolist() == [0, 5, 6, 7]  # at the place of the last dropped token
    torch.testing.assert_close(packed.features[2], FEATURES[[1, 2, 3, 4, 6]].mean(0))
    assert torch.equal(packed.features[[0, 1, 3]], chosen.features)
    assert packed.sizes.tolist() == [1, 1, 5, 1]
    weights = torch.zeros(8)
    weights[3] = 2.0
    torch.testing.assert_close(with_package(FEATURES, chosen, weights).features[2], FEATURES[3])
    whole = selection(FEATURES, torch.arange(8))
    assert with_package(FEATURES, whole) is whole  # nothing dropped: no package
    with pytest.raises(BadInputError, match="zero"):
        with_package(FEATURES, chosen, torch.zeros(8))
    with pytest.raises(BadInputError, match="selection"):
        with_package(FEATURES, packed)


@torch.no_grad()
def test_a_reducer_with_a_package_runs_in_a_model():
    class Soft(DivPrune):
        def reduce(self, features, context: ReductionContext):
            return with_package(features, super().reduce(features, context))

    model = tiny("llava")
    with reduce_tokens(model, Soft(keep=0.25)) as run:
        model.generate(**inputs_of("llava", model), max_new_tokens=1)
    assert [len(item.features) for item in run.last.reductions] == [5, 5, 5]


def test_costs():
    config = llama(layers=2)  # width 32, FFN 48, 2 key heads of 8
    one = 4 * 10 * 32**2 + 2 * 100 * 32 + 3 * 10 * 32 * 48
    assert prefill_flops(config, [10]) == 2 * one
    half = 4 * 5 * 32**2 + 2 * 25 * 32 + 3 * 5 * 32 * 48
    assert prefill_flops(config, [10, 5]) == one + half
    assert cache_bytes(config, [10, 5]) == 2 * 4 * 2 * 8 * 15
    with pytest.raises(BadInputError, match="2 layers"):
        prefill_flops(config, [1, 2, 3])
