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
_OWN: WeakKeyDictionary[TokenizerLike, tuple[int, dict[bytes, int]]] = WeakKeyDictionary()


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


def utf8(text: str | bytes) -> bytes:
    """The bytes of a text.

    Raises:
        BadInputError: a lone surrogate, which no encoding has bytes for. Broken JSON escapes and undecodable arguments
            of a command bring them.
    """
    if not isinstance(text, str):
        return bytes(text)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInputError(
            f"The text is no Unicode: character {error.start} is a lone surrogate (U+{ord(text[error.start]):04X}).",
            'Repair it where it was decoded, or drop such characters: text.encode("utf-8", "ignore").decode("utf-8").',
        ) from error


def token_bytes(tokenizer: TokenizerLike) -> list[bytes | None]:
    """The bytes of every token id of a fast transformers tokenizer or a ``tokenizers`` one.

    Special and unused ids have None. Knows byte-level BPE, SentencePiece (with byte fallback) and WordPiece, by the
    tokenizer's own decoder. An added token is spelt literally, unless the model's vocabulary has it too: it is then
    written as the model writes it (Gemma adds its runs of spaces as runs of the space marker).

    Raises:
        BadInputError: the tokenizer has no fast backend, or decodes in a way that is not known here.
    """
    backend = backend_of(tokenizer)
    if not hasattr(backend, "to_str"):
        raise BadInputError(
            f"{type(tokenizer).__name__} has no fast (tokenizers) backend.",
            "Load it with AutoTokenizer.from_pretrained.",
        )
    size = backend.get_vocab_size(with_added_tokens=True)  # the vocabulary itself would be copied
    known = _TABLES.get(tokenizer)
    if known is not None and known[0] == size:
        return known[1]
    vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    spec = json.loads(backend.to_str())
    special = {entry["id"] for entry in spec.get("added_tokens", []) if entry["special"]}
    added = {entry["id"] for entry in spec.get("added_tokens", [])}
    learned = backend.get_vocab(with_added_tokens=False)
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
            literal = index in added and learned.get(token) != index
            table[index] = token.encode("utf-8") if literal else spell(token)
    if hasattr(tokenizer, "__weakref__"):
        _TABLES[tokenizer] = (size, table)
    return table


def byte_tokens(tokenizer: TokenizerLike) -> dict[int, bytes]:
    """The ids of byte fallback (``<0xNN>``) with their bytes; empty for tokenizers without it."""
    table = token_bytes(tokenizer)
    found = {}
    for token, index in backend_of(tokenizer).get_vocab(with_added_tokens=False).items():
        match = _BYTE_TOKEN.fullmatch(token)
        if match and table[index] == bytes([int(match[1], 16)]):
            found[index] = table[index] or b""
    return found


def unused_byte_tokens(tokenizer: TokenizerLike) -> set[int]:
    """Ids of byte fallback whose byte another token spells.

    A tokenizer never writes them (``<0x61>`` where there is ``a``), so models have not learned their embeddings.
    """
    fallback = byte_tokens(tokenizer)
    others = {data for index, data in enumerate(token_bytes(tokenizer)) if data and index not in fallback}
    return {index for index, data in fallback.items() if data in others}


def own_ids(tokenizer: TokenizerLike) -> dict[bytes, int]:
    """The id with which the tokenizer itself writes each of its tokens' byte strings.

    Where several ids spell the same bytes, that is the one that it encodes them as, and never a byte of the fallback
    that another token spells.
    """
    table = token_bytes(tokenizer)
    known = _OWN.get(tokenizer)
    if known is not None and known[0] == len(table):
        return known[1]
    unused = unused_byte_tokens(tokenizer)
    found: dict[bytes, int] = {}
    several: dict[bytes, set[int]] = {}
    for index, data in enumerate(table):
        if data and index not in unused:
            first = found.setdefault(data, index)
            if first != index:
                several.setdefault(data, {first}).add(index)
    for data, ids in several.items():
        try:
            written = backend_of(tokenizer).encode(data.decode("utf-8"), add_special_tokens=False).ids
        except UnicodeDecodeError:
            continue
        if len(written) == 1 and written[0] in ids:
            found[data] = written[0]
    if hasattr(tokenizer, "__weakref__"):
        _OWN[tokenizer] = (len(table), found)
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
