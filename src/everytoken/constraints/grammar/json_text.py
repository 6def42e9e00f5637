"""How characters and strings are spelled in JSON text."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import TypeAlias

from .expressions import LAST_CHAR, Bytes, ByteSet, Chars, Expression, alt, intersect_ranges, merge_ranges, seq, text

Json: TypeAlias = "bool | int | float | Decimal | str | list[Json] | dict[str, Json] | None"
"""A JSON value."""
WS = ByteSet(((0x09, 0x0A), (0x0D, 0x0D), (0x20, 0x20)))

_PLAIN = ((0x20, 0x21), (0x23, 0x5B), (0x5D, LAST_CHAR))
_SHORT = {0x22: '"', 0x5C: "\\", 0x08: "b", 0x0C: "f", 0x0A: "n", 0x0D: "r", 0x09: "t"}
_HEX = Chars(((0x30, 0x39), (0x41, 0x46), (0x61, 0x66)))


def spell(chars: Chars) -> Expression:
    """One character of a class inside a JSON string, written as ``json.dumps(..., ensure_ascii=False)`` does."""
    options: list[Expression] = [Chars(intersect_ranges(chars.ranges, _PLAIN))]
    inside = [code for code in range(0x60) if any(low <= code <= high for low, high in chars.ranges)]
    short = [_SHORT[code] for code in inside if code in _SHORT]
    if short:
        options.append(seq(Bytes(b"\\"), ByteSet(merge_ranges((ord(c), ord(c)) for c in short))))
    options += [text(f"\\u{code:04x}") for code in inside if code < 0x20 and code not in _SHORT]
    return alt(*options)


CANONICAL = spell(Chars(((0, LAST_CHAR),)))
_ESCAPE = seq(Bytes(b"\\"), ByteSet(merge_ranges((ord(c), ord(c)) for c in '"\\/bfnrt')))
FREE = alt(Chars(_PLAIN), _ESCAPE, seq(Bytes(b"\\u"), _HEX, _HEX, _HEX, _HEX))
"""A character of an unconstrained string: any escape that JSON knows."""
_D = ByteSet(((0x44, 0x44), (0x64, 0x64)))
_HIGH = seq(Bytes(b"\\u"), _D, ByteSet(((0x38, 0x39), (0x41, 0x42), (0x61, 0x62))), _HEX, _HEX)
_LOW = seq(Bytes(b"\\u"), _D, ByteSet(((0x43, 0x46), (0x63, 0x66))), _HEX, _HEX)
_BASIC = seq(
    Bytes(b"\\u"),
    alt(
        seq(Chars(((0x30, 0x39), (0x41, 0x43), (0x45, 0x46), (0x61, 0x63), (0x65, 0x66))), _HEX, _HEX, _HEX),
        seq(_D, ByteSet(((0x30, 0x37),)), _HEX, _HEX),
    ),
)
COUNTED = alt(Chars(_PLAIN), _ESCAPE, _BASIC, seq(_HIGH, _LOW))
"""A character of a string whose length counts: a surrogate pair is one, a lone surrogate none."""
QUOTE = Bytes(b'"')


def quoted(string: str) -> bytes:
    """A string as ``json.dumps(..., ensure_ascii=False)`` writes it; lone surrogates, which UTF-8 lacks, as escapes."""
    return re.sub(
        "[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(string, ensure_ascii=False)
    ).encode()


def inner(name: str) -> bytes:
    """A string as it stands between JSON's quotes."""
    return quoted(name)[1:-1]
