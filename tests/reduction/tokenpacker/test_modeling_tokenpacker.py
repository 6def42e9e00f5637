"""TokenPacker's projector against full attention under a block mask, and the sheet's identities."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from everytoken.core.errors import BadInputError
from everytoken.reduction.tokenpacker.configuration_tokenpacker import TokenPackerConfig
from everytoken.reduction.tokenpacker.modeling_tokenpacker import (
    TokenPackerProjector,
    from_regions,
    into_regions,
    pooled_queries,
)

C, D, LEVELS = 8, 6, (1, 2, 3)


def projector(grid=4, scale=2, sharp=True, **settings):
    torch.manual_seed(0)
    config = TokenPackerConfig(C, D, grid, scale, LEVELS, **settings)
    made = TokenPackerProjector(config).eval()
    if sharp:  # weights of std 0.02 would hide every difference
        with torch.no_grad():
            for weight in made.parameters():
                if weight.dim() > 1:
                    weight.normal_(0, 0.5)
    return made


def levels(grid=4, batch=2, seed=1):
    return torch.randn(batch, grid * grid, len(LEVELS) * C, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("shape", "scale"), [((4, 4), 2), ((6, 6), 3), ((6, 6), 2), ((6, 6), 6), ((4, 6), 2), ((3, 3), 1)]
)
def test_regions_are_those_of_a_double_loop(shape, scale):
    x = torch.randn(2, shape[0] * shape[1], 3)
    found = into_regions(x, shape, scale)
    image, wanted = x.reshape(2, *shape, 3), []
    for a in range(shape[0] // scale):
        for b in range(shape[1] // scale):
            block = image[:, a * scale : (a + 1) * scale, b * scale : (b + 1) * scale]
            wanted.append(block.reshape(2, scale * scale, 3))
    assert torch.equal(found, torch.stack(wanted, 1))
    assert torch.equal(from_regions(found, shape, scale), x)


def test_what_interpolation_means_at_each_scale():
    x = torch.randn(1, 144, 3)
    image = x.reshape(1, 12, 12, 3)
    two = image.reshape(1, 6, 2, 6, 2, 3).mean((2, 4)).reshape(1, 36, 3)
    assert torch.allclose(pooled_queries(x, (12, 12), 2, "bilinear"), two, atol=1e-6)
    assert torch.allclose(pooled_queries(x, (12, 12), 3, "bilinear"), image[:, 1::3, 1::3].reshape(1, 16, 3), atol=1e-6)
    four = image.reshape(1, 3, 4, 3, 4, 3)[:, :, 1:3, :, 1:3].mean((2, 4)).reshape(1, 9, 3)
    assert torch.allclose(pooled_queries(x, (12, 12), 4, "bilinear"), four, atol=1e-6)
    three = image.reshape(1, 4, 3, 4, 3, 3).mean((2, 4)).reshape(1, 16, 3)
    assert torch.allclose(pooled_queries(x, (12, 12), 3, "mean"), three, atol=1e-6)
    assert pooled_queries(x.bfloat16(), (12, 12), 2, "bilinear").dtype == torch.bfloat16


@pytest.mark.parametrize("heads", [1, 2])
def test_it_equals_full_attention_under_a_block_mask_in_value_and_gradient(heads):
    """The oracle: every query over all keys, those of other regions masked out, written with plain softmax."""
    made, z = projector(num_heads=heads), levels().requires_grad_()
    ours = made(z)
    outer = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (our_gradient,) = torch.autograd.grad(ours, z, outer)
    x, attention = z[..., -C:], made.attention
    queries = made.norm_query(made.query(pooled_queries(x, (4, 4), 2, "bilinear")))
    keys, values = made.norm_key(made.key(z)), made.norm_value(made.value(z))
    parts = [
        F.linear(item, weight, bias).reshape(2, -1, heads, C // heads).transpose(1, 2)
        for item, weight, bias in zip(
            (queries, keys, values), attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
        )
    ]
    rows, columns = torch.arange(16) // 4, torch.arange(16) % 4
    owner = (rows // 2) * 2 + columns // 2
    scores = parts[0] @ parts[1].transpose(-1, -2) / (C // heads) ** 0.5
    scores = scores.masked_fill(owner[None] != torch.arange(4)[:, None], -torch.inf)
    mixed = (scores.softmax(-1) @ parts[2]).transpose(1, 2).reshape(2, 4, C)
    theirs = made.exit(attention.out_proj(mixed))
    (their_gradient,) = torch.autograd.grad(theirs, z, outer)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(our_gradient, their_gradient, atol=1e-5)


def test_a_feature_reaches_the_token_that_owns_it_and_no_other():
    made, z = projector(), levels(batch=1)
    for position, owner in ((15, 3), (0, 0), (6, 1), (9, 2)):
        moved = z.clone()
        moved[0, position, : 2 * C] += 1  # levels that only keys and values read
        differs = (made(moved) - made(z)).abs().amax(-1)[0] > 1e-6
        assert differs.nonzero().flatten().tolist() == [owner]


def test_at_scale_3_a_query_reads_the_centre_alone():
    made, z = projector(grid=6, scale=3), levels(6, batch=1)
    x = z[..., -C:]
    edge, centre = x.clone(), x.clone()
    edge[0, 0] += 1
    centre[0, 7] += 1
    assert torch.equal(made(edge, z), made(x, z))
    assert not torch.allclose(made(centre, z), made(x, z))


def test_at_scale_1_the_query_does_not_matter():
    made, z = projector(scale=1), levels()
    assert torch.equal(made(torch.randn(2, 16, C), z), made(torch.randn(2, 16, C), z))


def test_positions_inside_a_region_have_no_order():
    made, z = projector(), levels(batch=1)
    moved = z.clone()
    moved[0, [0, 1, 4, 5], :] = z[0, [5, 0, 1, 4], :]
    x = z[..., -C:]
    assert torch.allclose(made(x, moved), made(x, z), atol=1e-6)


def test_equal_features_are_their_values_projection_for_any_query():
    made = projector()
    z = levels(batch=1)[:, :1].expand(-1, 16, -1)
    first, weights = made.packed(torch.randn(1, 16, C), z, need_weights=True)
    second = made(torch.randn(1, 16, C), z)
    assert torch.allclose(weights, torch.full((1, 4, 4), 0.25), atol=1e-6)
    value = made.norm_value(made.value(z[:, :1]))
    _, _, weight = made.attention.in_proj_weight.chunk(3)
    _, _, bias = made.attention.in_proj_bias.chunk(3)
    wanted = made.exit(made.attention.out_proj(F.linear(value, weight, bias)))
    assert torch.allclose(first, wanted.expand_as(first), atol=1e-5) and torch.allclose(first, second, atol=1e-6)


def test_images_do_not_see_each_other_and_levels_may_be_given_apart():
    made, z = projector(), levels(batch=3)
    assert torch.allclose(made(z)[1], made(z[1:2])[0], atol=1e-6)
    assert torch.equal(made(z), made(z[..., -C:], z))
    wide = levels(4, 1)[:, :8]
    assert made(wide, shape=(2, 4)).shape == (1, 2, D)


def test_sizes_of_the_paper():
    with torch.device("meta"):
        paper = TokenPackerProjector(TokenPackerConfig())
    assert sum(weight.numel() for weight in paper.parameters()) == 36_722_688
    assert paper.config.num_heads == 8 and paper.config.num_tokens == 144
    c, d, e, n = C, D, C, len(LEVELS)
    formula = e * c + 2 * (n * c * e + e + e * e + e) + 6 * e + (4 * e * e + 4 * e) + (e * d + d) + (d * d + d)
    assert sum(weight.numel() for weight in projector().parameters()) == formula


def test_weights_start_as_in_the_paper():
    made = projector(sharp=False, width=64)
    for name, weight in made.named_parameters():
        if "in_proj_weight" in name:
            assert 0.05 < weight.std() < 0.15  # Xavier
        elif "norm" in name and name.endswith("weight"):
            assert (weight == 1).all()
        elif weight.dim() > 1:
            assert weight.std().item() == pytest.approx(0.02, rel=0.3)
        else:
            assert not weight.any()


def test_it_is_saved_and_loaded_whole(tmp_path):
    made, z = projector(query_pool="mean"), levels()
    made.save_pretrained(tmp_path)
    again = TokenPackerProjector.from_pretrained(tmp_path, use_safetensors=True).eval()
    assert torch.equal(again(z), made(z)) and again.config.query_pool == "mean"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"grid": 4, "scale": 3}, "1, 2, 4"),
        ({"scale": 0}, "1 or more"),
        ({"num_heads": 3}, "do not divide"),
        ({"query_pool": "max"}, "bilinear, mean"),
    ],
)
def test_sizes_that_cannot_be(settings, words):
    with pytest.raises(BadInputError, match=words):
        projector(**settings)


def test_features_that_cannot_be():
    made = projector()
    with pytest.raises(BadInputError, match="vision_feature_layer"):
        made(torch.zeros(1, 16, C))
    with pytest.raises(BadInputError, match="no grid of 4 x 4"):
        made(torch.zeros(1, 17, 3 * C))
    with pytest.raises(BadInputError, match="do not tile"):
        made(torch.zeros(1, 9, 3 * C))
