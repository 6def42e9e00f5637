"""Token correlation: the sheet's numbers, the law of the draws, and a real encoder."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.stats import chisquare

from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.reduction.base import ReductionContext
from everytoken.reduction.inputs import reduce_inputs
from everytoken.reduction.seam import reduce_tokens
from everytoken.reduction.token_correlation import (
    CorrelationCompressor,
    gumbel_top_m,
    information_density,
    summary_correlation,
    upper_outliers,
)

from .models import inputs_of, tiny

KEYS = torch.tensor([[1, 0], [1, 0.05], [1, -0.05], [0, 1], [-1, 0], [-1, 0.02], [0, -1], [0.7, 0.7]])


def test_the_worked_examples():
    density, neighbors = information_density(KEYS, 0.9, 1)
    assert neighbors.tolist() == [2, 2, 2, 0, 1, 1, 0, 0]
    assert density == pytest.approx(0.375)
    assert information_density(KEYS, 0.9, 2)[0] == pytest.approx(0.625)
    values = torch.tensor([0.02, 0.03, 0.025, 0.03, 0.02, 0.40, 0.03, 0.445])
    assert upper_outliers(values).tolist() == [5, 7]
    assert upper_outliers(3 * values + 1).tolist() == [5, 7]
    assert upper_outliers(torch.ones(9)).tolist() == []


def test_densities():
    assert information_density(torch.ones(9, 3))[0] == 0
    assert information_density(torch.eye(5))[0] == 1
    assert information_density(torch.eye(4).repeat(3, 1))[0] == 0
    keys = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    found = [information_density(keys, threshold)[0] for threshold in (0.2, 0.5, 0.8, 0.99, 1.1)]
    assert found == sorted(found) and found[-1] == 1
    assert information_density(keys, 0.8, 2)[0] >= information_density(keys, 0.8, 1)[0]
    scales = torch.rand(40, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    assert information_density((keys * scales).flip(0), 0.8)[0] == information_density(keys, 0.8)[0]
    heads = keys.view(40, 1, 3).transpose(0, 1)
    assert information_density(heads, 0.8)[0] == information_density(keys, 0.8)[0]


def test_correlation_is_a_distribution():
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(2, 4, generator=generator), torch.randn(2, 9, 4, generator=generator)
    found = summary_correlation(query, keys)
    assert float(found.sum()) == pytest.approx(1, abs=1e-6)
    by_hand = torch.stack([torch.softmax(keys[h] @ query[h] / 2, 0) for h in range(2)]).mean(0)
    torch.testing.assert_close(found, by_hand)


def test_draws_without_replacement_have_the_right_law():
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    draws = [tuple(gumbel_top_m(weights, 2, generator).tolist()) for _ in range(2000)]
    expected = {
        (i, j): float(weights[i] * weights[j] / (1 - weights[i])) for i, j in itertools.permutations(range(3), 2)
    }
    observed = [draws.count(pair) for pair in expected]
    assert chisquare(observed, [2000 * share for share in expected.values()]).pvalue > 1e-3
    inclusion = [sum(item in pair for pair in draws) / 2000 for item in range(3)]
    assert inclusion == pytest.approx([0.839286, 0.675, 0.485714], abs=0.035)
    assert sorted(gumbel_top_m(weights, 3, generator).tolist()) == [0, 1, 2]


def context(total=20, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return ReductionContext(
        cls_queries=(draw(2, 4), draw(2, 4)), keys=(draw(2, total, 4) * spread + 1, draw(2, total, 4))
    )


def test_what_is_kept_is_outliers_and_draws_in_order():
    features = torch.randn(20, 6, generator=torch.Generator().manual_seed(3))
    method = CorrelationCompressor(threshold=0.8)
    reduction = method.reduce(features, context())
    density, _ = information_density(context().keys[0], 0.8)
    outliers = upper_outliers(summary_correlation(context().cls_queries[1], context().keys[1]))
    assert set(outliers.tolist()) <= set(reduction.kept.tolist())
    assert len(reduction.kept) == min(20, len(outliers) + max(4, round(density * 20)))
    assert reduction.kept.tolist() == sorted(set(reduction.kept.tolist()))
    assert torch.equal(method.reduce(features, context()).kept, reduction.kept)  # the same crop, the same draw
    other = CorrelationCompressor(threshold=0.8, seed=1).reduce(features, context()).kept
    assert not torch.equal(other, reduction.kept)
    top = CorrelationCompressor(threshold=0.8, strategy="topk").reduce(features, context()).kept
    low = summary_correlation(context().cls_queries[0], context().keys[0])
    rest = [index for index in range(20) if index not in outliers.tolist()]
    local = sorted(rest, key=lambda index: -float(low[index]))[: len(top) - len(outliers)]
    assert top.tolist() == sorted([*outliers.tolist(), *local])


def test_both_ends():
    features = torch.randn(20, 6)
    assert torch.equal(CorrelationCompressor(threshold=1.0).reduce(features, context()).features, features)
    constant = ReductionContext(cls_queries=(torch.ones(2, 4),) * 2, keys=(torch.ones(2, 20, 4),) * 2)
    assert len(CorrelationCompressor().reduce(features, constant).kept) == 4  # the fewest, and no outlier
    spike = torch.zeros(2, 20, 4)
    spike[:, :8] = 3.0  # eight equal values above twelve equal ones: quartiles differ, none is an outlier
    few = ReductionContext(cls_queries=(torch.ones(2, 4),) * 2, keys=(torch.ones(2, 20, 4), spike))
    assert len(CorrelationCompressor().reduce(features, few).kept) == 4
    spike[:, 3:8] = 0.0  # three above seventeen: the quartiles agree, at most a tenth counts
    assert len(CorrelationCompressor().reduce(features, few).kept) == 4 + 2


def test_merging_conserves_what_is_dropped():
    features = torch.randn(20, 6)
    reduction = CorrelationCompressor(threshold=0.8, merge=True).reduce(features, context())
    torch.testing.assert_close((reduction.features * reduction.sizes[:, None]).sum(0), features.sum(0))
    assert int(reduction.sizes.sum()) == 20
    plain = CorrelationCompressor(threshold=0.8).reduce(features, context())
    assert torch.equal(reduction.anchors, plain.kept)
    whole = CorrelationCompressor(threshold=1.0, merge=True).reduce(features, context())
    assert torch.equal(whole.features, features)


@torch.no_grad()
def test_in_a_real_model_the_rows_are_those_of_the_encoder():
    model = tiny("llava")
    inputs = inputs_of("llava", model)
    tower = model.model.vision_tower
    hidden = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    method = CorrelationCompressor(threshold=0.5, strategy="topk", low_layer=0, high_layer=-1)
    batch = reduce_inputs(model, method, inputs)
    pieces = model.model.get_image_features(
        inputs["pixel_values"], vision_feature_layer=-2, vision_feature_select_strategy="default", return_dict=True
    ).pooler_output
    for image, reduction in enumerate(batch.reductions):
        queries, keys = [], []
        for number in (0, 2):
            layer = tower.encoder.layers[number]
            normed = layer.layer_norm1(hidden[number][image])
            split = lambda x: x.view(-1, 2, 16).transpose(0, 1)  # noqa: E731
            queries.append(split(layer.self_attn.q_proj(normed))[:, 0])
            keys.append(split(layer.self_attn.k_proj(normed))[:, 1:])
        expected = method.reduce(pieces[image], ReductionContext(cls_queries=tuple(queries), keys=tuple(keys)))
        assert torch.equal(reduction.kept, expected.kept)
    alone = {name: value[1:] for name, value in inputs.items()} | {"pixel_values": inputs["pixel_values"][2:]}
    single = reduce_inputs(model, method, alone)
    assert torch.equal(single.reductions[0].kept, batch.reductions[2].kept)
    with reduce_tokens(model, method):
        assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2


def test_refusals():
    for name in ("smolvlm", "qwen2_vl", "llava_next"):
        with pytest.raises(UnsupportedModelError, match="summary token"):
            with reduce_tokens(tiny(name), CorrelationCompressor()):
                pass
    with pytest.raises(BadInputError, match="two encoder layers"):
        CorrelationCompressor().reduce(torch.randn(4, 3), ReductionContext())
    with pytest.raises(BadInputError, match="20 patches"):
        CorrelationCompressor().reduce(torch.randn(4, 3), context())
    with pytest.raises(BadInputError, match="no layer 9"):
        CorrelationCompressor(low_layer=9).encoder_layers(4)
    assert CorrelationCompressor().encoder_layers(24) == (6, 22)
    for bad in ({"strategy": "best"}, {"min_neighbors": 0}, {"min_keep": 2.0}):
        with pytest.raises(BadInputError):
            CorrelationCompressor(**bad)
