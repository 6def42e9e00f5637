"""How many positions are masked: while learning, and after every iteration of sampling."""

from __future__ import annotations

import math

import numpy as np

from ...core.errors import BadInputError

CENTRE, DEVIATION = 1.0, 0.25
"""Of the normal distribution whose part below 1 gives the masked share while learning."""


def masked_after(positions: int, steps: int) -> list[int]:
    """How many positions are still masked after every iteration: ``[steps]``, falling, the last 0::

        max(1, min(masked - 1, floor(n cos(pi/2 (s + 1) / S))))        and 0 after the last one

    Raises:
        BadInputError: no position, or steps that are not from 1 to the number of positions.
    """
    if positions < 1 or not 1 <= steps <= positions:
        raise BadInputError(
            f"{positions} positions are sampled in 1 to {positions} steps; got {steps}.",
            "Every step predicts one position at least.",
        )
    found, masked = [], positions
    for step in range(steps - 1):
        masked = max(1, min(masked - 1, math.floor(positions * math.cos(math.pi / 2 * (step + 1) / steps))))
        found.append(masked)
    return [*found, 0]


def drawn_masked(positions: int, least: float, generator: np.random.Generator) -> int:
    """How many positions a batch learns to predict: a share from N(1, 0.25) within ``[least, 1]``, rounded up."""
    while True:
        share = generator.normal(CENTRE, DEVIATION)
        if least <= share <= 1:
            return min(positions, math.ceil(positions * share))
