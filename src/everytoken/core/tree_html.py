"""The prefix tree of several texts as HTML: every stretch of tokens that texts share is one cell, left to right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite

from .colours import RAMP, ink, shade
from .errors import BadInputError

STYLE = """<style>
.tree { overflow-x: auto; margin: .5rem 0 1rem; }
.tree table { border-collapse: separate; border-spacing: 3px; font-variant-numeric: tabular-nums; }
.tree td { padding: .2rem .45rem; border-radius: 4px; vertical-align: middle; max-width: 24rem; }
.tree code { font: 13px/1.4 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.tree small { display: block; opacity: .8; white-space: nowrap; }
.tree .end { color: var(--dim); white-space: nowrap; }
.tree .scale { display: flex; gap: .5rem; align-items: center; color: var(--dim); }
.tree .ramp { width: 10rem; height: .8rem; border-radius: 3px; }
</style>"""
LONGEST = 160
"""Characters of a stretch that are shown."""


@dataclass
class Stretch:
    """Tokens that the same texts go through.

    Attributes:
        rows: the texts.
        first, last: token ``first`` to before ``last`` of each.
        branches: what follows; a text that ends here is in none of them.
    """

    rows: list[int]
    first: int
    last: int
    branches: list[Stretch]


def stretches(texts: Sequence[Sequence[object]], rows: Sequence[int], first: int = 0) -> list[Stretch]:
    """The branches that texts take behind their first ``first`` tokens, which they share; in order of appearance."""
    following: dict[object, list[int]] = {}
    for row in rows:
        if len(texts[row]) > first:
            following.setdefault(texts[row][first], []).append(row)
    found = []
    for members in following.values():
        last = first + 1
        shortest = min(len(texts[row]) for row in members)
        while last < shortest and len({texts[row][last] for row in members}) == 1:
            last += 1
        found.append(Stretch(members, first, last, stretches(texts, members, last)))
    return found


def tree_html(
    ids: Sequence[Sequence[object]],
    texts: Sequence[Sequence[str]],
    values: Sequence[Sequence[float]],
    ends: Sequence[str],
    what: str,
) -> str:
    """The tree as a table with coloured cells, which screen readers read row by row.

    Args:
        ids: tokens of every text; equal tokens are one branch.
        texts: the same tokens as they are shown.
        values: of every text's prefixes of 0 to all tokens; a cell has the colour of the prefix that it ends.
        ends: what stands behind every text.
        what: what the values are.

    Raises:
        BadInputError: no text, or arguments of different lengths.
    """
    if not ids or not len(ids) == len(texts) == len(values) == len(ends):
        raise BadInputError("A tree needs texts, and tokens, values and an end for each.")
    for tokens, shown, known in zip(ids, texts, values, strict=True):
        if len(shown) != len(tokens) or len(known) <= len(tokens):
            raise BadInputError("Every token of a tree needs a text, and every prefix a value.")
    finite = [v for tokens, row in zip(ids, values, strict=True) for v in row[: len(tokens) + 1] if isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    top = stretches(ids, range(len(ids)))
    depth = max(1, _depth(top))
    lines: list[list[str]] = []

    def end(row: int, level: int) -> list[str]:
        space = [f'<td colspan="{depth - level}"></td>'] if level < depth else []
        return [*space, f'<td class="end">{escape(ends[row])}</td>']

    def cell(part: Stretch, level: int) -> str:
        row, value = part.rows[0], values[part.rows[0]][part.last]
        colour = shade(value, low, high)
        paint = f"background:{colour};color:{ink(colour)}" if colour else "background:var(--card)"
        text = "".join(texts[row][part.first : part.last]).replace("\n", "\u23ce")
        if len(text) > LONGEST:
            text = f"{text[:LONGEST]}\u2026"
        count = f"{len(part.rows)} of {len(ids)}"
        text = escape(text) or "\u00b7"
        number = f"{value:.3g}" if isfinite(value) else "no value"
        return (
            f'<td rowspan="{len(part.rows)}" style="{paint}"><code>{text}</code>'
            f"<small>{number} \u00b7 {count}</small></td>"
        )

    def draw(parts: Sequence[Stretch], level: int, ahead: list[str]) -> None:
        """Lines of the texts under some branches; ``ahead`` holds cells that begin with the first of them."""
        for part in parts:
            cells = [*ahead, cell(part, level)]
            ahead = []
            inside = {row for branch in part.branches for row in branch.rows}
            for row in part.rows:
                if row not in inside:
                    lines.append([*cells, *end(row, level + 1)])
                    cells = []
            draw(part.branches, level + 1, cells)

    lines += [end(row, 0) for row in range(len(ids)) if not len(ids[row])]
    draw(top, 0, [])
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in lines)
    scale = (
        f'<div class="scale">{escape(what)}: {low:.3g}<span class="ramp" role="img" aria-label="to" '
        f'style="background:linear-gradient(to right,{",".join(RAMP)})"></span>{high:.3g}</div>'
    )
    return f'{STYLE}<div class="tree">{scale}<table>{body}</table></div>'


def _depth(parts: Sequence[Stretch]) -> int:
    return max((1 + _depth(part.branches) for part in parts), default=0)
