"""Post-training quantisation: every channel of a trained autoencoder's latents is cut into bins by itself.

The bins are those of equal probability under N(0, 1), cut off at the normal range sd. A bin stands for its mean::

    b_i  = clamp(Phi^-1(i / B), -sd, sd)                                    i = 0 .. B
    mu_i = E[N(0, 1) | b_i < . < b_(i+1)] = (phi(b_i) - phi(b_(i+1))) / (Phi(b_(i+1)) - Phi(b_i))
    u    = clamp(z sd / r, -sd, sd)          q = argmin_i |u - mu_i|          z^ = mu_q r / sd

The nearest mean counts, not the bin that holds u. With r = 5 and sd = 3 the grid is stretched by 5/3: the bins are not
used equally by latents of deviation 1, and the tails cost less for it. There is nothing to learn and nothing to train.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import torch

from ...core.errors import BadInputError
from ..grid import Grid, check_grid

NORMAL = NormalDist()


@dataclass(frozen=True)
class PostTrainingQuantizer:
    """Bins by quantiles of the normal distribution, the same for every channel.

    Args:
        bins: B, from 2 to as many as the normal range has bins of a positive width (740 with a range of 3).
        value_range: r, the latents' value that meets the end of the normal range.
        normal_range: sd, in standard deviations.
        scale: latents are multiplied with it first, so that their deviation is about 1 (0.2325 for the paper's).

    Raises:
        BadInputError: a value out of range, or more bins than the normal range can hold.
    """

    bins: int = 64
    value_range: float = 5.0
    normal_range: float = 3.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        ends = self.value_range, self.normal_range, self.scale
        if not all(math.isfinite(end) and end > 0 for end in ends):
            raise BadInputError(f"value_range, normal_range and scale are positive numbers; got {ends}.")
        most = int(1 / NORMAL.cdf(-self.normal_range)) if self.normal_range < 8 else 2**24
        if isinstance(self.bins, bool) or not isinstance(self.bins, int) or not 2 <= self.bins <= max(most, 2):
            raise BadInputError(
                f"bins is a whole number from 2 to {most}; got {self.bins!r}.",
                f"Beyond {most} the outermost bins lie outside a normal range of {self.normal_range:g} and are empty.",
            )
        object.__setattr__(self, "tables", _tables(self.bins, self.normal_range))  # once, so that it can be compiled

    @property
    def stretch(self) -> float:
        """sd / r, from scaled latents to units of the normal distribution."""
        return self.normal_range / self.value_range

    @property
    def boundaries(self) -> torch.Tensor:
        """b ``[B + 1]`` in float64, in units of the normal distribution."""
        found: torch.Tensor = self.tables[0]  # type: ignore[attr-defined]
        return found

    @property
    def centroids(self) -> torch.Tensor:
        """mu ``[B]`` in float64, increasing and odd, in units of the normal distribution."""
        found: torch.Tensor = self.tables[1]  # type: ignore[attr-defined]
        return found

    @property
    def values(self) -> torch.Tensor:
        """The latents ``[B]`` in float64 that the bins stand for."""
        return self.centroids / (self.stretch * self.scale)

    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        """The nearest mean of every number; of two that are as near, the lower.

        Args:
            latents: floats of any shape.

        Returns:
            Indices from 0 to B - 1, long, of the same shape.

        Raises:
            BadInputError: no floats, or numbers that are not finite.
        """
        if not latents.is_floating_point():
            raise BadInputError(f"Latents are floats; got {latents.dtype}.", "Codes are decoded, not encoded.")
        if not torch.compiler.is_compiling() and not bool(latents.isfinite().all()):
            raise BadInputError("Latents hold numbers that are not finite.")
        exact = latents if latents.dtype == torch.float64 else latents.float()
        middles = (self.centroids[1:] + self.centroids[:-1]) / 2
        # the clamp to the normal range changes no index: all means lie inside of it
        return torch.bucketize(exact * (self.scale * self.stretch), middles.to(exact))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The latents that codes stand for, in float32 and of the same shape.

        Raises:
            BadInputError: no whole numbers, or some below 0 or beyond the bins.
        """
        self.check(codes)
        return self.values.to(codes.device, torch.float32)[codes]

    def check(self, codes: torch.Tensor) -> None:
        """Raises BadInputError for codes that are no indices of bins."""
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise BadInputError(f"Codes are whole numbers; got {codes.dtype}.")
        if torch.compiler.is_compiling() or not codes.numel():
            return
        low, high = (int(end) for end in codes.aminmax())
        if low < 0 or high >= self.bins:
            raise BadInputError(
                f"Codes of {self.bins} bins lie from 0 to {self.bins - 1}; got some from {low} to {high}.",
                "They were made with other bins. Encode the latents anew.",
            )

    def clipped(self, latents: torch.Tensor) -> float:
        """The share of numbers beyond the outermost mean, all of which collapse onto it."""
        return float((latents.abs() > float(self.values[-1])).float().mean())

    def fit(self, latents: torch.Tensor) -> PostTrainingQuantizer:
        """The same bins with the scale that gives these latents a mean square of 1.

        Raises:
            BadInputError: latents that are all zero or not finite.
        """
        deviation = float(latents.double().square().mean().sqrt())
        if not math.isfinite(deviation) or deviation == 0:
            raise BadInputError("Latents without a finite deviation give no scale.")
        return dataclasses.replace(self, scale=1 / deviation)


@lru_cache(maxsize=64)
def _tables(bins: int, normal_range: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Boundaries and means, exactly odd."""
    inner = [NORMAL.inv_cdf(i / bins) for i in range(1, bins)]
    edges = torch.tensor([-normal_range, *inner, normal_range], dtype=torch.float64).clamp(-normal_range, normal_range)
    edges = (edges - edges.flip(0)) / 2
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    mass = torch.special.ndtr(edges).diff()
    means = (density[:-1] - density[1:]) / mass
    return edges, (means - means.flip(0)) / 2


def spectral_shares(latents: torch.Tensor, grid: Grid, radius: float = 1.0) -> torch.Tensor:
    """Which share of its power every channel has at low frequencies: ``[C]``.

    Args:
        latents: ``[N, n, C]``, the tokens of a grid row by row.
        grid: rows and columns, n = rows x columns.
        radius: in cycles over the grid; what lies within counts as low. The mean, of zero cycles, does.

    Raises:
        BadInputError: tokens that do not fill the grid, or a negative radius.
    """
    check_grid(*grid)
    if latents.dim() != 3 or latents.shape[1] != grid[0] * grid[1] or not len(latents):
        raise BadInputError(f"Latents [N, n, C] of a grid {grid} are expected; got {[*latents.shape]}.")
    if radius < 0:
        raise BadInputError(f"A radius is 0 or more; got {radius}.")
    maps = latents.double().transpose(1, 2).unflatten(2, grid)
    power = torch.fft.fft2(maps).abs().square().mean(0)
    rows, columns = (torch.fft.fftfreq(side, 1 / side, dtype=torch.float64) for side in grid)
    low = (rows[:, None].square() + columns.square()).sqrt() <= radius
    return (power * low.to(power)).sum((1, 2)) / power.sum((1, 2)).clamp(min=torch.finfo(torch.float64).tiny)


def spectral_order(latents: torch.Tensor, grid: Grid, radius: float = 1.0) -> list[int]:
    """Channels from the one that low frequencies dominate most; see ``spectral_shares`` for arguments and errors."""
    return spectral_shares(latents, grid, radius).argsort(descending=True, stable=True).tolist()
