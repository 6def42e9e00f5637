"""The picture of a prefix tree: its cells by brute force, and texts that would break a page."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.core.errors import BadInputError
from everytoken.core.tree_html import stretches, tree_html


def drawn(ids, values=None, ends=None):
    texts = [[f"<{token}>" for token in row] for row in ids]
    values = values or [[float(place) for place in range(len(row) + 1)] for row in ids]
    return tree_html(ids, texts, values, ends or [f"end {row}" for row in range(len(ids))], "mean")


def flat(parts):
    return [part for top in parts for part in (top, *flat(top.branches))]


@given(st.lists(st.lists(st.integers(0, 1), max_size=5), min_size=1, max_size=7))
@settings(max_examples=25)
def test_every_prefix_of_every_text_lies_in_one_stretch_with_those_who_share_it(ids):
    parts = flat(stretches(ids, range(len(ids))))
    for row, tokens in enumerate(ids):
        covered = sorted(place for part in parts if row in part.rows for place in range(part.first, part.last))
        assert covered == list(range(len(tokens)))
    for part in parts:
        for last in range(part.first + 1, part.last + 1):
            prefix = ids[part.rows[0]][:last]
            assert sorted(part.rows) == [row for row, tokens in enumerate(ids) if tokens[:last] == prefix]
    page = drawn(ids)
    lines = re.findall(r"<tr>(.*?)</tr>", page)
    assert len(lines) == len(ids) == page.count('class="end"')
    # a table of equal width in every line, cells that reach down included
    widths = [0] * len(lines)
    for place, line in enumerate(lines):
        for cell in re.findall(r"<td([^>]*)>", line):
            down, across = (int((re.search(rf'{name}="(\d+)"', cell) or [0, 1])[1]) for name in ("rowspan", "colspan"))
            for below in range(down):
                widths[place + below] += across
    assert len(set(widths)) == 1


def test_what_a_cell_says():
    page = drawn([[5, 6, 7], [5, 6, 8], [5]], [[0.5, 0.5, 1.0, 1.0], [0.5, 0.5, 1.0, float("nan")], [0.5, 0.5]])
    assert "&lt;5&gt;</code><small>0.5 \u00b7 3 of 3" in page
    assert "&lt;6&gt;</code><small>1 \u00b7 2 of 3" in page
    assert "&lt;8&gt;</code><small>no value \u00b7 1 of 3" in page and "<8>" not in page
    assert page.index("end 2") < page.index("&lt;6&gt;")  # who has ended comes first
    assert "\u2026" in tree_html([[1]], [["x" * 999]], [[0.0, 1.0]], ["end"], "mean")


def test_bad_input():
    for ids, texts, values, ends in (
        ([], [], [], []),
        ([[1]], [["a"]], [[0.0, 1.0]], []),
        ([[1]], [["a", "b"]], [[0.0, 1.0]], ["x"]),
        ([[1]], [["a"]], [[0.0]], ["x"]),
    ):
        with pytest.raises(BadInputError, match="tree"):
            tree_html(ids, texts, values, ends, "mean")
