"""Traces as one self-contained HTML page: a selector for the score, all values of the token that the pointer, a finger
or the keyboard is on, light and dark.

The page itself (markup, style, script) is ``trace.html`` beside this module; its ``{{names}}`` are filled here.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from .colours import CATEGORIES, RAMP, category, shade
from .errors import UnknownNameError

if TYPE_CHECKING:
    from .trace import TokenTrace, Value

TEMPLATE = Path(__file__).with_name("trace.html")
_NAME = re.compile(r"\{\{(\w+)\}\}")


class ColumnData(TypedDict):
    """A column as the page reads it: one colour and one text a token, and what the legend shows."""

    numeric: bool
    low: float
    high: float
    categories: list[str]
    colours: list[str | None]
    values: list[str | None]


class TraceData(TypedDict):
    """A trace as the page reads it."""

    title: str
    station: str
    tokens: list[str]
    ids: list[int]
    spans: list[tuple[int, int]] | None
    columns: dict[str, ColumnData]


@lru_cache(maxsize=1)
def _template() -> str:
    return TEMPLATE.read_text(encoding="utf-8")


def render_html(
    traces: Sequence[TokenTrace],
    path: str | os.PathLike[str] | None = None,
    column: str | None = None,
    title: str = "",
    before: str = "",
    beside: bool = False,
) -> str:
    """Several traces on one page under one selector, for example chosen and rejected, or two methods.

    Args:
        path: where to write the page, if anywhere.
        column: the one selected at first; default the first of all. One that no trace has is refused.
        title: of the page; default the first trace's.
        before: HTML above the traces (a report's tables and plots), taken as it is.
        beside: set traces two by two, side by side where the window is wide enough.

    A column has one scale (or one set of categories) for all traces, which the legend shows.

    Returns:
        The page.

    Raises:
        UnknownNameError: no trace has the column.
    """
    names = list(dict.fromkeys(name for trace in traces for name in trace.columns))
    if column is not None and names and column not in names:
        raise UnknownNameError("trace column", column, names)
    chosen = column if column in names else (names[0] if names else "")
    scales = {name: _scale(traces, name) for name in names}
    data = [_trace_data(trace, scales) for trace in traces]
    heading = title or (traces[0].title if traces else "") or "Token trace"
    values = {
        "title": html.escape(heading),
        "options": "".join(_option(name, name == chosen) for name in names),
        "ramp": ", ".join(RAMP),
        "categories": json.dumps(CATEGORIES),
        "before": before,
        "layout": "pairs" if beside else "",
        "data": json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),
    }
    # in one pass: a text that holds {{data}} stays as it is
    page = _NAME.sub(lambda match: values[match[1]], _template())
    if path is not None:
        Path(path).write_text(page, encoding="utf-8")
    return page


def _option(name: str, selected: bool) -> str:
    value = html.escape(name, quote=True)
    return f'<option value="{value}"{" selected" if selected else ""}>{html.escape(name)}</option>'


@dataclass(frozen=True)
class Scale:
    """What a column's colours mean on the page: a range of numbers, or categories in order of appearance."""

    low: float
    high: float
    categories: list[str]


def _scale(traces: Sequence[TokenTrace], name: str) -> Scale:
    """The scale of a column over all traces that have it."""
    having = [trace for trace in traces if name in trace.columns]
    limits = [trace.limits(name) for trace in having if trace.numeric(name)]
    low, high = (min(low for low, _ in limits), max(high for _, high in limits)) if limits else (0.0, 0.0)
    others = [trace.categories(name) for trace in having if not trace.numeric(name)]
    return Scale(low, high, list(dict.fromkeys(item for categories in others for item in categories)))


def _trace_data(trace: TokenTrace, scales: dict[str, Scale]) -> TraceData:
    return TraceData(
        title=trace.title,
        station=trace.station,
        tokens=trace.labels,
        ids=trace.ids,
        spans=trace.spans,
        columns={name: _column_data(trace, name, scales[name]) for name in trace.columns},
    )


def _column_data(trace: TokenTrace, name: str, scale: Scale) -> ColumnData:
    numeric, values = trace.numeric(name), trace.columns[name]
    if numeric:
        colours = [shade(value, scale.low, scale.high) for value in values]
    else:
        places = {item: category(index) for index, item in enumerate(scale.categories)}
        colours = [None if value is None else places[str(value)] for value in values]
    return ColumnData(
        numeric=numeric,
        low=scale.low,
        high=scale.high,
        categories=[] if numeric else scale.categories,
        colours=colours,
        values=[_show(value) for value in values],
    )


def _show(value: Value) -> str | None:
    if value is None:
        return None
    return f"{value:.4g}" if isinstance(value, float) else str(value)
