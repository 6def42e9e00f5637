"""Colours of values, for traces in the terminal and on pages."""

from __future__ import annotations

import math

RAMP = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
"""Viridis: perceptually even, safe for colour-blind readers, legible in print."""
CATEGORIES = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#bab0ac")


def shade(value: float | str | None, low: float, high: float) -> str | None:
    """The colour ``#rrggbb`` of a number between ``low`` and ``high``; None for None, texts and what is not finite."""
    if value is None or isinstance(value, str) or not math.isfinite(value):
        return None
    share = 0.5 if high <= low else (float(value) - low) / (high - low)
    position = share * (len(RAMP) - 1)
    index = min(int(position), len(RAMP) - 2)
    mix = position - index
    pairs = [(int(RAMP[index][i : i + 2], 16), int(RAMP[index + 1][i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * mix):02x}" for a, b in pairs)


def category(index: int) -> str:
    """The colour ``#rrggbb`` of the category number ``index``; they come round again."""
    return CATEGORIES[index % len(CATEGORIES)]


def ink(colour: str | None) -> str:
    """Black or white, whichever reads better on ``colour``; empty on no colour."""
    if colour is None:
        return ""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"
