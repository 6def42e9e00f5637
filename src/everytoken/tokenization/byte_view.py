"""A tokenizer seen from its bytes: it encodes bytes, and tells which token sequences can begin an encoding.

A sequence of tokens *can begin an encoding* if the tokenizer produces it, followed by anything or nothing, for some
text. For most sequences the text itself decides. A pre-tokenizer that looks ahead (runs of spaces, contractions), or a
text that ends inside a character, needs a continuation, so a few are tried: ``PROBES``, or ways to finish the
character.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from ..core.errors import BadInputError
from ..core.vocabulary import backend_of

if TYPE_CHECKING:
    from ..core.vocabulary import TokenizerLike
from .base import token_bytes

PROBES = (b"", b"a", b" a", b"1", b".", b"\n", b" ")
MEMORY = 1 << 16
"""Answers remembered."""
_VIEWS: WeakKeyDictionary[TokenizerLike, ByteView] = WeakKeyDictionary()


class ByteView:
    """The lossless view of a tokenizer over bytes.

    Texts are *spelled*: with the space in front that some tokenizers put there (``lead``), so that tokens' bytes add up
    to them.

    Args:
        tokenizer: a fast tokenizer; special tokens are never taken from text.

    Raises:
        BadInputError: it changes texts (lower case, accents stripped), or its tokens cannot be spelt.
    """

    def __init__(self, tokenizer: TokenizerLike):
        from tokenizers import Tokenizer

        self.bytes = token_bytes(tokenizer)
        self._backend = Tokenizer.from_str(backend_of(tokenizer).to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self.lead = b""
        if self.spell(self._raw("a")) == b" a":
            self.lead = b" "
        for sample in ("Ab  c\n\tdéé 12345, it's", "漢字😀"):
            if self.spell(self._raw(sample)) != self.lead + sample.encode():
                raise BadInputError(
                    f"This tokenizer does not keep the text: {sample!r} comes back as "
                    f"{self.spell(self._raw(sample)).decode('utf-8', 'replace')!r}.",
                    "Byte-level methods need a lossless one (byte-level BPE, or SentencePiece with byte fallback).",
                )
        order = sorted((token, index) for index, token in enumerate(self.bytes) if token)
        self._tokens = [token for token, _ in order]
        self._ids = np.array([index for _, index in order], np.int64)
        sizes = np.array([len(token) for token in self._tokens], np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(sizes)])
        self._sizes = sizes
        self._data = np.frombuffer(b"".join(self._tokens), np.uint8)
        # a vocabulary whose tokens span words leaves nothing settled at spaces
        self.spans_words = any(_spans_words(token) for token in self._tokens)
        self._answers: OrderedDict[tuple[int, ...], bool] = OrderedDict()

    @classmethod
    def of(cls, tokenizer: TokenizerLike) -> ByteView:
        """The tokenizer's view, made once (again if its vocabulary has grown)."""
        size = len(token_bytes(tokenizer))
        known = _VIEWS.get(tokenizer)
        if known is None or len(known.bytes) != size:
            known = cls(tokenizer)
            _VIEWS[tokenizer] = known
        return known

    def _raw(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def spell(self, ids: Sequence[int]) -> bytes:
        """The bytes of tokens; special ones have none."""
        return b"".join(self.bytes[item] or b"" for item in ids)

    def spelled(self, text: str | bytes) -> bytes:
        """The text as the tokens spell it.

        Raises:
            BadInputError: bytes that are no UTF-8 (an unfinished last character is fine).
        """
        data = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        if split_character(data) is None:
            raise BadInputError(
                "The bytes are no UTF-8 text.", "Only the last character may be unfinished; decode the data first."
            )
        return self.lead + data

    def encode(self, data: bytes) -> list[int] | None:
        """Tokens of a spelled text (whole characters); None if the tokenizer would change it."""
        if not data.startswith(self.lead):
            return None
        ids = self._raw(data[len(self.lead) :].decode("utf-8"))
        return ids if self.spell(ids) == data else None

    # -- which sequences can begin an encoding -------------------------------------------------------------------------
    def continuations(self, data: bytes) -> Iterator[bytes]:
        """Texts to try after a spelled text: a few characters, or ways to finish its last one."""
        parts = split_character(data)
        if parts is None:
            return
        if not parts[1]:
            yield from PROBES
        else:
            yield from fillings(parts[1])

    def begins(self, tokens: Sequence[int]) -> bool:
        """Whether the tokens can begin an encoding."""
        key = tuple(tokens)
        known = self._answers.get(key)
        if known is None:
            known = self._begins(key)
            self._answers[key] = known
            if len(self._answers) > MEMORY:
                self._answers.popitem(last=False)
        return known

    def _begins(self, tokens: tuple[int, ...]) -> bool:
        data, size = self.spell(tokens), len(tokens)
        for more in self.continuations(data):
            found = self.encode(data + more)
            if found is not None and tuple(found[:size]) == tokens:
                return True
        return False

    def beginnings(self, data: bytes) -> list[tuple[int, ...]]:
        """The sequences that spell exactly ``data`` and can begin an encoding; the plain encoding first."""
        if not data:
            return [()]
        found: dict[tuple[int, ...], None] = {}
        for more in self.continuations(data):
            tokens = self.encode(data + more)
            if tokens is None:
                continue
            size = 0
            for count, token in enumerate(tokens, 1):
                size += len(self.bytes[token] or b"")
                if size >= len(data):
                    if size == len(data):
                        found[tuple(tokens[:count])] = None
                    break
        return list(found)

    # -- tokens by their bytes -----------------------------------------------------------------------------------------
    def starting_with(self, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the tokens that start with ``data``, and the byte after it (-1 where the token ends there)."""
        low = bisect_left(self._tokens, data)
        high = bisect_right(self._tokens, data + b"\xff" * 256) if data else len(self._tokens)
        places = np.arange(low, high)
        after = np.full(len(places), -1, np.int64)
        longer = self._sizes[places] > len(data)
        after[longer] = self._data[self._offsets[places[longer]] + len(data)]
        return self._ids[low:high], after

    def settled(self, data: bytes) -> int:
        """Before which place the encoding of a spelled text stays, whatever follows: the last space between a letter or
        digit and a letter (0 if there is none, or if tokens may span words)."""
        if self.spans_words:
            return 0
        for place in range(len(data) - 2, 0, -1):
            if data[place] == 0x20 and _plain(data[place - 1]) and _letter(data[place + 1]):
                return place
        return 0


def _letter(byte: int) -> bool:
    return 0x41 <= byte <= 0x5A or 0x61 <= byte <= 0x7A


def _plain(byte: int) -> bool:
    return _letter(byte) or 0x30 <= byte <= 0x39


def _spans_words(token: bytes) -> bool:
    return any(
        token[place] == 0x20 and _plain(token[place - 1]) and _letter(token[place + 1])
        for place in range(1, len(token) - 1)
    )


def split_character(data: bytes) -> tuple[bytes, bytes] | None:
    """``(whole characters, an unfinished one)``; None if that is no UTF-8."""
    for size in range(min(4, len(data) + 1)):
        head, tail = data[: len(data) - size], data[len(data) - size :]
        try:
            head.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if not tail or next(fillings(tail), None) is not None:
            return head, tail
        return None
    return None


def fillings(tail: bytes) -> Iterator[bytes]:
    """Bytes that finish an unfinished character (every next byte, with a plain rest)."""
    size = 2 if 0xC2 <= tail[0] <= 0xDF else 3 if 0xE0 <= tail[0] <= 0xEF else 4 if 0xF0 <= tail[0] <= 0xF4 else 0
    missing = size - len(tail)
    if missing <= 0:
        return
    for byte in range(0x80, 0xC0):
        rest = bytes([byte]) + b"\x80" * (missing - 1)
        try:
            (tail + rest).decode("utf-8")
        except UnicodeDecodeError:
            continue
        yield rest
