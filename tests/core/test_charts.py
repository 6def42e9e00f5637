"""Curves as SVG: labels tell ticks apart, whatever the range; flat lines; nothing to draw."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as xml

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everytoken.core.errors import BadInputError
from everytoken.core.charts import lines_svg


def ticks(svg):
    return re.findall(r'text-anchor="end">([^<]+)<', svg)


@given(low=st.floats(-100, 100), spread=st.floats(1e-3, 1e3))
def test_labels_tell_ticks_apart(low, spread):
    labels = ticks(lines_svg({"loss": [[(1, low), (2, low + spread)]]}, "step", share=False))
    assert len(set(labels)) == 5
    assert all(len(label) <= 10 for label in labels)


def test_a_flat_line_runs_through_the_middle():
    svg = lines_svg({"accuracy": [[(1, 0.0), (2, 0.0)]]}, "step", share=False)
    assert ticks(svg) == ["-0.50", "-0.25", "0.00", "0.25", "0.50"]
    assert 'points="390,180 690,180"' in svg


def test_names_do_not_lie_on_each_other():
    names = ["DPO", "a name of some length", "x" * 30, "another one", "TDPO2", "y" * 30, "z"]
    svg = lines_svg({name: [[(1, 0.0), (2, 1.0)]] for name in names}, "step")
    found = re.findall(r'<rect x="(\d+)" y="(\d+)" width="14".*?<text x="\d+" y="\d+">([^<]+)<', svg)
    assert [name for *_, name in found] == names
    for (x, y, name), (next_x, next_y, _) in itertools.pairwise(found):
        assert int(next_y) > int(y) or int(next_x) >= int(x) + 20 + 7 * len(name)
        assert int(x) + 20 + 7 * len(name) <= 720
    bottom = max(int(y) for _, y, _ in found)
    assert all(int(y) > bottom + 14 for y in re.findall(r'cy="(\d+)"', svg))


def test_names_are_escaped_and_nothing_is_refused():
    assert "a &lt; b" in lines_svg({"a < b": [[(0, 1.0)]]}, "step")
    with pytest.raises(BadInputError, match="no point"):
        lines_svg({"loss": [[]]}, "step")


def test_curves_are_drawn_to_scale():
    picture = lines_svg({"one": [[(0.0, 1.0), (0.5, 3.0)], [(0.25, 2.0)]], "other": [[(0.5, 1.0)]]}, "share; value")
    root = xml.fromstring(picture)
    circles = [(item.get("cx"), item.get("cy")) for item in root.iter() if item.tag.endswith("circle")]
    assert circles == [("90", "320"), ("690", "40"), ("390", "180"), ("690", "320")]
    words = [item.text for item in root.iter() if item.tag.endswith("text")]
    assert {"one", "other", "share; value", "50%", "3.00"} <= set(words)
