"""A tokenizer seen from its bytes: it encodes bytes, and tells which token sequences can begin an encoding.

A sequence of tokens *can begin an encoding* if the tokenizer produces it, followed by anything or nothing, for some
text. For most sequences the text itself decides. A pre-tokenizer that looks ahead (runs of spaces, contractions), or a
text that ends inside a character, needs a continuation, so a few are tried: ``PROBES``, or ways to finish the
character, among them one character of every kind that the tokenizer can tell apart.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from ..core.errors import BadInputError
from ..core.vocabulary import backend_of, utf8

if TYPE_CHECKING:
    from ..core.vocabulary import TokenizerLike
from .base import token_bytes

PROBES = (b"", b"a", b" a", b"1", b".", b"\n", b" ")
MEMORY = 1 << 16
"""Answers remembered."""
_SCRIPT = re.compile(r"\\p\{\^?(?:Script=|sc=)?[A-Z][a-z]{2,}")
"""A script in a regular expression, as ``\\p{Han}``; general categories have one or two letters."""
_VIEWS: WeakKeyDictionary[TokenizerLike, ByteView] = WeakKeyDictionary()
_LOOSE: WeakKeyDictionary[TokenizerLike, ByteView] = WeakKeyDictionary()


class ByteView:
    """The lossless view of a tokenizer over bytes.

    Texts are *spelled*: with the space in front that some tokenizers put there (``lead``), so that tokens' bytes add up
    to them.

    Args:
        tokenizer: a fast tokenizer; special tokens are never taken from text.
        lossless: refuse a tokenizer that changes texts.

    Raises:
        BadInputError: it changes texts (lower case, accents stripped), or its tokens cannot be spelt.
    """

    def __init__(self, tokenizer: TokenizerLike, lossless: bool = True):
        from tokenizers import Tokenizer

        self.bytes, self.lossless = token_bytes(tokenizer), lossless
        self._backend = Tokenizer.from_str(backend_of(tokenizer).to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self.lead = b""
        if self.spell(self._raw("a")) == b" a":
            self.lead = b" "
        for sample in ("Ab  c\n\tdéé 12345, it's", "漢字😀") if lossless else ():
            spelt = self.spell(self._raw(sample))
            if spelt != self.lead + sample.encode():
                raise BadInputError(
                    f"This tokenizer does not keep the text: {sample!r} comes back as "
                    f"{spelt.decode('utf-8', 'replace')!r}.",
                    "Byte-level methods need a lossless one (byte-level BPE, or SentencePiece with byte fallback).",
                )
        order = sorted((token, index) for index, token in enumerate(self.bytes) if token)
        self._tokens = [token for token, _ in order]
        self._ids = np.array([index for _, index in order], np.int64)
        sizes = np.array([len(token) for token in self._tokens], np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(sizes)])
        self._sizes = sizes
        self._data = np.frombuffer(b"".join(self._tokens), np.uint8)
        self._crossed = self._before_spaces()
        cut = self._backend.pre_tokenizer
        patterns = "" if cut is None else bytes(cut.__getstate__()).decode("utf-8").replace("\u2581", "")
        self._bounds = sorted({ord(char) + more for char in patterns if ord(char) > 0x7F for more in (0, 1)})
        self._by_script = _SCRIPT.search(patterns) is not None
        self._probes = (*PROBES, "漢".encode()) if self._bounds or self._by_script else PROBES
        self._spelled = {token for token in self._tokens if 2 <= len(token) <= 4}
        self._endings: dict[bytes, tuple[bytes, ...]] = {}
        self._answers: OrderedDict[tuple[int, ...], bool] = OrderedDict()

    @classmethod
    def of(cls, tokenizer: TokenizerLike, lossless: bool = True) -> ByteView:
        """The tokenizer's view, made once (again if its vocabulary has grown)."""
        size, views = len(token_bytes(tokenizer)), _VIEWS if lossless else _LOOSE
        known = views.get(tokenizer)
        if known is None or len(known.bytes) != size:
            known = cls(tokenizer, lossless)
            views[tokenizer] = known
        return known

    def _raw(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def cut(self, text: str) -> list[int]:
        """The tokenizer's own tokens, whatever it does to the text."""
        return self._raw(text)

    def spell(self, ids: Sequence[int]) -> bytes:
        """The bytes of tokens; special ones have none."""
        return b"".join(self.bytes[item] or b"" for item in ids)

    def spelled(self, text: str | bytes) -> bytes:
        """The text as the tokens spell it.

        Raises:
            BadInputError: bytes that are no UTF-8 (an unfinished last character is fine), or a lone surrogate.
        """
        data = utf8(text)
        if split_character(data) is None:
            raise BadInputError(
                "The bytes are no UTF-8 text.", "Only the last character may be unfinished; decode the data first."
            )
        return self.lead + data

    def encode(self, data: bytes) -> list[int] | None:
        """Tokens of a spelled text (whole characters); None if the tokenizer would change it.

        Some tokenizers put no space before a text that has one already. Such a text is given to them with both.
        """
        if not data.startswith(self.lead):
            return None
        for begin in dict.fromkeys((len(self.lead), 0)):
            ids = self._raw(data[begin:].decode("utf-8"))
            if self.spell(ids) == data:
                return ids
        return None

    # -- which sequences can begin an encoding -------------------------------------------------------------------------
    def continuations(self, data: bytes) -> Iterator[bytes]:
        """Texts to try after a spelled text: a few characters, or ways to finish its last one."""
        parts = split_character(data)
        if parts is None:
            return
        if not parts[1]:
            yield from self._probes
        else:
            yield from self.endings(parts[1])

    def endings(self, tail: bytes) -> tuple[bytes, ...]:
        """Ways to finish an unfinished character: every next byte, and one character of every kind that can be meant.

        Where a pre-tokenizer cuts may depend on whether a digit, a letter or a space follows, so each kind is tried:
        by its category, whether normalisation and vocabulary keep it whole, and the ranges and scripts that the
        tokenizer's own patterns name. What stands behind a space decides where it goes.
        """
        known = self._endings.get(tail)
        if known is None:
            found = dict.fromkeys(fillings(tail))
            kinds: dict[tuple[str, bool, bool, int, str], bytes] = {}
            for rest, char in _characters(tail):
                script = unicodedata.name(char, "").partition(" ")[0] if self._by_script else ""
                category, whole = unicodedata.category(char), unicodedata.is_normalized("NFC", char)
                kinds.setdefault(
                    (category, whole, tail + rest in self._spelled, bisect_right(self._bounds, ord(char)), script), rest
                )
            found |= dict.fromkeys(kinds.values())
            spaces = [rest for rest in found if (tail + rest).decode("utf-8").isspace()]
            found |= dict.fromkeys(rest + probe for rest in spaces for probe in self._probes)
            known = self._endings[tail] = tuple(found)
        return known

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
        """Before which place the encoding of a spelled text stays, whatever follows.

        That is the last space between a letter, digit or punctuation mark and a letter, if no token goes from the one
        to the other (0 if there is none).
        """
        for place in range(len(data) - 2, 0, -1):
            if data[place] == 0x20 and not self._crossed[data[place - 1]] and _letter(data[place + 1]):
                return place
        return 0

    def _before_spaces(self) -> np.ndarray:
        """``[256]`` the bytes behind which a space settles nothing: all that are no visible ASCII, and those that some
        token has directly before a space (even if it ends there)."""
        crossed = np.ones(256, bool)
        crossed[0x21:0x7F] = False
        inside = np.ones(max(len(self._data) - 1, 0), bool)
        inside[self._offsets[1:-1] - 1] = False
        crossed[self._data[:-1][inside & (self._data[1:] == 0x20)]] = True
        return crossed


def _letter(byte: int) -> bool:
    return 0x41 <= byte <= 0x5A or 0x61 <= byte <= 0x7A


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


def _characters(tail: bytes) -> Iterator[tuple[bytes, str]]:
    """Every character that begins with these bytes: the bytes that it lacks, and itself."""
    missing = len(next(fillings(tail), b""))
    size = len(tail) + missing
    lead, least = tail[0] & (0xFF >> (size + 1)), {2: 0x80, 3: 0x800, 4: 0x10000}[size]
    for byte in tail[1:]:
        lead = lead << 6 | byte & 0x3F
    for low in range(1 << 6 * missing):
        point = lead << 6 * missing | low
        if least <= point <= 0x10FFFF and not 0xD800 <= point < 0xE000:
            char = chr(point)
            yield char.encode("utf-8")[len(tail) :], char
