"""A training report: one self-contained HTML file with figures, curves, texts before and after, and credit token by
token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import isfinite
from pathlib import Path

from ..core.charts import inline_image, lines_svg
from ..core.trace import TokenTrace
from ..core.trace_html import render_html

_STYLE = """<style>
.figures { border-collapse: collapse; margin: .5rem 0 1rem; }
.figures td { padding: .15rem 1.5rem .15rem 0; vertical-align: top; }
.figures td:first-child { color: var(--dim); }
.figures td:last-child { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1rem; margin: .5rem 0 1rem; }
.curves img { width: 100%; height: auto; border-radius: 8px; border: 1px solid var(--line); }
.samples { border-collapse: collapse; width: 100%; margin-bottom: 1.5rem; }
.samples td, .samples th { border-bottom: 1px solid var(--line); padding: .4rem 1rem .4rem 0; width: 33%; }
.samples td, .samples th { text-align: left; vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere; }
</style>"""


def training_report(
    path: Path,
    title: str,
    figures: Mapping[str, float],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    samples: Sequence[tuple[str, str, str]] = (),
    traces: Sequence[TokenTrace] = (),
    column: str | None = None,
    settings: Mapping[str, object] | None = None,
    pictures: Mapping[str, str] | None = None,
) -> Path:
    """Writes the report.

    Args:
        figures: the final evaluation.
        curves: metric -> ``(step, value)``; metrics of one point, and points that are not finite, are left out.
        samples: ``(prompt, text before, text after)``.
        traces: credit of fixed examples, chosen and rejected in turn: they are set side by side.
        column: the score shown first.
        settings: what the training was run with.
        pictures: title -> HTML, taken as it is.
    """
    parts = [_STYLE, "<h2>Final evaluation</h2>", _table({name: f"{value:,.4g}" for name, value in figures.items()})]
    finite = {name: [(x, y) for x, y in points if isfinite(y)] for name, points in curves.items()}
    drawn = {name: points for name, points in finite.items() if len(points) > 1}
    if drawn:
        parts.append('<h2>Curves</h2><div class="curves">')
        parts += [
            inline_image(lines_svg({name: [points]}, "step", name, markers=len(points) < 40), f"{name} over steps")
            for name, points in drawn.items()
        ]
        parts.append("</div>")
    if samples:
        parts.append(
            '<h2>Before and after</h2><table class="samples"><tr><th>prompt</th><th>before</th><th>after</th></tr>'
        )
        parts += ["<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in samples]
        parts.append("</table>")
    if settings:
        rows = _table({name: str(value) for name, value in settings.items()})
        parts.append(f"<details><summary>Settings</summary>{rows}</details>")
    for name, picture in (pictures or {}).items():
        parts += [f"<h2>{escape(name)}</h2>", picture]
    if traces:
        parts.append("<h2>Credit of every token</h2>")
    render_html(list(traces), path, column, title, before="\n".join(parts), beside=True)
    return path


def _table(rows: Mapping[str, str]) -> str:
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return f'<table class="figures">{cells}</table>'
