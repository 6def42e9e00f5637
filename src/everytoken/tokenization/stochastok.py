"""StochasTok: stochastic tokenisation for fine-grained subword understanding (arXiv 2506.01687).

A deterministic tokenizer hides what tokens are made of. StochasTok takes an already tokenised text and, a number of
times, replaces a token by two tokens of the same vocabulary that spell the same bytes. A model trained on such text
learns the inner structure of its tokens; vocabulary, model and inference stay as they are.

With ``b(v)`` the bytes of token v and ``n`` the input's length::

    Splits(v) = { (a, c) : b(a) + b(c) = b(v) }
    repeat floor(expand_prop * n) times:
        draw a position uniformly in the current sequence (which grows)
        if its token v has splits: replace v by one pair drawn uniformly from Splits(v)

Any cut counts, not only the merge that made the token; parts can be split again; an attempt on a token without splits
(a single byte, a special token) is spent.

The sequence is kept as slots in a linked list: a split keeps the left part in its slot and appends the right part as a
new slot. A uniform slot is a uniform position, so no position has to be found and nothing has to be moved: O(n) in all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

import numba
import numpy as np

from ..core.errors import BadInputError
from ..core.vocabulary import unused_byte_tokens
from .base import Retokenized, token_bytes

if TYPE_CHECKING:
    import torch

    Ids = Sequence[int] | np.ndarray | torch.Tensor
Example = dict[str, Any]
"""A row of a data set: its columns may hold anything."""
Made = TypeVar("Made")
IGNORED = -100


@dataclass
class SplitTable:
    """All splits of all tokens as compressed rows.

    Token v has the pairs ``(left[i], right[i])`` for ``offsets[v] <= i < offsets[v + 1]``.
    """

    offsets: np.ndarray
    left: np.ndarray
    right: np.ndarray

    def pairs(self, token: int) -> list[tuple[int, int]]:
        """The splits of one token."""
        span = slice(self.offsets[token], self.offsets[token + 1])
        return list(zip(self.left[span].tolist(), self.right[span].tolist(), strict=True))


def split_table(table: Sequence[bytes | None], left_out: Collection[int] = ()) -> SplitTable:
    """Splits of every token of a vocabulary, from the bytes of each id; ids with None are never split or made.

    Args:
        left_out: ids that are never made either.
    """
    ids: dict[bytes, list[int]] = {}
    for index, piece in enumerate(table):
        if piece and index not in left_out:
            ids.setdefault(piece, []).append(index)
    offsets, left, right = [0], [], []
    for piece in table:
        if piece:
            for cut in range(1, len(piece)):
                heads = ids.get(piece[:cut])
                tails = ids.get(piece[cut:]) if heads else None
                if heads and tails:
                    for head in heads:
                        left += [head] * len(tails)
                        right += tails
        offsets.append(len(left))
    return SplitTable(np.array(offsets, np.int64), np.array(left, np.int64), np.array(right, np.int64))


@numba.njit(cache=True, nogil=True)
def _expand(
    ids: np.ndarray,
    attempts: int,
    limit: int,
    offsets: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    n = len(ids)
    token = np.empty(n + attempts, np.int64)
    origin = np.empty(n + attempts, np.int64)
    following = np.empty(n + attempts, np.int64)
    for i in range(n):
        token[i], origin[i], following[i] = ids[i], i, i + 1 if i + 1 < n else -1
    size = n
    for _ in range(attempts):
        if size - n >= limit:
            break
        slot = int(rng.random() * size)
        first = offsets[token[slot]]
        count = offsets[token[slot] + 1] - first
        if count == 0:
            continue
        pick = first + int(rng.random() * count)
        token[size], origin[size], following[size] = right[pick], origin[slot], following[slot]
        token[slot], following[slot] = left[pick], size
        size += 1
    out, source = np.empty(size, np.int64), np.empty(size, np.int64)
    slot = 0 if size else -1
    for i in range(size):
        out[i], source[i] = token[slot], origin[slot]
        slot = following[slot]
    return out, source


@dataclass
class StochasTok:
    """Random splits of tokens into two tokens of the same vocabulary; the text never changes.

    Use it on ids, on batches, as ``datasets.map(stochastok.batch, batched=True)``, or around a data collator.

    Args:
        tokenizer: a fast tokenizer (byte-level BPE, SentencePiece or WordPiece).
        expand_prop: attempts as a share of the input's length (paper: 0.1).
        seed: start of the random stream; every call continues it.
        max_expansions: at most so many splits per sequence.

    Raises:
        BadInputError: expand_prop is negative or not finite, or the tokenizer cannot be spelt.
    """

    tokenizer: Any  # a TokenizerLike; the command line reads these types, and must not load transformers for them
    trace_columns: ClassVar[tuple[str, ...]] = ("part", "source")
    expand_prop: float = 0.1
    seed: int = 0
    max_expansions: int | None = None
    table: SplitTable = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not (np.isfinite(self.expand_prop) and self.expand_prop >= 0):
            raise BadInputError(f"expand_prop is a share of the length, 0 or more; got {self.expand_prop}.")
        if self.max_expansions is not None and self.max_expansions < 0:
            raise BadInputError(f"max_expansions must not be negative; got {self.max_expansions}.")
        # a byte of the fallback that another token spells is never in a text: the model has not learned it
        self.table = split_table(token_bytes(self.tokenizer), unused_byte_tokens(self.tokenizer))
        self._rng = np.random.default_rng(self.seed)

    def expand(self, ids: Ids, seed: int | None = None) -> Retokenized:
        """Splits tokens of one sequence.

        Args:
            ids: one sequence of token ids (list, array or tensor).
            seed: None continues this object's stream; a number makes the result depend on nothing else.

        Raises:
            BadInputError: more than one dimension, or an id outside the vocabulary.
        """
        array = np.asarray(ids, dtype=np.int64)
        if array.ndim != 1:
            raise BadInputError(
                f"expand takes one sequence; got {array.ndim} dimensions.", "Call the object on batches."
            )
        vocab = len(self.table.offsets) - 1
        if array.size and (array.min() < 0 or array.max() >= vocab):
            raise BadInputError(
                f"Token ids must lie in 0..{vocab - 1}; got {array.min()}..{array.max()}.",
                "Were these ids made by another tokenizer?",
            )
        attempts = int(self.expand_prop * len(array))
        limit = attempts if self.max_expansions is None else self.max_expansions
        rng = self._rng if seed is None else np.random.default_rng(seed)
        out, source = _expand(array, attempts, limit, self.table.offsets, self.table.left, self.table.right, rng)
        return Retokenized(out, source)

    def __call__(self, ids: Ids | Sequence[Ids]) -> list[int] | list[list[int]]:
        """New ids for one sequence or a batch of sequences, as lists."""
        if len(ids) and hasattr(ids[0], "__len__"):
            return [self.expand(row).ids.tolist() for row in cast("Sequence[Ids]", ids)]
        return self.expand(cast("Ids", ids)).ids.tolist()

    def annotated(self, example: Mapping[str, Any]) -> Example:
        """One example with ``input_ids`` split and every other token-aligned column passed on to both parts.

        ``labels`` that repeat the token (causal training) follow the new tokens; ignored ones stay ignored.
        """
        ids = np.asarray(example["input_ids"], dtype=np.int64)
        new = self.expand(ids)
        out: Example = dict(example)
        for name, column in example.items():
            if name == "input_ids":
                out[name] = new.ids.tolist()
            elif isinstance(column, (str, bytes)) or not hasattr(column, "__len__") or len(column) != len(ids):
                continue
            elif name == "labels":
                labels = np.asarray(column, dtype=np.int64)
                follows = labels == ids
                out[name] = np.where(follows[new.source], new.ids, labels[new.source]).tolist()
            else:
                out[name] = [column[index] for index in new.source]
        return out

    def batch(self, examples: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """A batch of columns, as ``datasets.map(..., batched=True)`` passes it."""
        names = list(examples)
        rows = [self.annotated(dict(zip(names, row, strict=True))) for row in zip(*examples.values(), strict=True)]
        return {name: [row[name] for row in rows] for name in names}

    def collator(self, inner: Callable[[list[Example]], Made]) -> Callable[[list[Example]], Made]:
        """A data collator that splits each example anew before ``inner`` pads it: fresh splits in every epoch."""
        return _Collator(self, inner)


@dataclass
class _Collator(Generic[Made]):
    """Picklable, so that data-loader workers can carry it."""

    stochastok: StochasTok
    inner: Callable[[list[Example]], Made]

    def __call__(self, examples: list[Example]) -> Made:
        return self.inner([self.stochastok.annotated(example) for example in examples])
