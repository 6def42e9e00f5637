"""The site: what its files hold, and how it behaves in a real browser."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from everytoken.catalog import load_catalog
from everytoken.catalog.page.entries import entries
from everytoken.catalog.page.feed import ATOM, atom, check_base, plain
from everytoken.catalog.page.index import as_data
from everytoken.catalog.page.render import site_files, web, write_site
from everytoken.catalog.search import by_words, can_search_by_meaning
from everytoken.cli.papers_site import site_entries
from everytoken.core.errors import BadInputError

from ..cli.common import run
from .site import CHROMIUM, HOSTILE, browser, hostile_entries, served

FOLDER = Path(__file__).parent
PARAPHRASES = {name: json.loads((FOLDER / f"{name}.json").read_text()) for name in ("paraphrases", "reworded")}
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


class Seen(HTMLParser):
    """Tags and texts of a page, as a browser takes them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.slow
def test_a_paper_has_facts_figures_picture_and_commands():
    made = {entry.card.slug: entry for entry in site_entries()}
    assert set(made) == set(load_catalog())
    files = site_files(list(made.values()), meaning=False)
    page = html.unescape(files["papers/tdpo.html"].decode())
    card, first = made["tdpo"].card, made["tdpo"].measured[0]
    for text in (card.title, card.summary, card.claim, card.figure, first.value, first.told, first.why,
                 "everytoken try tdpo", "everytoken reproduce tdpo"):  # fmt: skip
        assert text in page
    assert "<title>" in files["pictures/tdpo.svg"].decode()
    for slug, entry in made.items():
        assert bool(entry.measured) == (entry.card.status == "measured")
        assert f"pictures/{slug}.svg" in files or not entry.measured
        assert f"papers/{slug}.html" in files


@pytest.mark.slow
def test_links_of_all_pages_lead_to_files_and_nothing_is_fetched_from_elsewhere():
    files = site_files(site_entries(pictures=False), meaning=False)
    for name, data in files.items():
        if not name.endswith(".html"):
            continue
        up = "../" if "/" in name else ""
        for tag, attributes in Seen(data.decode()).tags:
            link = attributes.get("src") or attributes.get("href") or ""
            if tag == "a" and link.startswith("https://"):
                continue
            if link and not link.startswith("#"):
                assert re.sub(rf"^{re.escape(up)}", "", link) in files, (name, link)


def test_hostile_titles_stay_text_everywhere():
    made = hostile_entries()
    files = site_files(made, meaning=False)
    for name in ("index.html", f"papers/{made[0].card.slug}.html"):
        page = files[name].decode()
        seen = Seen(page)
        assert not [tag for tag, _ in seen.tags if tag == "img"]
        assert "onerror" not in {key for _, attributes in seen.tags for key in attributes}
        assert "javascript:" not in page
    hostile = next(entry for entry in made if entry.card.title == HOSTILE)
    assert HOSTILE in html.unescape(files["index.html"].decode())
    data = re.search(r'id="index">(.*?)</script>', files["index.html"].decode(), re.S)[1]
    place = json.loads(data)["slugs"].index(hostile.card.slug)
    assert json.loads(data)["exact"][place][-1] == HOSTILE.lower()
    assert json.loads(as_data(HOSTILE)) == HOSTILE and "<" not in as_data(HOSTILE)
    titles = [item.text for item in ElementTree.fromstring(files["feed.atom"]).iter(f"{{{ATOM}}}title")]
    assert plain(HOSTILE) in titles


def test_links_are_https_only():
    assert web("https://a.example/x") and not any(
        map(
            web,
            ("javascript:alert(1)", "http://a.example", "https://", "//a.example", "https://a.example/\n", " data:x"),
        )
    )


def test_the_feed_is_valid_atom():
    made = site_entries(pictures=False)
    data = atom(made, "https://example.org/papers")
    assert data == atom(list(reversed(made)), "https://example.org/papers")  # the same bytes
    feed = ElementTree.fromstring(data)
    for parent in (feed, *feed.iter(f"{{{ATOM}}}entry")):
        for name in ("id", "title", "updated"):
            assert len(parent.findall(f"{{{ATOM}}}{name}")) == 1
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT00:00:00Z", parent.find(f"{{{ATOM}}}updated").text)
    names = [item.text for item in feed.iter(f"{{{ATOM}}}id")]
    assert len(set(names)) == len(made) + 1 and all(re.fullmatch(r"tag:[\w.]+,\d{4}:[\w/-]+", name) for name in names)
    feedparser = pytest.importorskip("feedparser")
    read = feedparser.parse(data)
    assert not read.bozo and len(read.entries) == len(made)
    assert [link.href for link in read.feed.links if link.rel == "self"] == ["https://example.org/papers/feed.atom"]


def test_control_characters_reach_no_format():
    assert plain("a\x00b\x0b\ud800c\ufffe\nd") == "a b c d" and len(plain("x" * 99, 10)) == 10


@pytest.mark.parametrize("base", ["javascript:x", "https://", "ftp://a.example", "https://a.example/?q", "https://a b"])
def test_a_base_that_is_no_address(base):
    with pytest.raises(BadInputError, match="not"):
        check_base(base)


def test_written_again_and_only_over_its_own(tmp_path):
    made = hostile_entries()
    trace = tmp_path / "traces"
    trace.mkdir()
    (trace / f"{made[0].card.slug}.html").write_text("<!doctype html>")
    with_trace = entries(lambda card: None, trace, [entry.card for entry in made], pictures=False)
    out = tmp_path / "site"
    assert f"traces/{made[0].card.slug}.html" in write_site(out, with_trace, meaning=False)
    before = {path: path.read_bytes() for path in out.rglob("*.html")}
    (out / "mine.txt").write_text("stays")
    write_site(out, with_trace, meaning=False)
    assert {path: path.read_bytes() for path in out.rglob("*.html")} == before
    write_site(out, made[:1], meaning=False)
    assert len(list(out.glob("papers/*.html"))) == 1 and not list(out.glob("traces/*.html"))
    assert (out / "mine.txt").read_text() == "stays"
    with pytest.raises(BadInputError, match="holds other things"):
        write_site(trace, made, meaning=False)
    (trace / "nothing.html").write_text("")
    with pytest.raises(BadInputError, match="traces of no paper: nothing"):
        entries(lambda card: None, trace)


@pytest.mark.slow
def test_the_site_is_built_by_a_command(tmp_path):
    told = run("papers", "build", tmp_path / "site", "--words")
    assert told.returncode == 0 and (tmp_path / "site" / "index.html").is_file()


def test_the_commands_refuse_in_a_sentence(tmp_path):
    for arguments, words in (
        (["build", "pyproject.toml"], "is a file"),
        (["build", tmp_path / "x", "--base-url", "nonsense"], "not the address"),
        (["build", tmp_path / "x", "--traces", tmp_path / "none"], "no folder"),
        (["serve", "--smtp", "localhost:25"], "--from, --contact, --base-url"),
        (["digest"], "--from"),
        (["digest", "--from", "d@a.example", "--base-url", "https://a.example"], "--contact"),
        (["digest", "--from", "d@a.example", "--base-url", "https://a.example", "--contact", "x", "--send"], "relay"),
        (["digest", "--check", "absent.eml"], "no file"),
        (["subscribers", "--remove", "--data", tmp_path / "x.sqlite"], "needs an address"),
    ):
        told = run("papers", *arguments)
        assert told.returncode == 2 and words in told.stderr.replace("\n", " "), (arguments, told)
    base = ["--from", "d@a.example", "--base-url", "https://a.example", "--contact", "x", "--no-daily"]
    told = run("papers", "digest", *base, "--data", tmp_path / "x.sqlite", "--out", tmp_path / "mails")
    assert told.returncode == 0 and "would send   0" in told.stdout


# -- in a browser -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "site"
    write_site(folder, site_entries(), meaning=can_search_by_meaning())
    return folder


def shown(page):
    return page.evaluate("document.body.dataset.shown").split()


def until(page, holds):
    """Waits for what a script does later; the page's own policy forbids that strings are run in it."""
    for _ in range(200):
        if holds():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it did not happen")


def search(page, query):
    page.fill("#query", query)
    return shown(page)


@pytest.mark.rotating
@needs_browser
def test_search_in_the_browser_finds_what_python_finds(site):
    """From the disk, without a server. By words exactly as Python; by meaning as often as is asked."""
    cards = [entry.card for entry in site_entries(pictures=False)]
    with browser() as (page, complaints):
        page.goto((site / "index.html").as_uri())
        assert page.locator("#papers li").count() == len(cards)
        recalls = {}
        for name, queries in PARAPHRASES.items():
            hits = [slug in search(page, query)[:3] for slug, query in queries.items()]
            recalls[name] = sum(hits) / len(hits)
        for card in cards:
            for query in filter(None, (card.title, card.slug, card.arxiv)):
                found = next(item for item in cards if item.slug == search(page, query)[0])
                assert found.slug == card.slug or (query == found.arxiv == card.arxiv)  # a paper may have two methods
        assert not complaints
        if can_search_by_meaning():
            # the second set is harder: its goal of 0.9 is not reached yet
            assert recalls["paraphrases"] >= 0.95 and recalls["reworded"] >= 0.77, recalls
    (site / "words.html").write_text(
        (site / "index.html").read_text(encoding="utf-8").replace("meaning.js", "icon.svg.js"), encoding="utf-8"
    )
    with browser() as (page, _):
        page.goto((site / "words.html").as_uri())
        for query in [*PARAPHRASES["paraphrases"].values(), "zzzz", "__proto__ constructor"]:
            assert search(page, query) == [card.slug for card, _ in by_words(query, cards)], query


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_filters_keyboard_and_accessibility(site, width, scheme):
    playwright_axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    view = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    cards = load_catalog().values()
    with browser(**view) as (page, _):  # axe itself asks for style sheets, which a browser refuses for files
        for path in ("index.html", "papers/tdpo.html", "papers/daily-papers.html"):
            page.goto((site / path).as_uri())
            found = playwright_axe.Axe().run(page)
            assert found.violations_count == 0, found.generate_report()
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    with browser(**view) as (page, complaints):
        page.goto((site / "index.html").as_uri())
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert dark == (scheme == "dark")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "query"
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.type("drafted tree")
        assert shown(page)[0] == "dyspec" and "papers" in page.inner_text("#count")
        page.keyboard.press("Escape")
        assert len(shown(page)) == len(cards)
        page.keyboard.press("Tab")
        page.keyboard.type("preference")
        assert set(shown(page)) == {card.slug for card in cards if card.station == "preference"}
        page.select_option("#station", "")
        page.select_option("#state", "measured")
        page.select_option("#verdict", "holds")
        some = shown(page)
        held = {entry.card.slug for entry in site_entries(pictures=False) if entry.verdict == "holds"}
        assert set(some) == held
        page.select_option("#order", "date")
        dates = page.evaluate("Array.from(document.querySelectorAll('#papers li:not([hidden])'), i => i.dataset.date)")
        assert dates == sorted(dates, reverse=True) and len(dates) == len(some)
        page.click("button[type=reset]")
        until(page, lambda: len(shown(page)) == len(cards))
        page.fill("#query", "zzzz qqqq")
        assert page.inner_text("#count") == "0 papers"
        page.fill("#query", "dyspec")
        page.locator("#papers li:not([hidden]) a").first.focus()
        page.keyboard.press("Enter")
        page.wait_for_url("**/papers/dyspec.html")
        assert complaints == []


@pytest.mark.slow
@needs_browser
def test_without_script_and_with_hostile_titles(tmp_path):
    write_site(tmp_path / "site", hostile_entries(), meaning=False)
    address = (tmp_path / "site" / "index.html").as_uri()
    with browser(java_script_enabled=False) as (page, _):
        page.goto(address)
        assert page.locator("#papers li").count() == 3 and not page.locator("#filters").is_visible()
    with browser() as (page, complaints):
        page.goto(address)
        titles = [text.strip() for text in page.locator("#papers h2").all_text_contents()]
        assert HOSTILE in titles and page.locator("img").count() == 0
        assert complaints == []


@pytest.mark.slow
@needs_browser
def test_the_served_site_keeps_votes_and_notes(tmp_path):
    pytest.importorskip("starlette")
    from everytoken.catalog.digest.store import Store
    from everytoken.catalog.server import make_app

    made = site_entries(pictures=False)
    with served(make_app(made, Store(tmp_path / "x"), meaning=can_search_by_meaning())) as port:
        with browser() as (page, complaints):
            page.goto(f"http://127.0.0.1:{port}/papers/dyspec.html")
            page.click("#vote")
            page.wait_for_selector("#vote[aria-pressed=true]")
            page.fill("#note", "<b>mine</b>")
            page.click("#keep")
            until(page, lambda: page.inner_text("#said") == "Kept.")
            page.reload()
            page.wait_for_selector("#vote[aria-pressed=true]")
            assert page.input_value("#note") == "<b>mine</b>"
            page.goto(f"http://127.0.0.1:{port}/")
            with page.expect_response("**/api/search?q=*") as answer:
                page.fill("#query", "grow drafted branches")
            until(page, lambda: shown(page) == answer.value.json()["slugs"])
            assert complaints == []
