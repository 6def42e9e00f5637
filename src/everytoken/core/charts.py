"""Charts by matplotlib as SVG: for result files, pages and reports.

Every chart brings its own light background, so that it reads the same in light and dark pages. The same data give the
same
file, byte for byte: no date, and ids that are derived from the content.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from .errors import BadInputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Curves = Mapping[str, Sequence[Sequence[tuple[float, float]]]]
"""name -> one curve a seed, each a list of ``(x, y)``."""

COLOURS = ("#0072b2", "#d55e00", "#007a5a", "#aa4499", "#8a6d00", "#5b6770", "#3d2c8d", "#b3003c")
"""Told apart by most colour-blind readers (after Okabe and Ito), each with a contrast of at least 3 on the background.
"""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PAPER, INK, GRID, MUTED = "#fcfcfd", "#1b1f24", "#dde1e6", "#7f8995"
STYLE: dict[str, object] = {
    "svg.hashsalt": "everytoken",
    "svg.fonttype": "none",  # text stays text: it can be searched and read aloud
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
}


def lines_svg(
    lines: Curves, x_label: str, y_label: str, *, percent: bool = False, markers: bool = True, title: str = ""
) -> str:
    """Curves as one self-contained SVG; the curves of one name (its seeds) share a colour.

    Args:
        x_label, y_label: what the axes are, with units.
        percent: x is a share from 0 to 1, shown in percent.
        markers: mark every point.

    Raises:
        BadInputError: no point to draw, or one that is not finite.
    """
    points = [point for curves in lines.values() for curve in curves for point in curve]
    if not points:
        raise BadInputError("There is no point to draw.")
    _finite(value for point in points for value in point)
    figure, axes = _figure(7.2, 4.0)
    drawn: dict[str, Line2D] = {}
    for number, (name, curves) in enumerate(lines.items()):
        for curve in curves:
            if not curve:
                continue
            xs, ys = zip(*sorted(curve), strict=True)
            (drawn[name],) = axes.plot(
                xs,
                ys,
                color=COLOURS[number % len(COLOURS)],
                linestyle="-" if number < len(COLOURS) else "--",
                linewidth=1.9,
                alpha=1.0 if len(curves) == 1 else 0.85,
                marker=MARKERS[number % len(MARKERS)] if markers else None,
                markersize=5,
            )
    _label(axes, x_label, y_label, title)
    if percent:
        from matplotlib.ticker import PercentFormatter

        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    if len(drawn) > 1:
        names = [_plain(name) for name in drawn]
        figure.legend(list(drawn.values()), names, loc="outside upper center", ncols=_columns(drawn), frameon=False)
    return _svg(figure, f"{title or y_label} over {x_label}: {', '.join(drawn)}")


def bars_svg(
    values: Mapping[str, float], x_label: str, *, baseline: str | None = None, notes: Mapping[str, str] | None = None
) -> str:
    """One value a name as horizontal bars, the first on top.

    Args:
        x_label: what the values are, with the unit.
        baseline: the bar that the others are compared with; drawn in grey.
        notes: name -> text behind its bar; default the value.

    Raises:
        BadInputError: no bar to draw, or a value that is not finite.
    """
    if not values:
        raise BadInputError("There is no bar to draw.")
    _finite(values.values())
    figure, axes = _figure(7.2, 1.1 + 0.38 * len(values))
    names, places = list(values), range(len(values))
    colours = [MUTED if name == baseline else COLOURS[0] for name in names]
    bars = axes.barh(places, [values[name] for name in names], height=0.62, color=colours)
    axes.set_yticks(places, [_plain(name) for name in names])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    labels = [(notes or {}).get(name, f"{values[name]:,.4g}") for name in names]
    axes.bar_label(bars, [_plain(text) for text in labels], padding=5)
    axes.margins(x=0.22)
    if min(values.values()) < 0 < max(values.values()):
        axes.axvline(0, color=INK, linewidth=0.8)
    elif min(values.values()) >= 0:
        axes.set_xlim(left=0)
    _label(axes, x_label, "", "")
    return _svg(figure, f"{x_label}: " + ", ".join(f"{name} {text}" for name, text in zip(names, labels, strict=True)))


def inline_image(svg: str, description: str) -> str:
    """An SVG as an ``img`` element for an HTML page: nothing of its styles and ids reaches the page."""
    data = base64.b64encode(svg.encode()).decode()
    return f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(description)}">'


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with style.context(STYLE):
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
        return figure, figure.add_subplot()


def _label(axes: Axes, x_label: str, y_label: str, title: str) -> None:
    axes.set_xlabel(_plain(x_label))
    axes.set_ylabel(_plain(y_label))
    if title:
        axes.set_title(_plain(title), fontsize=11, loc="left")


def _columns(names: Mapping[str, object]) -> int:
    """How many names of the legend fit beside each other."""
    return max(1, min(len(names), 88 // (6 + max(map(len, names)))))


def _plain(text: str) -> str:
    """A dollar sign would start a formula."""
    return text.replace("$", r"\$")


def _finite(values: Iterable[float]) -> None:
    for value in values:
        if not math.isfinite(value):
            raise BadInputError(f"A chart cannot show {value}.", "Leave out points that are not finite numbers.")


def _svg(figure: Figure, description: str) -> str:
    """The figure as SVG with a title, which screen readers say and browsers show."""
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with style.context(STYLE):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Type", "Format")))
    text = buffer.getvalue()
    lines = [line.rstrip() for line in text[text.index("<svg") :].splitlines()]
    opened, inside = "\n".join(lines).split(">", 1)
    return f'{opened} role="img">\n <title>{escape(description)}</title>{inside}\n'
