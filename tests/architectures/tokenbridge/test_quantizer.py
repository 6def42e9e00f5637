"""Post-training quantisation against numbers that are known, the definition by integrals, and symmetries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from everytoken.architectures.tokenbridge.configuration_tokenbridge import RELEASED_ORDER
from everytoken.architectures.tokenbridge.head import check_order
from everytoken.architectures.tokenbridge.quantizer import PostTrainingQuantizer, spectral_order, spectral_shares
from everytoken.core.errors import BadInputError


def draws(count=200_000):
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def error(quantizer, latents):
    return float((quantizer.decode(quantizer.encode(latents)) - latents).square().mean())


def test_eight_bins_by_hand():
    """Means, boundaries, points of decision, and the latents that the bins stand for."""
    q = PostTrainingQuantizer(8)
    mu = q.centroids
    half = [round(value, 4) for value in mu[4:].tolist()]
    assert half == [0.1580, 0.4913, 0.8954, 1.6290]
    assert [round(value, 4) for value in q.boundaries[4:].tolist()] == [0, 0.3186, 0.6745, 1.1503, 3]
    assert [round(value, 4) for value in ((mu[1:] + mu[:-1]) / 2)[3:].tolist()] == [0, 0.3247, 0.6934, 1.2622]
    assert [round(value, 4) for value in q.values[4:].tolist()] == [0.2633, 0.8189, 1.4923, 2.7149]


def test_sixty_four_bins_of_known_latents():
    q = PostTrainingQuantizer(64)
    z = torch.tensor([-6, -5, -2, -1, -0.3, 0, 0.01, 0.3, 1, 2, 5, 6])
    codes = q.encode(z)
    assert codes.tolist() == [0, 0, 7, 17, 27, 31, 32, 36, 46, 56, 63, 63]
    values = [-4.0618, -4.0618, -1.9825, -1.0042, -0.2953, -0.0326, 0.0326, 0.2953, 1.0042, 1.9825, 4.0618, 4.0618]
    assert q.decode(codes).tolist() == pytest.approx(values, abs=5e-5)


@pytest.mark.parametrize(
    ("bins", "wanted", "digits"),
    [(2, 0.634, 3), (4, 0.158, 3), (8, 0.0405, 4), (16, 0.01027, 4), (32, 0.00260, 5), (64, 0.00066, 5),
     (256, 0.00004, 5)],
)  # fmt: skip
def test_the_error_falls_to_a_quarter_a_bit(bins, wanted, digits):
    assert error(PostTrainingQuantizer(bins), draws()) == pytest.approx(wanted, abs=1.01 * 10**-digits)


def test_how_often_bins_are_used():
    codes = PostTrainingQuantizer(64).encode(draws())
    shares = torch.bincount(codes, minlength=64).double() / len(codes)
    assert -float((shares * shares.log2()).sum()) == pytest.approx(5.724, abs=2e-3)
    assert float(shares.max()) == pytest.approx(0.0264, abs=5e-4)
    even = PostTrainingQuantizer(64, 3.0, 3.0)  # without the stretch: equal use, and tails that cost more
    shares = torch.bincount(even.encode(draws()), minlength=64).double() / 200_000
    assert float(shares.min()) > 0.0127 and float(shares.max()) < 0.0172
    assert error(even, draws()) == pytest.approx(0.00405, abs=5e-5)


@pytest.mark.parametrize("bins", [2, 3, 7, 16, 740])
def test_the_means_are_integrals_between_quantiles(bins):
    q = PostTrainingQuantizer(bins)
    edges = np.clip(stats.norm.ppf(np.arange(bins + 1) / bins), -3, 3)
    assert q.boundaries.numpy() == pytest.approx(edges, abs=1e-9)
    for i in {0, bins // 2, bins - 1}:
        low, high = edges[i], edges[i + 1]
        above = integrate.quad(lambda x: x * stats.norm.pdf(x), low, high, epsabs=1e-14)[0]
        assert float(q.centroids[i]) == pytest.approx(above / (stats.norm.cdf(high) - stats.norm.cdf(low)), abs=1e-6)


@pytest.mark.parametrize("bins", [2, 3, 5, 8, 64, 100, 256, 740])
@pytest.mark.parametrize("scale", [1.0, 0.2325])
def test_it_is_odd_increasing_and_its_own_inverse(bins, scale):
    q = PostTrainingQuantizer(bins, scale=scale)
    assert torch.equal(q.centroids, -q.centroids.flip(0))
    assert bool((q.centroids.diff() > 0).all())
    everything = torch.arange(bins)
    assert torch.equal(q.encode(q.decode(everything)), everything)


@pytest.mark.parametrize("bins", [2, 5, 64, 256])
def test_the_rule_of_middles_is_the_nearest_mean(bins):
    q = PostTrainingQuantizer(bins)
    z = torch.randn(5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    u = (z * 0.6).clamp(-3, 3)
    nearest = (u[:, None] - q.centroids).abs().argmin(1)
    assert torch.equal(q.encode(z), nearest)
    assert int(PostTrainingQuantizer(64).encode(torch.zeros(1))) == 31  # a tie goes to the lower


def test_not_the_bin_that_holds_the_number():
    """Between a boundary and the middle of two means the two rules differ."""
    q = PostTrainingQuantizer(8)
    between = torch.tensor([0.32 / 0.6])  # above the boundary .3186, below the middle .3247
    assert int(q.encode(between)) == 4
    assert int(torch.bucketize(between * 0.6, q.boundaries.float()[1:-1])) == 5


def test_a_scale_comes_first_and_is_fitted():
    latents = 4.3 * draws(1000).view(10, 10, 10)
    q = PostTrainingQuantizer(64).fit(latents)
    assert q.scale == pytest.approx(1 / float(latents.square().mean().sqrt()))
    plain = PostTrainingQuantizer(64)
    assert torch.equal(q.encode(latents), plain.encode(latents * q.scale))
    assert torch.allclose(q.decode(q.encode(latents)), plain.decode(plain.encode(latents * q.scale)) / q.scale)


def test_low_precision_is_read_as_it_is():
    q = PostTrainingQuantizer(64)
    half = draws(500).bfloat16()
    assert torch.equal(q.encode(half), q.encode(half.float()))


def test_the_clipped_share():
    q = PostTrainingQuantizer(64)
    assert q.clipped(torch.tensor([-5.0, 0.0, 4.0, 4.1])) == 0.5
    assert q.clipped(draws()) == pytest.approx(2 * stats.norm.cdf(-4.0618), abs=5e-5)


@pytest.mark.parametrize(
    "settings",
    [{"bins": 1}, {"bins": 741}, {"bins": True}, {"bins": 8.0}, {"value_range": 0.0}, {"normal_range": -1.0},
     {"scale": math.nan}, {"scale": 0.0}],
)  # fmt: skip
def test_settings_that_cannot_be(settings):
    with pytest.raises(BadInputError):
        PostTrainingQuantizer(**settings)


@pytest.mark.parametrize("codes", [torch.tensor([64]), torch.tensor([-1]), torch.tensor([1.0]), torch.tensor([True])])
def test_codes_that_are_no_bins(codes):
    with pytest.raises(BadInputError, match="Codes"):
        PostTrainingQuantizer(64).decode(codes)


@pytest.mark.parametrize("latents", [torch.tensor([1]), torch.tensor([math.nan]), torch.tensor([math.inf])])
def test_latents_that_are_no_numbers(latents):
    with pytest.raises(BadInputError, match="Latents"):
        PostTrainingQuantizer(64).encode(latents)


def test_a_scale_cannot_be_fitted_to_nothing():
    with pytest.raises(BadInputError, match="deviation"):
        PostTrainingQuantizer().fit(torch.zeros(2, 3))


def waves(side=8):
    """Three channels: one wave a grid, a wave of many cycles, and noise."""
    place = torch.arange(side) / side
    slow = torch.sin(2 * math.pi * place)[:, None].expand(side, side)
    fast = torch.sin(2 * math.pi * 3 * place)[None].expand(side, side)
    noise = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    return torch.stack([fast, slow, noise], -1).flatten(0, 1)[None]


def test_channels_of_low_frequencies_come_first():
    shares = spectral_shares(waves(), (8, 8))
    assert shares.tolist()[:2] == pytest.approx([0, 1], abs=1e-6)
    assert 0 < float(shares[2]) < 0.5
    assert spectral_order(waves(), (8, 8)) == [1, 2, 0]
    assert spectral_shares(waves(), (8, 8), radius=100).tolist() == pytest.approx([1, 1, 1])


def test_the_power_is_that_of_a_transform_by_hand():
    latents = torch.randn(2, 12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    power = np.abs(np.fft.fft2(latents.numpy().reshape(2, 3, 4, 2), axes=(1, 2))) ** 2
    total = power.mean(0)
    low = total[0, 0] + total[1, 0] + total[2, 0] + total[0, 1] + total[0, 3]  # no cycle, or one along an axis
    assert spectral_shares(latents, (3, 4)).numpy() == pytest.approx(low / total.sum((0, 1)))


def test_the_released_order_names_every_channel():
    assert sorted(RELEASED_ORDER) == list(range(16)) and RELEASED_ORDER[:3] == (8, 1, 10)
    order = check_order(RELEASED_ORDER, 16)
    inverse = sorted(range(16), key=order.__getitem__)
    assert [order[place] for place in inverse] == list(range(16))


@pytest.mark.parametrize(("grid", "radius"), [((3, 3), 1.0), ((2, 4), -1.0), ((0, 8), 1.0)])
def test_spectra_of_what_is_no_grid(grid, radius):
    with pytest.raises(BadInputError):
        spectral_shares(torch.zeros(1, 8, 2), grid, radius)
