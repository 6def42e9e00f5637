"""TokenTrace: alignment, colours, terminal, HTML in a real browser, round trips, cost."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from everytoken.core.errors import BadInputError
from everytoken.core.trace import TokenTrace
from everytoken.core.trace_html import render_html

VALUES = st.one_of(st.none(), st.floats(allow_nan=False), st.integers(-(2**31), 2**31))


def example():
    return TokenTrace(
        [5, 6, 7, 8],
        {
            "score": [0.0, 0.5, None, 1.0],
            "source": ["draft", "target", "draft", None],
            "sure": [True, False, None, True],
        },
        texts=["Hello", " <b>wor", "ld</b>\n", "\t&"],
        spans=[(0, 5), (5, 12), (12, 19), (19, 21)],
        title="a <title>",
        station="generation",
    )


def test_columns_of_any_kind_are_aligned():
    trace = TokenTrace(torch.tensor([1, 2]))
    trace.add("list", [1, 2.5]).add("numpy", np.array([1.0, 2.0])).add("torch", torch.tensor([3, 4]))
    assert trace.rows()[1] == {
        "id": 2, "text": None, "start": None, "end": None, "list": 2.5, "numpy": 2.0, "torch": 4,
    }  # fmt: skip
    with pytest.raises(BadInputError, match="3 values for 2 tokens"):
        trace.add("long", [1, 2, 3])
    with pytest.raises(BadInputError, match="texts has 1"):
        TokenTrace([1, 2], texts=["a"])


@given(st.lists(st.tuples(st.integers(0, 50_000), st.text(), VALUES, st.one_of(st.none(), st.text()))))
@settings(max_examples=40, deadline=None)
def test_jsonl_and_parquet_round_trip(rows):
    import tempfile
    from pathlib import Path

    trace = TokenTrace(
        [row[0] for row in rows],
        {"number": [row[2] if row[2] is None else float(row[2]) for row in rows], "word": [row[3] for row in rows]},
        [row[1] for row in rows],
        [(i, i + 1) for i in range(len(rows))] or None,
        title="t",
        station="s",
    )
    with tempfile.TemporaryDirectory() as folder:
        for ending in ("jsonl", "parquet"):
            back = TokenTrace.load(trace.save(Path(folder) / f"x.{ending}"))
            assert back.rows() == trace.rows()
            assert (back.title, back.station, list(back.columns)) == ("t", "s", ["number", "word"])


def test_values_that_json_cannot_say(tmp_path):
    trace = TokenTrace([1, 2, 3], {"x": [math.inf, -math.inf, math.nan]}, ["a", "b", "c"])
    back = TokenTrace.load(trace.save(tmp_path / "x.jsonl")).columns["x"]
    assert back[:2] == [math.inf, -math.inf]
    assert math.isnan(back[2])
    json.loads((tmp_path / "x.jsonl").read_text().splitlines()[1], parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("content", ["", "{", "[]\n", '{"columns": ["x"], "title": "", "station": ""}\n{"id": 1}\n'])
def test_damaged_files(tmp_path, content):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(BadInputError, match="not a readable trace"):
        TokenTrace.load(path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(BadInputError, match="not a readable trace"):
        TokenTrace.load(tmp_path / "x.parquet")
    with pytest.raises(BadInputError, match="no trace file"):
        TokenTrace.load(tmp_path / "absent.jsonl")
    with pytest.raises(BadInputError, match=r"\.csv"):
        example().save(tmp_path / "x.csv")


def test_spans_are_bytes_and_texts_join_to_the_text(embedded_tokenizer):
    text = "Grüße 🦜, 你好!"
    trace = TokenTrace(embedded_tokenizer(text)["input_ids"]).with_text(embedded_tokenizer)
    raw = text.encode()
    assert trace.spans[-1][1] == len(raw)
    assert all(a[1] == b[0] for a, b in zip(trace.spans, trace.spans[1:], strict=False))
    for piece, (start, end) in zip(trace.texts, trace.spans, strict=True):
        assert raw[start:end].decode("utf-8", "replace") == piece
    special = TokenTrace([embedded_tokenizer.eos_token_id]).with_text(embedded_tokenizer)
    assert special.texts == [embedded_tokenizer.eos_token]


def test_colours():
    trace = example()
    score = trace.colours("score")
    assert score[2] is None
    assert score[0] == "#440154"
    assert score[3] == "#fde725"
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in score if colour)
    source = trace.colours("source")
    assert source[0] == source[2] != source[1]
    assert len(set(TokenTrace([1, 2], {"flat": [3.0, 3.0]}).colours("flat"))) == 1
    with pytest.raises(BadInputError, match="It has: score, source, sure"):
        trace.numeric("absent")


def test_terminal_rendering():
    console = Console(record=True, width=80, force_terminal=True, color_system="truecolor", file=open("/dev/null", "w"))
    for column in ("score", "source", "sure", None):
        example().print(column, console)
    TokenTrace([1, 2]).print(None, console)
    text = console.export_text()
    assert "a <title>" in text
    assert "Hello <b>world</b>⏎" in text
    assert "uncoloured: no value" in text
    assert "draft" in text
    assert "<1><2>" in text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_html_is_one_safe_file(tmp_path):
    nasty = TokenTrace(
        [1], {'x"><script>alert(1)</script>': [1.0]}, texts=["</script><script>alert(2)</script>"], title="<img src=x>"
    )
    page = render_html([example(), nasty], tmp_path / "x.html")
    assert (tmp_path / "x.html").read_text(encoding="utf-8") == page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert page.count("<script") == 2  # data and code; nothing smuggled in
    assert "<img" not in page
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page, re.S)[1])
    assert data[0]["tokens"] == example().texts
    assert data[1]["tokens"] == nasty.texts


def test_a_column_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="Did you mean score"):
        example().to_html(tmp_path / "x.html", "scor")
    assert not (tmp_path / "x.html").exists()


def test_one_legend_holds_for_all_traces_of_a_page():
    """Colours mean the same in every trace: one scale, one set of categories."""
    first = TokenTrace([1, 2], {"x": [0.0, 1.0], "kind": ["draft", "target"]}, ["a", "b"])
    second = TokenTrace([3, 4], {"x": [1.0, 5.0], "kind": ["bonus", "draft"]}, ["c", "d"])
    for beside in (False, True):
        page = render_html([first, second], beside=beside)
        data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page, re.S)[1])
        one, two = (trace["columns"] for trace in data)
        assert one["x"]["low"] == two["x"]["low"] == 0 and one["x"]["high"] == two["x"]["high"] == 5
        assert one["x"]["colours"][1] == two["x"]["colours"][0] != two["x"]["colours"][1]
        assert one["kind"]["categories"] == two["kind"]["categories"] == ["draft", "target", "bonus"]
        assert one["kind"]["colours"][0] == two["kind"]["colours"][1]
        assert len({*one["kind"]["colours"], *two["kind"]["colours"]}) == 3


def test_texts_that_look_like_the_template_stay_texts():
    trace = TokenTrace([1], {"{{ramp}}": [1.0]}, ["{{data}}"], title="{{options}}")
    page = render_html([trace], before="<p>{{title}}</p>")
    assert "<title>{{options}}</title>" in page and "<p>{{title}}</p>" in page
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page, re.S)[1])
    assert data[0]["tokens"] == ["{{data}}"] and list(data[0]["columns"]) == ["{{ramp}}"]


ACTS = """
<script>
const seen = [], key = (name, at) => at.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
const note = what => seen.push(what + ":" + (getComputedStyle(tip).display === "none" ? "none" : tip.innerText));
const stop = () => document.querySelectorAll('main [tabindex="0"]');
window.onload = () => {
  const first = stop()[0];
  first.focus(); note("focus");
  key("ArrowRight", document.activeElement); note("right");
  key("End", document.activeElement); note("end");
  key("ArrowRight", document.activeElement); note("stays");
  key("ArrowUp", document.activeElement); note("up");
  key("Home", document.activeElement); note("home");
  seen.push("said:" + said.textContent);
  seen.push("stops:" + stop().length);
  key("Escape", document.activeElement); note("escape");
  document.querySelectorAll("span[data-t]")[2].click(); note("tap");
  main.dispatchEvent(new MouseEvent("mouseleave")); note("pointer gone");
  document.querySelector("h1").click(); note("elsewhere");
  document.body.dataset.seen = JSON.stringify(seen);
};
</script>"""


def in_browser(path, tmp_path, *flags):
    """What Chromium makes of a page."""
    return subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", *flags,
         f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()],
        capture_output=True, text=True, encoding="utf-8", timeout=240, check=True,
    ).stdout  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.slow
def test_values_are_reached_by_keyboard_and_by_touch(tmp_path):
    path = tmp_path / "x.html"
    page = render_html([example(), example()], None, "score")
    path.write_text(page.replace("</body>", ACTS + "</body>"), encoding="utf-8")
    dom = in_browser(path, tmp_path, "--dump-dom")
    seen = dict(item.split(":", 1) for item in json.loads(html.unescape(re.search('data-seen="(.*?)"', dom)[1])))
    tokens = [json.dumps(text) for text in example().texts]
    assert seen["focus"].startswith(tokens[0]) and "token id" in seen["focus"]
    assert seen["right"].startswith(tokens[1])
    assert seen["end"].startswith(tokens[3]) and seen["stays"] == seen["end"]
    assert seen["up"] != seen["end"]  # the text has a line break: up leads to the line before
    assert seen["home"] == seen["focus"]
    assert tokens[0] in seen["said"] and "score" in seen["said"]  # what a screen reader says
    assert seen["stops"] == "2"  # the Tab key stops once a text
    assert seen["escape"] == seen["elsewhere"] == "none"
    assert seen["tap"].startswith(tokens[2]) and seen["pointer gone"] == seen["tap"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.slow
def test_html_works_in_a_browser(tmp_path):
    path = tmp_path / "x.html"
    example().to_html(path, "source")
    dom = in_browser(path, tmp_path, "--dump-dom")
    assert dom.count('data-t="0"') == 4
    assert "rgb(76, 120, 168)" in dom  # the colour of "draft"
    assert '<option value="source" selected' in dom
    assert "uncoloured: no value" in dom
    assert "world" in re.sub(r"<[^>]+>", "", dom.split("<main")[1].replace("&lt;b&gt;wor", "wor"))


def test_off_costs_nothing():
    """Without ``trace_enabled`` a decoder fills no column and makes no trace."""
    from everytoken.generation.dyspec import DySpec

    from ..conftest import tiny_llama

    target = tiny_llama(23, seed=1)
    decoder = DySpec(target, budget=4)
    target.generate(torch.tensor([[1, 2]]), max_new_tokens=8, custom_generate=decoder)
    assert decoder.trace == []


def test_thousands_of_tokens_render(tmp_path):
    trace = TokenTrace(list(range(20_000)), {"x": [float(i) for i in range(20_000)]}, ["tok "] * 20_000)
    trace.to_html(tmp_path / "x.html")
    assert len(trace.render("x")) > 80_000
