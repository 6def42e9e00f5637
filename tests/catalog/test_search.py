"""Search: titles come first; paraphrases written by hand find their paper."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everytoken.catalog import load_catalog, search
from everytoken.catalog.search import by_words, can_search_by_meaning, words

PARAPHRASES = json.loads((Path(__file__).parent / "paraphrases.json").read_text())
REWORDED = json.loads((Path(__file__).parent / "reworded.json").read_text())
"""Descriptions that avoid the cards' own words, written before any search was tried on them."""


def recall(meaning, top, queries=PARAPHRASES):
    cards = list(load_catalog().values())
    hits = [slug in [card.slug for card, _ in search(text, cards, meaning)[:top]] for slug, text in queries.items()]
    return sum(hits) / len(hits)


@pytest.mark.parametrize("card", load_catalog().values(), ids=lambda card: card.slug)
def test_title_slug_and_arxiv_id_find_the_paper_first(card):
    cards = list(load_catalog().values())
    for query in (card.title, card.slug):
        assert by_words(query, cards)[0][0].slug == card.slug
    if card.arxiv:
        assert by_words(card.arxiv, cards)[0][0].arxiv == card.arxiv


def test_paraphrases_by_words():
    assert recall(False, 3) >= 0.9


@pytest.mark.slow
@pytest.mark.skipif(not can_search_by_meaning(), reason="the search extra is not installed")
def test_paraphrases_by_meaning():
    assert recall(True, 3) >= 0.9
    assert recall(True, 3, REWORDED) >= 0.86 > recall(False, 3, REWORDED) + 0.05  # where words do not do
    cards = list(load_catalog().values())
    assert search("dyspec", cards, True)[0][0].slug == "dyspec"


def test_nothing_matches():
    assert by_words("zzzz qqqq", list(load_catalog().values())) == []
    assert by_words("", list(load_catalog().values())) == []


@pytest.mark.skipif(not can_search_by_meaning(), reason="the search extra is not installed")
@pytest.mark.parametrize("query", ["pizza recipe", "weather in Paris tomorrow", "zzzz qqqq", "how to knit a sweater"])
def test_nothing_matches_by_meaning_either(query):
    assert search(query, list(load_catalog().values()), True) == []


def test_words():
    assert words("Merging of the Tokens") == words("merged token")
