"""A tokenizer as the constraints see it: the bytes of every token, and a trie of them.

Byte tables are exact for byte-level BPE, SentencePiece (with byte fallback), WordPiece and tiktoken-style vocabularies
(``core.vocabulary``). Special tokens spell nothing: they are never allowed, but for the stop tokens where the text
may end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...core.errors import BadInputError
from .tables import Int32s, Trie, UInt8s

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


class TokenizerInfo:
    """The vocabulary of a model.

    Args:
        vocabulary: the bytes of every token id; None (or empty) for ids that spell nothing.
        stop_token_ids: tokens that end a text.
        vocab_size: the width of the model's logits, if larger than the tokenizer (padding rows are never allowed).

    Raises:
        BadInputError: an empty vocabulary, stop ids outside of it, or a ``vocab_size`` smaller than it.
    """

    def __init__(
        self, vocabulary: Sequence[bytes | None], stop_token_ids: Iterable[int] = (), vocab_size: int | None = None
    ):
        self.vocabulary = [None if token is None else bytes(token) for token in vocabulary]
        if not any(self.vocabulary):
            raise BadInputError(
                "The vocabulary is empty.", "Pass the bytes of every token, or use TokenizerInfo.from_huggingface."
            )
        self.vocab_size = len(self.vocabulary) if vocab_size is None else int(vocab_size)
        if self.vocab_size < len(self.vocabulary):
            while len(self.vocabulary) > self.vocab_size and not self.vocabulary[-1]:
                self.vocabulary.pop()
            if self.vocab_size < len(self.vocabulary):
                raise BadInputError(
                    f"The tokenizer has {len(self.vocabulary)} tokens but the model's logits only {self.vocab_size}.",
                    "Use the tokenizer that belongs to the model.",
                )
        self.stop_token_ids = sorted({int(item) for item in stop_token_ids})
        for item in self.stop_token_ids:
            if not 0 <= item < self.vocab_size:
                raise BadInputError(f"The stop token {item} is outside the vocabulary of {self.vocab_size} tokens.")
            if item < len(self.vocabulary):
                self.vocabulary[item] = None

    @classmethod
    def from_huggingface(
        cls,
        tokenizer: PreTrainedTokenizerBase | Tokenizer,
        vocab_size: int | None = None,
        stop_token_ids: Iterable[int] | int | None = None,
    ) -> TokenizerInfo:
        """From a transformers (fast) or ``tokenizers`` tokenizer.

        Args:
            vocab_size: the width of the model's logits (``model.config.vocab_size``), often padded.
            stop_token_ids: default the tokenizer's EOS.

        Raises:
            BadInputError: a tokenizer whose spelling is not known, or that has no EOS while none is given.
        """
        from ...core.vocabulary import token_bytes

        if stop_token_ids is None:
            stop_token_ids = getattr(tokenizer, "eos_token_id", None)
            if stop_token_ids is None:
                raise BadInputError("The tokenizer has no EOS token.", "Pass stop_token_ids=[...].")
        stops = [stop_token_ids] if isinstance(stop_token_ids, int) else stop_token_ids
        return cls(token_bytes(tokenizer), stops, vocab_size)

    @classmethod
    def from_tiktoken(
        cls, ranks: dict[bytes, int], stop_token_ids: Iterable[int] = (), vocab_size: int | None = None
    ) -> TokenizerInfo:
        """From mergeable ranks, ``{bytes: id}``."""
        if not ranks:
            raise BadInputError("The rank table is empty.", "Pass {bytes: id} of every token.")
        stops = list(stop_token_ids)
        table: list[bytes | None] = [None] * (max([*ranks.values(), *stops]) + 1)
        for token, index in ranks.items():
            table[index] = token
        return cls(table, stops, vocab_size)

    @property
    def words(self) -> int:
        """32-bit words of a bitmask row."""
        return (self.vocab_size + 31) // 32

    @cached_property
    def fingerprint(self) -> str:
        """Tells vocabularies apart (for caches and serialised grammars)."""
        digest = hashlib.sha256(f"{self.vocab_size} {self.stop_token_ids}".encode())
        for token in self.vocabulary:
            digest.update(b"\xff\xff" if token is None else len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()[:16]

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max(len(token) for token in self.vocabulary if token)

    @cached_property
    def arrays(self) -> list[UInt8s]:
        """The bytes of every token as an array (empty where it spells nothing)."""
        return [np.frombuffer(token or b"", np.uint8) for token in self.vocabulary]

    @cached_property
    def trie(self) -> Trie:
        """All tokens by their bytes."""
        if self.longest >= 1 << 16:
            raise BadInputError("A token is longer than 65,535 bytes.", "Remove it from the vocabulary.")
        return trie_of((token, index) for index, token in enumerate(self.vocabulary) if token)

    @cached_property
    def characters(self) -> NDArray[np.int64]:
        """``[V]``: how many characters begin in each token."""
        data = np.frombuffer(b"".join(token or b"" for token in self.vocabulary), np.uint8)
        ends = np.cumsum([len(token or b"") for token in self.vocabulary])
        begun = np.concatenate([[0], np.cumsum((data & 0xC0) != 0x80)])[np.concatenate([[0], ends])]
        return np.diff(begun)

    def part(self, nodes: Int32s, trie: Trie | None = None) -> Trie:
        """The trie of the tokens at some of a trie's nodes (in preorder) alone; default the whole vocabulary's trie."""
        from .trie import extract

        byte_of, depth_of, skip, token_ptr, token_ids, levels = extract(
            nodes, (self.trie if trie is None else trie).packed()
        )
        size = len(byte_of)
        every_byte = np.full((size, 4), np.uint64(0xFFFFFFFFFFFFFFFF))  # few nodes: no short cuts
        characters, height = np.zeros(size, np.bool_), np.full(size, 1 << 30, np.int32)
        return Trie(byte_of, depth_of, skip, token_ptr, token_ids, every_byte, characters, height, int(levels))

    def __repr__(self) -> str:
        return f"TokenizerInfo({self.vocab_size} tokens, stop tokens {self.stop_token_ids})"


def trie_of(tokens: Iterable[tuple[bytes, int]]) -> Trie:
    """Byte strings and the tokens that they stand for as a trie; none is empty, and equal ones share a node."""
    from .trie import build_trie

    order = sorted(tokens)
    distinct: list[bytes] = []
    ids: list[int] = []
    starts: list[int] = []
    for token, index in order:
        if not distinct or distinct[-1] != token:
            distinct.append(token)
            starts.append(len(ids))
        ids.append(index)
    data = np.frombuffer(b"".join(distinct), np.uint8)
    offsets = np.concatenate([[0], np.cumsum([len(token) for token in distinct])]).astype(np.int64)
    shared = np.zeros(len(distinct), np.int64)
    for place in range(1, len(distinct)):
        before, after = distinct[place - 1], distinct[place]
        size = 0
        for a, b in zip(before, after, strict=False):
            if a != b:
                break
            size += 1
        shared[place] = size
    room = int(sum(map(len, distinct)) - shared.sum())
    byte_of, depth_of = np.zeros(room, np.uint8), np.zeros(room, np.int32)
    skip, parent, first = (np.zeros(room, np.int32) for _ in range(3))
    subtree, characters = np.zeros((room, 4), np.uint64), np.zeros(room, np.bool_)
    height = np.zeros(room, np.int32)
    build_trie(data, offsets, shared, byte_of, depth_of, skip, parent, first, subtree, characters, height)
    counts = np.zeros(room + 1, np.int64)
    sizes = np.diff([*starts, len(ids)])
    counts[1:][first >= 0] = sizes[first[first >= 0]]
    token_ptr = np.cumsum(counts).astype(np.int32)
    levels = int(depth_of.max()) + 1
    token_ids = np.array(ids, np.int32)
    return Trie(byte_of, depth_of, skip, token_ptr, token_ids, subtree, characters, height, levels)
