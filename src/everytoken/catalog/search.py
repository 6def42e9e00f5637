"""Search over cards: by words (BM25 with prefixes) and, with the ``search`` extra, by meaning (packaged MiniLM).

By meaning, both rankings are merged by reciprocal rank, so an exact name always comes first and a paraphrase still
finds its paper. Embeddings of the cards are cached beside the models, keyed by their text.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..core.embedding import can_embed, embed
from .cards import Card

SIMILAR = 0.3
"""Least similarity of meaning of a card that shares no word with the query; unrelated questions reach 0.27 at most."""
STOP = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "by",
        "for",
        "from",
        "how",
        "in",
        "into",
        "is",
        "it",
        "its",
        "of",
        "on",
        "or",
        "so",
        "than",
        "that",
        "the",
        "this",
        "to",
        "what",
        "which",
        "with",
        "you",
        "your",
    ]
)
ENDINGS = (
    "izations",
    "ization",
    "ising",
    "izing",
    "ings",
    "ing",
    "ions",
    "ion",
    "ies",
    "ers",
    "er",
    "ed",
    "es",
    "s",
    "e",
)
"""What ``_stem`` takes off a word, the longest first."""


def words(text: str) -> list[str]:
    """Lower-case words without stop words, plural and verb endings roughly removed."""
    found = [word for word in re.findall(r"[a-z0-9*]+", text.lower()) if word not in STOP]
    return [_stem(word) for word in found]


def _stem(word: str) -> str:
    for ending in ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def document(card: Card) -> str:
    """What is searched: name, title (twice: it weighs more), station, summary and claim."""
    return " ".join(
        [
            card.slug.replace("-", " "),
            card.slug,
            card.title,
            card.title,
            card.station,
            card.summary,
            card.claim,
            card.arxiv,
        ]
    )


def by_words(query: str, cards: Sequence[Card], k1: float = 1.2, b: float = 0.6) -> list[tuple[Card, float]]:
    """Cards that share words with the query, by BM25; a query word also matches longer words that it begins."""
    texts = [Counter(words(document(card))) for card in cards]
    lengths = [sum(text.values()) for text in texts]
    mean = sum(lengths) / max(len(lengths), 1)
    scores = [0.0] * len(cards)
    for word in dict.fromkeys(words(query)):
        counts = []
        for text in texts:
            exact = text.get(word, 0)
            partial = sum(n for other, n in text.items() if other != word and len(word) >= 3 and other.startswith(word))
            counts.append(exact + 0.5 * partial)
        matching = sum(count > 0 for count in counts)
        rarity = math.log(1 + (len(cards) - matching + 0.5) / (matching + 0.5))
        for index, count in enumerate(counts):
            if count:
                scores[index] += rarity * count * (k1 + 1) / (count + k1 * (1 - b + b * lengths[index] / mean))
    for index, card in enumerate(cards):
        if query.strip() and query.strip().lower() in (card.slug, card.arxiv, card.title.lower()):
            scores[index] += 100.0
    ranked = sorted(zip(cards, scores, strict=True), key=lambda pair: -pair[1])
    return [(card, score) for card, score in ranked if score > 0]


def can_search_by_meaning() -> bool:
    """Whether the ``search`` extra is installed."""
    return can_embed()


def _embed(texts: list[str]) -> Any:
    return embed(texts, "Searching by meaning")


def meaning_text(card: Card) -> str:
    """What is embedded of a card."""
    return f"{card.title}. {card.summary}"


def by_meaning(query: str, cards: Sequence[Card]) -> list[tuple[Card, float]]:
    """All cards by cosine similarity of meaning.

    Raises:
        MissingExtraError: the ``search`` extra is not installed.
    """
    import numpy as np

    from ..core.converted import cache_dir

    texts = [meaning_text(card) for card in cards]
    key = hashlib.sha256("\x1f".join(texts).encode()).hexdigest()[:16]
    path = cache_dir() / "search" / f"{key}.npy"
    try:
        vectors = np.load(path)
    except (OSError, ValueError):
        vectors = _embed(texts)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, vectors)
        except OSError:
            pass  # a cache that cannot be written costs a second, no more
    scores = vectors @ _embed([query])[0]
    return sorted(zip(cards, scores.tolist(), strict=True), key=lambda pair: -pair[1])


def search(query: str, cards: Sequence[Card], meaning: bool | None = None) -> list[tuple[Card, float]]:
    """Cards for a query, best first; none where nothing matches.

    Args:
        meaning: True or False, or None for whatever is installed.
    """
    lexical = by_words(query, cards)
    if meaning is None:
        meaning = can_search_by_meaning()
    if not meaning:
        return lexical
    merged: dict[str, float] = {}
    lookup = {card.slug: card for card in cards}
    named = {card.slug for card, _ in lexical}
    near = [(card, score) for card, score in by_meaning(query, cards) if card.slug in named or score >= SIMILAR]
    for weight, ranking in ((1.0, lexical), (1.0, near)):
        for rank, (card, score) in enumerate(ranking):
            merged[card.slug] = merged.get(card.slug, 0) + weight / (8 + rank) + (1.0 if score >= 100 else 0.0)
    return sorted(((lookup[slug], score) for slug, score in merged.items()), key=lambda pair: -pair[1])
