"""The daily list: the recorded shape of an answer, what it must not do, and what happens without a network."""

from __future__ import annotations

import http.server
import json
import threading
from contextlib import contextmanager

import pytest

from everytoken.catalog import daily
from everytoken.catalog.daily import daily_papers, mark, read_answer
from everytoken.catalog.search import can_search_by_meaning
from everytoken.core.errors import BadInputError, EverytokenError

from ..cli.common import run
from .site import HOSTILE


def element(name="2611.01234", title="A Title", **inner):
    """An element as the list gives it: most fields sit inside ``paper``; the outer day is not the day of listing."""
    paper = {"id": name, "title": title, "summary": "Words.", "authors": [{"name": "A"}, {"name": "B"}], "upvotes": 5}
    paper |= {"submittedOnDailyAt": "2026-11-27T00:00:00.000Z", "githubRepo": "https://github.com/a/b"} | inner
    return {"paper": paper, "publishedAt": "2026-11-20T00:00:00.000Z", "title": title}


@pytest.fixture
def offline(monkeypatch):
    def fetch(date=""):
        raise daily.Offline("no route")

    monkeypatch.setattr(daily, "fetch", fetch)


@contextmanager
def hub(answer, monkeypatch, status=200):
    """A hub on loopback; yields the requests that it gets, with their headers."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    got = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            got.append((self.path, dict(self.headers)))
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    try:
        yield got
    finally:
        server.shutdown()
        close_session()


def test_fields_come_from_inside_the_paper():
    (paper,) = read_answer([element()])
    assert (paper.listed, paper.authors, paper.upvotes) == ("2026-11-27", 2, 5)
    assert paper.code == "https://github.com/a/b" and paper.url.endswith("/2611.01234")


@pytest.mark.parametrize("name", ["2611.01234\n", "../../x", "2611.1", "٢٦١١.01234", "2611.01234v", None, 5])
def test_ids_that_are_none_are_left_out(name):
    assert read_answer([element(name)]) == []


def test_hostile_and_strange_elements():
    (paper,) = read_answer(
        [element(title=HOSTILE + "\x00\n" + "x" * 999, githubRepo="javascript:alert(1)", upvotes="9")]
    )
    assert len(paper.title) <= 300 and "\n" not in paper.title and paper.title.startswith("<img src=x")
    assert paper.code == "" and paper.upvotes == 0
    assert read_answer([None, 3, {}, {"paper": []}, element(title="  "), element(title=None)]) == []
    assert len(read_answer([element(f"2611.{number:05}") for number in range(500)])) == daily.MOST


def test_the_saved_token_is_not_sent_and_the_answer_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "s" * 30)
    with hub([element()], monkeypatch) as got:
        found = daily_papers("2026-11-27", tmp_path, related=False)
    assert not found.cached and len(found.papers) == 1
    ((path, headers),) = got
    assert "date=2026-11-27" in path
    assert "authorization" not in {name.lower() for name in headers} and "hf_s" not in str(headers)
    with hub([], monkeypatch, status=500):
        again = daily_papers("2026-11-27", tmp_path, related=False)
    assert again.cached and again.papers == found.papers and abs((again.read - found.read).total_seconds()) < 5


def test_an_answer_of_another_form(tmp_path, monkeypatch):
    with hub({"error": "x"}, monkeypatch), pytest.raises(EverytokenError, match="another form"):
        daily_papers("", tmp_path, related=False)


def kept(folder, date, read):
    folder.mkdir(exist_ok=True)
    answer = {"read": read, "date": date, "answer": [element(title=f"Of {date or 'latest'} <b>[red]")]}
    (folder / f"{date or 'latest'}.json").write_text(json.dumps(answer))


def test_offline_only_what_was_asked_for(tmp_path, offline):
    with pytest.raises(EverytokenError, match="no answer is cached"):
        daily_papers("", tmp_path)
    kept(tmp_path, "2026-11-26", "2026-11-26T08:00:00+00:00")
    kept(tmp_path, "2026-11-25", "2026-11-27T08:00:00+00:00")
    (tmp_path / "broken.json").write_text("{")
    assert daily_papers("", tmp_path, related=False).papers[0].title.startswith("Of 2026-11-25")  # read last
    assert daily_papers("2026-11-26", tmp_path, related=False).cached
    with pytest.raises(EverytokenError, match="2026-11-24") as error:
        daily_papers("2026-11-24", tmp_path)
    assert "2026-11-26" in str(error.value)
    with pytest.raises(BadInputError, match="not a date"):
        daily_papers("2026-11-31", tmp_path)


def test_the_command(tmp_path, offline, monkeypatch):
    monkeypatch.setattr(daily, "can_embed", lambda: False)
    kept(tmp_path / "daily", "", "2026-11-26T08:00:00+00:00")
    (tmp_path / "daily").mkdir(exist_ok=True)
    told = run("papers", "daily", EVERYTOKEN_CACHE=str(tmp_path)).stdout
    assert "what was read on 2026-11-26 08:00 UTC" in told and "<b>[red]" in told  # a title is no markup
    found = json.loads(run("papers", "daily", "--json", EVERYTOKEN_CACHE=str(tmp_path)).stdout)
    assert found["cached"] is True and found["papers"][0]["arxiv"] == "2611.01234"
    wrong = run("papers", "daily", "--date", "tomorrow", EVERYTOKEN_CACHE=str(tmp_path))
    assert wrong.returncode == 2 and "not a date" in wrong.stderr


@pytest.mark.slow
@pytest.mark.skipif(not can_search_by_meaning(), reason="the search extra is not installed")
def test_relatives_of_a_station_are_marked_and_others_are_not():
    near = {
        "Faster decoding with trees of draft tokens that a large model verifies at once": "generation",
        "Token-level direct preference optimization with a forward KL constraint": "preference",
        "Pruning redundant visual tokens in vision-language models without training": "reduction",
    }
    far = ["Protein folding with equivariant graph networks", "A data set of bird songs in tropical forests",
           "Gaussian splatting of large outdoor scenes"]  # fmt: skip
    answer = [element(f"2611.{place:05}", title, summary="") for place, title in enumerate([*near, *far])]
    marked = {paper.title: paper.station for paper in mark(read_answer(answer))}
    assert {title: marked[title] for title in near} == near
    assert all(marked[title] == "" for title in far)
