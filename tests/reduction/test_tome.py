"""ToMe: conservation, identities, the log-size correction, and merging inside a real encoder."""

from __future__ import annotations

import pytest
import torch

from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.reduction.base import ReductionContext
from everytoken.reduction.seam import reduce_tokens
from everytoken.reduction.tome import ToMe, match, merge, unmerge

from .models import inputs_of, tiny


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_merging_conserves_sums_over_many_layers():
    values, sizes = draw(3, 17, 5), torch.ones(3, 17)
    total = values.sum(1)
    for seed in range(4):
        owner = match(draw(3, values.shape[1], 4, seed=seed), 3, protected=1)
        values, sizes = merge(values, sizes, owner)
        torch.testing.assert_close((values * sizes[..., None]).sum(1), total)
        assert sizes.sum(1).tolist() == [17.0] * 3
    assert values.shape[1] == 17 - 12


def test_the_best_pairs_merge_and_the_order_stays():
    metric = torch.tensor([[[1.0, 0], [0, 1], [0.9, 0.1], [1, 0], [0, -1], [0.1, 1]]])
    # even places 0, 2, 4 and odd ones 1, 3, 5: 0 fits 3 exactly, 2 fits 3 nearly, 4 fits nothing
    assert match(metric, 1)[0].tolist() == [0, 1, 2, 0, 3, 4]
    assert match(metric, 2)[0].tolist() == [0, 1, 0, 0, 2, 3]
    assert match(metric, 1, protected=1)[0].tolist() == [0, 1, 2, 2, 3, 4]
    assert match(metric, 99)[0].max() == 2  # at most half
    assert match(metric, 0)[0].tolist() == list(range(6))


def test_equal_tokens_merge_first_and_come_back():
    values = draw(1, 8, 3)
    values[0, 5] = values[0, 2]
    owner = match(values, 1)
    assert owner[0, 2] == owner[0, 5]
    merged, _ = merge(values, torch.ones(1, 8), owner)
    torch.testing.assert_close(unmerge(merged, owner), values)


def test_attention_over_merged_equal_tokens_is_exact_with_the_log_of_sizes():
    keys, query = draw(1, 6, 4), draw(4, seed=1)
    keys[0, 3] = keys[0, 0]
    values = draw(1, 6, 4, seed=2)
    values[0, 3] = values[0, 0]
    owner = match(keys, 1)
    fewer, sizes = merge(keys, torch.ones(1, 6), owner)
    fewer_values, _ = merge(values, torch.ones(1, 6), owner)
    full = (keys[0] @ query).softmax(0) @ values[0]
    logits = fewer[0] @ query
    torch.testing.assert_close((logits + sizes[0].log()).softmax(0) @ fewer_values[0], full, rtol=0, atol=1e-6)
    assert not torch.allclose(logits.softmax(0) @ fewer_values[0], full, atol=1e-3)


def test_schedules():
    assert ToMe(r=8).schedule(3) == [8, 8, 8]
    assert ToMe(r=8, inflection=1.0).schedule(3) == [0, 8, 16]
    assert ToMe(r=8, inflection=-1.0).schedule(3) == [16, 8, 0]
    assert ToMe(r=3, inflection=0.5).schedule(4) == [1, 2, 3, 5]


def test_the_pure_function():
    features = draw(10, 4)
    reduction = ToMe(r=3).reduce(features, ReductionContext())
    assert len(reduction.features) == 7 and int(reduction.sizes.sum()) == 10
    torch.testing.assert_close((reduction.features * reduction.sizes[:, None]).sum(0), features.sum(0))
    assert bool((reduction.anchors[1:] > reduction.anchors[:-1]).all())
    assert ToMe(r=0).reduce(features, ReductionContext()).features is features


@torch.no_grad()
def test_in_the_encoder_of_a_real_model():
    model = tiny("llava")
    inputs = inputs_of("llava", model)
    layers = model.model.vision_tower.encoder.layers
    with reduce_tokens(model, ToMe(r=3)) as run:
        logits = model(**inputs).logits
        model.generate(**inputs, max_new_tokens=2)
    assert [len(item.features) for item in run.last.reductions] == [16 - 2 * 3] * 3  # the second last layer's features
    assert run.last.tokens_after == 30 and bool(torch.isfinite(logits).all())
    assert all(bool((item.assignment > 0).sum(0).eq(1).all()) for item in run.last.reductions)
    assert not any("forward" in vars(layer) for layer in layers)
    plain = model(**inputs).logits
    with reduce_tokens(model, ToMe(r=0)):
        same = model(**inputs).logits
    torch.testing.assert_close(same, plain, rtol=0, atol=1e-5)


@torch.no_grad()
def test_equal_patches_merge_without_a_trace_in_the_features():
    """An image of two colours: with the log of sizes, merging equal patches changes no feature."""
    model = tiny("llava")
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[..., 16:] = 1.0
    table = model.model.vision_tower.embeddings.position_embedding.weight
    before = table.clone()
    table[1:] = table[1:2]  # without positions patches of one colour are equal
    try:
        arguments = dict(vision_feature_layer=-2, vision_feature_select_strategy="default", return_dict=True)
        plain = model.model.get_image_features(pixels, **arguments).pooler_output[0]
        with ToMe(r=4).inside(model) as merged:
            fewer = model.model.get_image_features(pixels, **arguments).pooler_output[0]
        groups = merged.reduction(0, fewer).groups()
        torch.testing.assert_close(fewer[groups], plain, rtol=0, atol=1e-4)
        with ToMe(r=4, proportional=False).inside(model) as merged:
            other = model.model.get_image_features(pixels, **arguments).pooler_output[0]
        assert not torch.allclose(other[merged.reduction(0, other).groups()], plain, atol=1e-3)
    finally:
        table.copy_(before)


def test_refusals():
    for bad in ({"r": -1}, {"inflection": 2.0}):
        with pytest.raises(BadInputError):
            ToMe(**bad)
    with pytest.raises(UnsupportedModelError, match="one key a feature; InternVL"):
        with reduce_tokens(tiny("internvl"), ToMe()):
            pass
