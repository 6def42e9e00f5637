"""The bytes of every token.

A token's text is not enough: byte-level BPE writes bytes as printable stand-ins, SentencePiece writes spaces as a
marker and unknown bytes as ``<0xNN>``, WordPiece marks continuations. ``token_bytes`` undoes all of that, so that
methods can cut, join and constrain tokens by what they spell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias, TypedDict
from weakref import WeakKeyDictionary

from .errors import BadInputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    TokenizerLike: TypeAlias = PreTrainedTokenizerBase | Tokenizer


class Component(TypedDict, total=False):
    """A part of a tokenizer's JSON: its type and, in sequences, further parts."""

    type: str
    decoders: list[Component]
    pretokenizers: list[Component]


_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_TABLES: WeakKeyDictionary[TokenizerLike, tuple[int, list[bytes | None]]] = WeakKeyDictionary()


@lru_cache(maxsize=1)
def byte_stand_ins() -> dict[str, int]:
    """Byte-level BPE's printable stand-in of each byte: character -> byte.

    The printable bytes of Latin-1 stand for themselves; the other 68 are numbered upwards from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def backend_of(tokenizer: TokenizerLike) -> Tokenizer:
    """The ``tokenizers`` object behind a transformers tokenizer, or the object itself."""
    return getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "_tokenizer", None) or tokenizer


def token_bytes(tokenizer: TokenizerLike) -> list[bytes | None]:
    """The bytes of every token id of a fast transformers tokenizer or a ``tokenizers`` one.

    Special and unused ids have None. Knows byte-level BPE, SentencePiece (with byte fallback) and WordPiece, by the
    tokenizer's own decoder.

    Raises:
        BadInputError: the tokenizer has no fast backend, or decodes in a way that is not known here.
    """
    backend = backend_of(tokenizer)
    if not hasattr(backend, "to_str"):
        raise BadInputError(
            f"{type(tokenizer).__name__} has no fast (tokenizers) backend.",
            "Load it with AutoTokenizer.from_pretrained.",
        )
    vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    known = _TABLES.get(tokenizer)
    if known is not None and known[0] == len(vocab):
        return known[1]
    spec = json.loads(backend.to_str())
    special = {entry["id"] for entry in spec.get("added_tokens", []) if entry["special"]}
    added = {entry["id"] for entry in spec.get("added_tokens", [])}
    kinds = _kinds(spec.get("decoder")) | _kinds(spec.get("pre_tokenizer"))
    table: list[bytes | None] = [None] * (max(vocab.values()) + 1)
    if "ByteLevel" in kinds:
        stand_ins = byte_stand_ins()

        def spell(token: str) -> bytes:
            return b"".join(bytes([stand_ins[char]]) if char in stand_ins else char.encode("utf-8") for char in token)

    elif "WordPiece" in kinds:
        prefix = (spec.get("decoder") or {}).get("prefix", "##")

        def spell(token: str) -> bytes:
            return (token[len(prefix) :] if token.startswith(prefix) else " " + token).encode("utf-8")

    elif "Metaspace" in kinds or "ByteFallback" in kinds or "Replace" in kinds:

        def spell(token: str) -> bytes:
            if match := _BYTE_TOKEN.fullmatch(token):
                return bytes([int(match[1], 16)])
            return token.replace("\u2581", " ").encode("utf-8")

    else:
        raise BadInputError(
            f"Do not know how this tokenizer spells its tokens (decoder {spec.get('decoder')}).",
            "Byte-level BPE, SentencePiece and WordPiece are supported.",
        )
    for token, index in vocab.items():
        if index not in special:
            table[index] = token.encode("utf-8") if index in added else spell(token)
    if hasattr(tokenizer, "__weakref__"):
        _TABLES[tokenizer] = (len(vocab), table)
    return table


def first_ids(table: list[bytes | None]) -> dict[bytes, int]:
    """The first id that spells each of a table's byte strings."""
    found: dict[bytes, int] = {}
    for index, data in enumerate(table):
        if data:
            found.setdefault(data, index)
    return found


def _kinds(part: Component | None) -> set[str]:
    """The types of a component and, in sequences, of its parts."""
    if part is None:
        return set()
    return {part["type"]}.union(*map(_kinds, [*part.get("decoders", []), *part.get("pretokenizers", [])]))


def spell(tokenizer: TokenizerLike, ids: Iterable[int]) -> bytes:
    """The bytes that a sequence of ids spells; special tokens spell nothing."""
    table = token_bytes(tokenizer)
    return b"".join(table[int(item)] or b"" for item in ids)
