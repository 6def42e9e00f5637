"""Noise that belongs to a row: drawn by the row's own generator, so that a row is the same in every batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .errors import BadInputError


def row_generators(
    seeds: Sequence[int] | torch.Tensor, rows: int, device: torch.device | str = "cpu"
) -> list[torch.Generator]:
    """A generator a row.

    Raises:
        BadInputError: not one seed a row.
    """
    values = [int(seed) for seed in seeds]
    if len(values) != rows:
        raise BadInputError(f"seeds are one a row, {rows}; got {len(values)}.")
    return [torch.Generator(device).manual_seed(seed) for seed in values]


def open_uniform(
    *shape: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Float64 numbers in (0, 1), whose logarithms are finite."""
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=device).clamp_(1e-300, 1 - 1e-16)


def gumbel(uniform: torch.Tensor) -> torch.Tensor:
    """Gumbel noise of numbers in (0, 1): the arg max of log-probabilities with it is a draw."""
    return -(-uniform.log()).log()
