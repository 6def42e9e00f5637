"""HAT's words: where a text is cut. Text that is appended only lets the last word grow.

1. Word bounds of Unicode (UAX 29). 2. A cut behind every punctuation character. 3. A cut between a lower-case and an
upper-case letter. 4. Runs of the plain space stay together. Then a word joins the single space before it, punctuation
joins the space, word or punctuation before it, and everything else starts a word.

For ASCII all of it is one regular expression; other lines go through the ``regex`` library.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from ...core.errors import BadInputError

_PUNCTUATION = r"""[!"#%&'()*,\-./:;?@\[\\\]_{}]"""
_WORD = r"(?:[A-Z0-9]+(?:[a-z]+(?:[0-9][A-Z0-9]*)?)*|[a-z]+(?:[0-9][A-Z0-9]*(?:[a-z]+(?:[0-9][A-Z0-9]*)?)*)?)"
_ASCII = re.compile(
    rf" {{2,}}| ?(?:{_WORD}|[^\t-\r !-/0-9:-@A-Z\[-`a-z{{-~]|[$+<=>^`|~]){_PUNCTUATION}*| ?{_PUNCTUATION}+| |\r\n|\s"
)


@lru_cache(maxsize=1)
def _patterns() -> tuple[Any, Any]:
    import regex

    bounds = regex.compile(r"\b", flags=regex.WORD | regex.V1)
    inside = regex.compile(r".*?(?:\p{P}|\p{Ll}(?=\p{Lu}))|.+", flags=regex.DOTALL | regex.V1)
    return bounds, inside


def split(text: str, max_bytes: int | None = None) -> list[str] | list[bytes]:
    """The words of a text, which put together are the text.

    Args:
        max_bytes: longer words are cut, at the last whole character that fits, and inside a character only where none
            fits; the result is bytes then.

    Raises:
        BadInputError: a limit below 1.
    """
    if max_bytes is not None and max_bytes < 1:
        raise BadInputError(f"A word has one byte at least; got a limit of {max_bytes}.")
    words: list[str] = []
    # no word crosses the end of a line
    for line in [text] if text.isascii() else re.findall(r"[^\n]*\n|[^\n]+", text):
        words += _ASCII.findall(line) if line.isascii() else _grouped(_pieces(line))
    if max_bytes is None:
        return words
    return [part for word in words for part in _cut(word.encode("utf-8", "surrogatepass"), max_bytes)]


def _pieces(line: str) -> list[str]:
    bounds, inside = _patterns()
    found: list[str] = []
    for segment in bounds.split(line):
        for piece in inside.findall(segment) if segment else ():
            if found and piece.strip(" ") == "" and found[-1].strip(" ") == "":
                found[-1] += piece
            else:
                found.append(piece)
    return found


def _grouped(pieces: list[str]) -> list[str]:
    import unicodedata

    words: list[str] = []
    before = ""
    for piece in pieces:
        if piece == " ":
            kind = "space"
        elif piece.isspace() and piece.strip("\x1c\x1d\x1e\x1f"):  # Python's white space has four more
            kind = "white"
        elif len(piece) == 1 and unicodedata.category(piece).startswith("P"):
            kind = "punctuation"
        else:
            kind = "word"
        joins = (kind == "word" and before == "space") or (
            kind == "punctuation" and before in ("space", "word", "punctuation")
        )
        if joins:
            words[-1] += piece
        else:
            words.append(piece)
        before = kind
    return words


def _cut(word: bytes, limit: int) -> list[bytes]:
    parts = []
    while len(word) > limit:
        end = limit
        while end > 0 and word[end] & 0xC0 == 0x80:  # the middle of a character
            end -= 1
        end = end or limit
        parts.append(word[:end])
        word = word[end:]
    return [*parts, word]
