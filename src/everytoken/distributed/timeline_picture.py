"""Timelines drawn: two lanes a step, as coloured pieces for a terminal and as one piece of HTML."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from ..core.colours import category, ink
from ..core.trace import TokenTrace
from .base import COMMUNICATION, COMPUTE, Event, Timeline

WIDTH = 64
"""Columns of the longest lane in a terminal."""
KINDS = ("attention 1", "attention 2", "mlp 1", "mlp 2", "exchange 1", "exchange 2", "norm 1", "norm 2")
SHORT = {"attention": "A", "mlp": "M", "exchange": "x", "norm": "n"}


def name_of(event: Event) -> str:
    """What an event is: ``attention 1``."""
    return f"{event.kind} {event.part + 1}"


def lane_pieces(timeline: Timeline, lane: str, scale: float) -> list[tuple[str, Event | None]]:
    """A lane as text pieces of ``scale`` columns a second; None stands for waiting."""
    pieces: list[tuple[str, Event | None]] = []
    column = 0
    for event in timeline.events:
        if event.lane != lane:
            continue
        start, stop = round(event.start * scale), round(event.stop * scale)
        if start > column:
            pieces.append(("." * (start - column), None))
        label = f"{SHORT[event.kind]}{event.part + 1}"
        if stop > max(start, column):
            width = stop - max(start, column)
            pieces.append((label[:width].ljust(width), event))
        column = max(column, stop)
    end = round(timeline.seconds * scale)
    if end > column:
        pieces.append(("." * (end - column), None))
    return pieces


def timeline_trace(title: str, timeline: Timeline, longest: float) -> TokenTrace:
    """A timeline as a trace: a piece an event, a line a lane.

    Args:
        longest: seconds that ``WIDTH`` columns stand for.
    """
    texts: list[str] = []
    found: list[Event | None] = []
    for lane in (COMPUTE, COMMUNICATION):
        texts.append(f"{lane:<14}")
        found.append(None)
        for text, event in lane_pieces(timeline, lane, WIDTH / longest if longest else 0.0):
            texts.append(text)
            found.append(event)
        texts[-1] += "\n"
    trace = TokenTrace(list(range(len(texts))), title=title, station="distributed")
    trace.texts = texts
    trace.add("what", [None if event is None else name_of(event) for event in found])
    trace.add("layer", [None if event is None else event.layer for event in found])
    return trace.add("ms", [None if event is None else 1e3 * (event.stop - event.start) for event in found])


def timeline_picture(timelines: Mapping[str, Timeline], title: str) -> str:
    """Timelines on one scale as HTML with inline styles; every event tells its name and time when pointed at."""
    longest = max((item.seconds for item in timelines.values()), default=0.0) or 1.0
    lines = [f"<section><h3>{escape(title)}</h3>"]
    for name, timeline in timelines.items():
        lines.append(f"<p><b>{escape(name)}</b>: {1e3 * timeline.seconds:.3g} ms</p>")
        for lane in (COMPUTE, COMMUNICATION):
            cells = []
            for event in timeline.events:
                if event.lane != lane or event.stop <= event.start:
                    continue
                colour = category(KINDS.index(name_of(event)))
                left, width = (100 * value / longest for value in (event.start, event.stop - event.start))
                told = f"layer {event.layer}, {name_of(event)}: {1e3 * (event.stop - event.start):.3g} ms"
                cells.append(
                    f'<span title="{escape(told)}" style="position:absolute;left:{left:.3f}%;width:{width:.3f}%;'
                    f"top:0;bottom:0;overflow:hidden;font-size:.7rem;background:{colour};color:{ink(colour)};"
                    f'box-shadow:inset 1px 0 #fff">{SHORT[event.kind]}{event.part + 1}</span>'
                )
            busy = 100 * timeline.busy(lane) / timeline.seconds if timeline.seconds else 0.0
            lines.append(
                f'<div role="img" aria-label="{escape(name)}, {lane}: busy {busy:.0f}% of the time" '
                'style="position:relative;height:1.4rem;margin:.1rem 0;background:rgba(128,128,128,.18)">'
                f"{''.join(cells)}</div>"
            )
    lines.append("<p>A attention, M MLP, x exchange, n norm; 1 and 2 are the parts.</p></section>")
    return "".join(lines)
