"""Charts: axes are labelled, the same data give the same bytes, nothing is drawn that cannot be read."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
import xml.etree.ElementTree as xml

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.core.charts import COLOURS, GRID, INK, MUTED, PAPER, bars_svg, inline_image, lines_svg
from everytoken.core.errors import BadInputError

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg):
    return [item.text for item in xml.fromstring(svg).iter(f"{SVG}text")]


def paths(svg, colour):
    """Corners of every line of a colour, in the picture's coordinates (y grows downwards)."""
    found = []
    for item in xml.fromstring(svg).iter(f"{SVG}path"):
        if f"stroke: {colour}" in item.get("style", "") and "clip-path" in item.attrib:  # the legend's are not clipped
            found.append([tuple(map(float, pair)) for pair in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", item.get("d"))])
    return found


def luminance(colour):
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_axes_and_lines_are_named():
    svg = lines_svg({"DPO": [[(0, 1), (2, 3)]], "TDPO2": [[(0, 1), (1, 2)]]}, "KL, nats", "reward", title="frontier")
    assert {"KL, nats", "reward", "DPO", "TDPO2", "frontier"} <= set(texts(svg))
    alone = texts(lines_svg({"loss": [[(0, 1), (2, 3)]]}, "step", "loss"))
    assert alone.count("loss") == 1  # one line needs no legend
    assert {"100%", "0%"} <= set(texts(lines_svg({"a": [[(0, 1), (1, 3)]]}, "share", "y", percent=True)))


def test_curves_are_drawn_to_scale():
    curves = {
        "one": [[(0.0, 1.0), (4.0, 3.0), (2.0, 2.0)], [(0.0, 3.0), (4.0, 1.0)]],
        "other": [[(0.0, 1.0), (4.0, 1.0)]],
    }
    svg = lines_svg(curves, "x", "y", markers=False)
    first, second = paths(svg, COLOURS[0])
    assert [x for x, _ in first] == sorted(x for x, _ in first)
    (x0, y0), (x1, y1), (x2, y2) = first
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y0 - y1 == pytest.approx(y1 - y2)
    assert y2 < y0  # a higher value is further up
    assert [y for _, y in second] == pytest.approx([y2, y0])
    (flat,) = paths(svg, COLOURS[1])
    assert [y for _, y in flat] == pytest.approx([y0, y0])


@pytest.mark.slow
def test_the_same_data_give_the_same_bytes():
    code = (
        "from everytoken.core.charts import bars_svg, lines_svg; import hashlib;"
        "text = lines_svg({'a': [[(0, 1), (2, 3)]], 'b': [[(1, 1)]]}, 'x', 'y') + bars_svg({'a': 1.0}, 'x');"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    command = [sys.executable, "-c", code]
    found = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(found) == 1
    assert not re.search(r"20\d\d-\d\d-\d\d", lines_svg({"a": [[(0, 1)]]}, "x", "y"))


def test_every_picture_brings_a_background_on_which_all_its_colours_can_be_read():
    """So a dark page changes nothing: text at 7 to 1, lines and marks at 3 to 1 (WCAG)."""
    for svg in (lines_svg({"a": [[(0, 1), (1, 2)]]}, "x", "y"), bars_svg({"a": 1.0}, "x")):
        root = xml.fromstring(svg)
        background = next(root.iter(f"{SVG}path"))
        assert PAPER in background.get("style")
        width, height = root.get("viewBox").split()[2:]
        corners = re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", background.get("d"))
        assert {(float(x), float(y)) for x, y in corners} >= {(0.0, 0.0), (float(width), float(height))}
    assert contrast(INK, PAPER) > 7
    assert all(contrast(colour, PAPER) >= 3 for colour in COLOURS)
    assert contrast(MUTED, PAPER) >= 3
    assert contrast(GRID, PAPER) < 1.5
    assert len(set(COLOURS)) == len(COLOURS)


def test_names_are_text_and_never_formulas():
    svg = lines_svg({"a < b": [[(0, 1.0)]], "costs $5 and $6": [[(0, 2.0)]], "_hidden": [[(0, 3.0)]]}, "x & y", "$z$")
    assert {"a < b", "costs $5 and $6", "_hidden", "x & y", "$z$"} <= set(texts(svg))
    assert "50 (1.00x) $" in texts(bars_svg({"a": 50.0}, "x", notes={"a": "50 (1.00x) $"}))


@pytest.mark.slow
@settings(max_examples=25)  # each draws a whole chart
@given(low=st.floats(-100, 100), spread=st.floats(1e-3, 1e3))
def test_labels_tell_ticks_apart(low, spread):
    svg = lines_svg({"loss": [[(1, low), (2, low + spread)]]}, "step", "loss")
    labels = re.findall(r'id="ytick_\d+">.*?<text[^>]*>([^<]*)</text>', svg, re.S)
    assert len(set(labels)) == len(labels) >= 3


def test_bars_are_as_long_as_their_values():
    svg = bars_svg({"plain": 50.0, "ours": 100.0}, "tokens a second", baseline="plain")
    lengths = {}
    for item in xml.fromstring(svg).iter(f"{SVG}path"):
        for name, colour in (("plain", MUTED), ("ours", COLOURS[0])):
            if f"fill: {colour}" in item.get("style", "") and "clip-path" in item.attrib:
                xs = [float(x) for x in re.findall(r"[ML] ([-\d.]+)", item.get("d"))]
                lengths[name] = max(xs) - min(xs)
    assert lengths["ours"] == pytest.approx(2 * lengths["plain"])
    assert {"plain", "ours", "tokens a second", "50", "100"} <= set(texts(svg))


def test_nothing_to_draw_is_refused():
    with pytest.raises(BadInputError, match="no point"):
        lines_svg({"loss": [[]]}, "step", "loss")
    with pytest.raises(BadInputError, match="no bar"):
        bars_svg({}, "x")
    with pytest.raises(BadInputError, match="cannot show nan"):
        lines_svg({"loss": [[(0, float("nan"))]]}, "step", "loss")
    with pytest.raises(BadInputError, match="cannot show inf"):
        bars_svg({"a": float("inf")}, "x")


def test_a_page_gets_the_picture_whole():
    svg = lines_svg({"a": [[(0, 1)]]}, "x", "y")
    image = inline_image(svg, 'loss "over" steps')
    assert "<svg" not in image
    assert "&quot;over&quot;" in image
    data = re.search(r"base64,([^\"]+)", image)[1]
    assert base64.b64decode(data).decode() == svg
