"""Curves without a plotting library: one self-contained SVG each, for result files, pages and reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from .errors import BadInputError

LINE_COLOURS = ("#f58518", "#277f8e", "#4c78a8", "#b279a2", "#54a24b", "#e45756")


def lines_svg(
    lines: Mapping[str, Sequence[Sequence[tuple[float, float]]]], caption: str, share: bool = True, dots: bool = True
) -> str:
    """Curves as one self-contained SVG.

    Args:
        lines: name -> one curve a seed, each a list of ``(x, value)``.
        caption: what the axes are.
        share: x is a share from 0 to 1, shown in percent.
        dots: mark every point.
    """
    points = [point for curves in lines.values() for curve in curves for point in curve]
    if not points:
        raise BadInputError("There is no point to draw.")
    widest, values = max(x for x, _ in points) or 1.0, [y for _, y in points]
    low, high = min(values), max(values)
    if low == high:  # a flat line runs through the middle
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    left, right = 90, 690
    places, width, row = {}, 0.0, 0  # of the names, one after the other, in as many rows as they need
    for name in lines:
        size = 44 + 8 * len(name)
        if width and width + size > right - left:
            width, row = 0.0, row + 1
        places[name] = (left + 20 + width, 14 + 22 * row)
        width += size
    top, bottom = 40 + 22 * row, 320 + 22 * row
    parts = []
    gap, largest = (high - low) / 4, max(abs(low), abs(high))
    for step in range(5):
        y, x = bottom - (bottom - top) * step / 4, left + (right - left) * step / 4
        parts.append(
            f'<text x="{left - 12}" y="{y + 5:.0f}" text-anchor="end">{_tick(low + gap * step, gap, largest)}</text>'
        )
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.0f}" y2="{y:.0f}" stroke="#dde1e6"/>')
        parts.append(
            f'<text x="{x:.0f}" y="{bottom + 22}" text-anchor="middle">{_axis(widest * step / 4, share)}</text>'
        )
    for number, (name, curves) in enumerate(lines.items()):
        colour = LINE_COLOURS[number % len(LINE_COLOURS)]
        for curve in curves:
            corners = [
                (left + x / widest * (right - left), bottom - (y - low) / (high - low) * (bottom - top))
                for x, y in sorted(curve)
            ]
            line = " ".join(f"{x:.0f},{y:.0f}" for x, y in corners)
            parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2.5" points="{line}"/>')
            parts += (
                [] if not dots else [f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4" fill="{colour}"/>' for x, y in corners]
            )
        x, y = places[name]
        parts.append(
            f'<rect x="{x:.0f}" y="{y}" width="14" height="14" fill="{colour}"/>'
            f'<text x="{x + 20:.0f}" y="{y + 12}">{escape(name)}</text>'
        )
    height = bottom + 60
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="720" '
        f'height="{height}" viewBox="0 0 720 {height}" '
        'font-family="system-ui, sans-serif" font-size="14" fill="#1b1f24">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}'
        f'<text x="390" y="{height - 14}" text-anchor="middle">{escape(caption)}</text></svg>\n'
    )


def _tick(value: float, step: float, largest: float) -> str:
    """A value with as many digits as tell it from its neighbour, ``step`` away; powers of ten where all values are tiny or huge."""
    finest = math.floor(math.log10(step)) - 1
    if 1e-3 <= largest < 1e5:
        return f"{value:.{max(0, -finest)}f}"
    return f"{value:.{max(0, math.floor(math.log10(largest)) - finest)}e}"


def _axis(value: float, share: bool) -> str:
    return f"{value:.0%}" if share else f"{value:,.0f}" if value >= 10 or float(value).is_integer() else f"{value:.1f}"
