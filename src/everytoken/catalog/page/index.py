"""The search index of the static page: what a browser needs to search by words as ``catalog.search`` does, and by
meaning without a model.

By words: counts of stems a paper, for the same BM25. By meaning: a page has no encoder, so the encoder runs here, once,
over the words of its own vocabulary. Each word is kept with the papers that it is nearest to, as

    likeness(word, paper) = cos(word, paper) - mean over papers of cos(word, .)

and the browser adds up the likenesses of a query's words. Both rankings are merged by reciprocal rank, as in
``catalog.search``; this one weighs a little less, for words alone tell less than a sentence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypedDict

from ...core.embedding import embed, embed_once, vocabulary
from ...core.progress import Report, silent
from ..cards import Card
from ..search import ENDINGS, STOP, document, meaning_text, words

NEAREST = 8
"""Papers kept for a word of the encoder's vocabulary."""
LEAST = 0.06
"""Least likeness that is kept."""
STEPS = 250
"""A likeness of 1, in the whole numbers of the index."""


class SearchIndex(TypedDict):
    """What ``site.js`` reads.

    Attributes:
        slugs: the papers, in the page's order; places in the other fields are places in this list.
        exact: what a query may be in full to come first: slug, arXiv id, lower-case title.
        words: stem -> its count a paper.
        lengths: stems of each paper.
        stop, endings: of ``catalog.search.words``.
    """

    slugs: list[str]
    exact: list[list[str]]
    words: list[dict[str, int]]
    lengths: list[int]
    stop: list[str]
    endings: list[str]


def search_index(cards: Sequence[Card]) -> SearchIndex:
    """The index of some cards."""
    texts = [Counter(words(document(card))) for card in cards]
    return SearchIndex(
        slugs=[card.slug for card in cards],
        exact=[[text for text in (card.slug, card.arxiv, card.title.lower()) if text] for card in cards],
        words=[dict(sorted(text.items())) for text in texts],
        lengths=[sum(text.values()) for text in texts],
        stop=sorted(STOP),
        endings=list(ENDINGS),
    )


def word_meanings(cards: Sequence[Card], report: Report = silent) -> dict[str, str]:
    """Words of the encoder's vocabulary and of the cards, each with the papers that it is nearest to; see the module.

    A word maps to ``"place:likeness ..."``, the nearest first, both numbers in base 36. The first call embeds the
    vocabulary (a minute on one core); its vectors are kept in the cache folder.

    Raises:
        MissingExtraError: the ``search`` extra is not installed.
    """
    import numpy as np

    purpose = "A page that is searched by meaning"
    own = {word for card in cards for word in re.findall(r"[a-z]{3,}", document(card).lower())}
    known = sorted({word for word in vocabulary(purpose) if re.fullmatch(r"[a-z]{3,}", word)} - STOP)
    rest = sorted(own - set(known) - STOP)
    vectors = (
        np.concatenate([embed_once(known, purpose, report), embed(rest, purpose)])
        if rest
        else embed_once(known, purpose, report)
    )
    papers = embed([meaning_text(card) for card in cards], purpose)
    likeness = vectors @ papers.T
    likeness -= likeness.mean(axis=1, keepdims=True)
    steps = np.rint(likeness * STEPS).astype(int)
    order = np.argsort(-steps, axis=1, kind="stable")[:, :NEAREST]
    table: dict[str, str] = {}
    for word, row, places in zip([*known, *rest], steps, order, strict=True):
        kept = [f"{_base36(int(place))}:{_base36(int(row[place]))}" for place in places if row[place] >= LEAST * STEPS]
        if kept:
            table[word] = " ".join(kept)
    return dict(sorted(table.items()))


def _base36(number: int) -> str:
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    text = ""
    while True:
        number, rest = divmod(number, 36)
        text = digits[rest] + text
        if not number:
            return text


def as_data(value: Any) -> str:
    """JSON that may stand inside a page's script block: nothing in it ends the block or the line."""
    import json

    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text
