"""Drafts without a model: how the text, or a corpus, went on after words like the last ones.

The last tokens of a text often stand somewhere before: in the prompt, in what was written since, or in a corpus. What
followed there is proposed again. All places count, each by how many tokens before it agree: with ``c_n(y)`` the number
of places where at least ``n`` tokens agree and ``y`` follows, ``C_n`` their sum over y and ``e_n`` the number of
different ``y``, the estimate is built from one agreeing token up to ``longest`` ones::

    p_n(y) = (c_n(y) + e_n p_{n-1}(y)) / (C_n + e_n),    p_0 = 0

(Witten and Bell's way to mix contexts; what is left over is the chance that something new follows). How far that can be
believed differs from text to text, so every longest agreement has a score of its own: how often the likeliest
continuation was right, counted while the text grows.

Nothing is drawn here. A node is a function of the text and of its path, so verification can follow the target's own
choice wherever it is in the tree, and no distribution has to be corrected for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import BadInputError
from ...core.settings import read_text

BREAK = -1
"""Stands between the texts of a corpus; it agrees with no token."""
EXPECTED = (0.0, 0.15, 0.45, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8)
"""How often the likeliest continuation is right by the number of agreeing tokens, before anything was counted (rounded
from thirty answers of a 135M chat model)."""
WEIGHT = 6.0
"""How many counted cases that expectation is worth."""
Tokens = np.ndarray
NOTHING: tuple[Tokens, Any, int] = (np.empty(0, dtype=np.int32), np.empty(0), 0)


class Source:
    """Tokens to search. ``size`` of ``tokens`` are filled."""

    def __init__(self, tokens: Tokens):
        self.tokens, self.size = tokens, len(tokens)

    def after(self, token: int) -> Tokens:
        """The places that follow an occurrence of ``token``, where there is a token."""
        return np.flatnonzero(self.tokens[: max(self.size - 1, 0)] == token) + 1

    def find(self, suffix: Sequence[int], longest: int) -> tuple[Tokens, Tokens]:
        """Places that could go on with ``suffix`` and how many tokens before each agree with its end."""
        places = self.after(suffix[-1])
        agreeing = np.ones(len(places), dtype=np.int64)
        alive = np.arange(len(places))
        for back in range(2, min(longest, len(suffix)) + 1):
            before = places[alive] - back
            alive = alive[(before >= 0) & (self.tokens[before] == suffix[-back])]
            if not len(alive):
                break
            agreeing[alive] = back
        return places, agreeing


class GrowingText(Source):
    """The text so far."""

    def __init__(self) -> None:
        super().__init__(np.empty(256, dtype=np.int32))
        self.size = 0

    def append(self, tokens: Sequence[int]) -> None:
        needed = self.size + len(tokens)
        if needed > len(self.tokens):
            room = np.empty(max(2 * len(self.tokens), needed), dtype=np.int32)
            room[: self.size] = self.tokens[: self.size]
            self.tokens = room
        self.tokens[self.size : needed] = tokens
        self.size = needed


class Corpus(Source):
    """Texts that may be continued, sorted once by token so that a search does not read them all.

    Args:
        texts: tokens of each.
    """

    def __init__(self, texts: Iterable[Sequence[int]]):
        parts = [np.asarray([*text, BREAK], dtype=np.int32) for text in texts]
        super().__init__(np.concatenate(parts) if parts else np.empty(0, dtype=np.int32))
        self.order = np.argsort(self.tokens[:-1], kind="stable")
        self.sorted = self.tokens[:-1][self.order]

    def after(self, token: int) -> Tokens:
        first, last = np.searchsorted(self.sorted, [token, token + 1])
        return self.order[first:last] + 1


class TextMatches:
    """Continuations of one text, from its own earlier parts and from a corpus.

    Args:
        corpus: further texts, or None.
        vocab: the target's vocabulary size; other tokens are not proposed.
        longest: how many agreeing tokens are told apart, at most.
    """

    def __init__(self, vocab: int, corpus: Corpus | None = None, longest: int = 8):
        self.vocab, self.longest = vocab, longest
        self.text = GrowingText()
        self.sources: list[Source] = [self.text] if corpus is None or not corpus.size else [self.text, corpus]
        self.expected = np.interp(np.arange(longest + 1), np.arange(len(EXPECTED)), EXPECTED)
        self.cases = np.full(longest + 1, WEIGHT)
        self.right = self.expected * WEIGHT
        self.least = 0.0
        self._pairs: set[tuple[int, int]] = set()
        self._known: dict[tuple[int, ...], tuple[Tokens, Any, int]] = {}  # of this round, by path

    def begin(self, least: float = 0.0) -> None:
        """A round begins, and continuations of less chance than ``least`` will not be used.

        Where one agreeing token is worth less, nothing is searched unless two agree: that is seen at a glance.
        """
        self.least = least
        self._known = {}

    def commit(self, tokens: Sequence[int]) -> None:
        """New text; every token after the first call is counted as a case that was guessed right or wrong."""
        if not self.text.size:
            self._append(tokens)
            return
        for taken, token in enumerate(tokens):
            following, chances, agreeing = self._after(tuple(tokens[:taken]), [])
            if len(following):
                self.cases[agreeing] += 1
                self.right[agreeing] += following[chances.argmax()] == token
            self._append([token])
        self._known = {}

    def _append(self, tokens: Sequence[int]) -> None:
        before = self.text.tokens[self.text.size - 1 : self.text.size].tolist()
        self._pairs.update(pairwise([*before, *tokens]))
        self.text.append(tokens)

    def _after(self, key: tuple[int, ...], path: Sequence[int]) -> tuple[Tokens, Any, int]:
        """``_continuations`` of the text and ``path``, once a round; ``key`` is the path from where the round began."""
        known = self._known.get(key)
        if known is None:
            suffix = self._suffix(path)
            if self._cannot_pay(suffix):
                known = NOTHING
            else:
                known = self._continuations(suffix)
            self._known[key] = known
        return known

    def _cannot_pay(self, suffix: list[int]) -> bool:
        """Whether at most one token agrees anywhere, and what that is worth is known to be too little."""
        if len(self.sources) > 1 or self.right[1] >= self.least * self.cases[1]:
            return False
        return tuple(suffix[-2:]) not in self._pairs

    def candidates(self, path: Sequence[int], width: int) -> tuple[list[int], list[float]]:
        """What may follow the text and ``path``: at most ``width`` tokens, and the chance of each, falling."""
        tokens, chances, agreeing = self._after(tuple(path), path)
        if not len(tokens):
            return [], []
        order = np.argsort(-chances, kind="stable")[:width]
        believed = min(self.right[agreeing] / self.cases[agreeing] / chances[order[0]], 1 / chances.sum())
        return tokens[order].tolist(), (chances[order] * believed).tolist()

    def _suffix(self, path: Sequence[int]) -> list[int]:
        missing = max(self.longest - len(path), 0)
        start = max(self.text.size - missing, 0)
        return [*self.text.tokens[start : self.text.size].tolist(), *path[-self.longest :]]

    def _continuations(self, suffix: Sequence[int]) -> tuple[Tokens, Tokens, int]:
        """Tokens that followed, the estimate for each, and the longest agreement."""
        following, agreeing = [], []
        for source in self.sources:
            places, lengths = source.find(suffix, self.longest)
            following.append(source.tokens[places])
            agreeing.append(lengths)
        after, lengths = np.concatenate(following), np.concatenate(agreeing)
        known = (after >= 0) & (after < self.vocab)
        after, lengths = after[known], lengths[known]
        if not len(after):
            return after, np.empty(0), 0
        tokens, which = np.unique(after, return_inverse=True)
        chances, most = np.zeros(len(tokens)), int(lengths.max())
        for length in range(1, most + 1):
            counts = np.bincount(which[lengths >= length], minlength=len(tokens))
            different = np.count_nonzero(counts)
            chances = (counts + different * chances) / (counts.sum() + different)
        return tokens, chances, most


def corpus_tokens(corpus: Any, tokenizer: Any = None) -> list[Sequence[int]]:
    """The tokens of a corpus, text by text.

    Args:
        corpus: a file, texts, or the tokens of texts.
        tokenizer: reads texts; None where ``corpus`` holds tokens.

    Raises:
        BadInputError: texts without a tokenizer, or neither texts nor tokens.
    """
    if isinstance(corpus, (str, Path)):
        corpus = [read_text(Path(corpus))]
    texts = list(corpus)
    if all(isinstance(text, str) for text in texts):
        if tokenizer is None:
            raise BadInputError(
                "A corpus of texts needs the model's tokenizer.",
                "Call DySpec(corpus=...).prepare(tokenizer, vocab_size), or pass the tokens of the texts.",
            )
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    try:
        return [np.asarray(text, dtype=np.int32).reshape(-1).tolist() for text in texts]
    except (TypeError, ValueError, OverflowError) as error:
        raise BadInputError("A corpus is a file, texts, or the tokens of texts.") from error
