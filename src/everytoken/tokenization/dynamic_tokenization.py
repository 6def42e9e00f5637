"""Dynamic tokenization: token boundaries that follow the batch (arXiv 2411.18553).

The base tokenizer's tokens of a batch are merged as BPE merges characters. The most frequent valid adjacent pair over
the whole batch becomes one token everywhere. This is repeated m times, or until no valid pair is left and tokens are
whole pre-tokens::

    repeat m times:
        (a, b) = argmax over valid pairs of count(a, b)          # ties: the first in the batch
        replace a b by ab, left to right, in every sequence

Which pairs are valid depends on ``boundary``. The joined text must be one pre-token of the base tokenizer
(``"pretoken"``), or hold no white space (``"word"``), or only be free of special tokens (``"sentence"``). It never has
white space behind its first character unless it is all white space, and it is never two newlines alone, because
pre-tokenizers cut those apart. Joined bytes that are no UTF-8 yet may merge.

A joined text that the vocabulary has is that token. Any other gets its embedding from an ``Embedder``: a trained
hypernetwork, or the mean of its pieces. The model sees fewer positions and is not changed.

::

    hyper = HyperEmbedding.from_pretrained("smollm2-135m").attach(model)
    dynamic = DynamicTokenizer(tokenizer, reduction=0.5, embedder=hyper)
    batch = dynamic(["a first text", "a second one"])
    model(inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask)
    model.generate(**inputs, max_new_tokens=32, custom_generate=DynamicPrefill(dynamic))
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch

from ..core.errors import BadInputError
from ..core.trace import TokenTrace
from ..core.vocabulary import backend_of, own_ids, utf8
from .base import token_bytes
from .embedding import Embedder, EmbeddingCache
from .merging import PairMerger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Carried = TypeVar("Carried")
Texts = Sequence[str] | Sequence[Sequence[int]]
"""Strings, or rows of base token ids."""
BOUNDARIES = ("pretoken", "word", "sentence")
WHITE = b" \t\n"
JOINED = 1 << 16
"""Answers on pairs that are remembered."""


@dataclass
class DynamicBatch:
    """A batch after its merges.

    Attributes:
        tokens: for each text its tokens: ids of the vocabulary, or ``-1 - n`` for the new token number n.
        pieces: base tokens of every new token.
        spans: for each text and token ``(first, end)`` in the base tokens.
        base_ids: the base tokens themselves.
        merges: how many merges were made.
        inputs_embeds: ``[B, T, d]``, if there is an embedder.
        attention_mask: ``[B, T]`` int64.
    """

    tokens: list[list[int]]
    pieces: list[tuple[int, ...]]
    spans: list[list[tuple[int, int]]]
    base_ids: list[list[int]]
    merges: int
    attention_mask: torch.Tensor
    inputs_embeds: torch.Tensor | None = None

    @property
    def reduction(self) -> float:
        """Share of the base tokens that is gone."""
        base = sum(map(len, self.base_ids))
        return 1 - sum(map(len, self.tokens)) / base if base else 0.0

    def carry(self, values: Sequence[Carried], row: int) -> list[Carried]:
        """Values of a text's base tokens (word numbers, labels) for its merged tokens: the first piece's."""
        if len(values) != len(self.base_ids[row]):
            raise BadInputError(
                f"Text {row} has {len(self.base_ids[row])} base tokens; got {len(values)} values.", "Give one for each."
            )
        return [values[first] for first, _ in self.spans[row]]

    def place(self, base: Callable[[torch.Tensor], torch.Tensor], made: torch.Tensor | None = None) -> torch.Tensor:
        """Puts every token's vector where the token is; gradients pass.

        Args:
            base: gives the model's own vectors ``[N, d]`` for ids ``[N]``.
            made: ``[len(pieces), d]``, the vectors of the new tokens; None if there are none.

        Returns:
            ``[B, T, d]``, zeros where ``attention_mask`` is 0.
        """
        flat = torch.tensor([item for row in self.tokens for item in row])
        vectors = base(flat.clamp(min=0))
        if self.pieces:
            assert made is not None and len(made) == len(self.pieces)
            fresh = (flat < 0).nonzero()[:, 0]
            places, numbers = fresh.to(vectors.device), (-1 - flat[fresh]).to(made.device)
            vectors = vectors.index_put((places,), made[numbers].to(vectors))
        mask = self.attention_mask.bool().to(vectors.device)
        return vectors.new_zeros(*mask.shape, vectors.shape[-1]).masked_scatter(mask[..., None], vectors)

    def trace(self, row: int, tokenizer: PreTrainedTokenizerBase) -> TokenTrace:
        """A text's base tokens, coloured by the merged token that they are in."""
        trace = TokenTrace(self.base_ids[row], title="dynamic tokenization", station="tokenization")
        size, part, number = [], [], []
        for index, (first, end) in enumerate(self.spans[row]):
            size += [end - first] * (end - first)
            part += [f"piece {place + 1}" if end - first > 1 else "whole" for place in range(end - first)]
            number += [index] * (end - first)
        return trace.add("pieces in the token", size).add("part", part).add("token", number).with_text(tokenizer)


@dataclass
class DynamicTokenizer:
    """Merges the tokens of every batch.

    Args:
        tokenizer: the model's own, fast.
        merges: how many; overrides ``reduction``.
        reduction: share of the possible reduction, 0 (nothing) to 1 (whole pre-tokens). Until ``fit`` has made a table,
            the merges that reach it are found in each batch.
        boundary: what tokens may not cross: ``"pretoken"``, ``"word"`` or ``"sentence"``.
        embedder: gives new tokens their vectors; without one, batches have no ``inputs_embeds``.
        cache_size: embeddings kept (the least recently used goes).
        padding_side: default the tokenizer's.

    Raises:
        BadInputError: a setting out of its range, or a tokenizer that cannot be spelt.
    """

    trace_columns: ClassVar[tuple[str, ...]] = ("pieces in the token", "part", "token")
    tokenizer: Any  # a fast tokenizer; the command line reads these types, and must not load transformers for them
    merges: int | None = None
    reduction: float = 0.3
    boundary: str = "pretoken"
    embedder: Embedder | None = field(default=None, repr=False)
    cache_size: int = 5000
    padding_side: str | None = None

    def __post_init__(self) -> None:
        if self.boundary not in BOUNDARIES:
            raise BadInputError(f"boundary is one of {', '.join(BOUNDARIES)}; got {self.boundary!r}.")
        if self.merges is not None and self.merges < 0:
            raise BadInputError(f"merges must not be negative; got {self.merges}.")
        if not 0 <= self.reduction <= 1:
            raise BadInputError(
                f"reduction is a share of what is possible, 0 to 1; got {self.reduction}.", "Half of it is 0.5."
            )
        self._bytes = token_bytes(self.tokenizer)
        self._ids = own_ids(self.tokenizer)
        self._cut = getattr(backend_of(self.tokenizer), "pre_tokenizer", None)
        self._joined: OrderedDict[bytes, bool] = OrderedDict()
        self.cache = EmbeddingCache(self.cache_size)
        self.table: np.ndarray | None = None
        """After ``fit``: mean tokens of a text after 0, 1, 2... merges."""

    # -- which pairs ---------------------------------------------------------------------------------------------------
    def valid(self, left: bytes, right: bytes) -> bool:
        """Whether two tokens, by their bytes, may become one."""
        joined = left + right
        known = self._joined.get(joined)
        if known is None:
            known = self._joined[joined] = self._valid(joined)
            if len(self._joined) > JOINED:
                self._joined.popitem(last=False)
        return known

    def _valid(self, joined: bytes) -> bool:
        if any(byte in WHITE for byte in joined[1:]) and (joined == b"\n\n" or joined.strip(WHITE)):
            return False
        if self.boundary == "sentence":
            return True
        try:
            text = joined.decode("utf-8")
        except UnicodeDecodeError:  # part of a character: nothing to test yet
            return True
        if self.boundary == "pretoken" and self._cut is not None:
            return len(self._cut.pre_tokenize_str(text)) == 1
        return len(text.split()) == 1 and not text[-1].isspace()

    # -- merging -------------------------------------------------------------------------------------------------------
    def _run(
        self, rows: list[list[int]], merges: int | None, most: int | None = None
    ) -> tuple[PairMerger, dict[bytes, tuple[bytes, bytes]], list[int]]:
        """Merges, up to a number of merges or of new tokens.

        Returns:
            The merger; the new tokens with their two parts, in the order of their numbers (which go on from the
            vocabulary's size); and the batch's length after 0, 1, 2... merges.
        """
        merger, size = PairMerger(rows), len(self._bytes)
        names: list[bytes] = []
        numbers: dict[bytes, int] = {}
        new: dict[bytes, tuple[bytes, bytes]] = {}
        lengths = [merger.length]
        while (merges is None or len(lengths) <= merges) and (most is None or len(names) < most):
            pair = merger.best()
            if pair is None:
                break
            parts = [self._bytes[item] if item < size else names[item - size] for item in pair]
            if not (parts[0] and parts[1] and self.valid(parts[0], parts[1])):
                merger.discard()
                continue
            joined = parts[0] + parts[1]
            token = self._ids.get(joined)
            if token is None:
                token = numbers.get(joined)
            if token is None:
                token = numbers[joined] = size + len(names)
                names.append(joined)
                new[joined] = (parts[0], parts[1])
            merger.merge(token)
            lengths.append(merger.length)
        return merger, new, lengths

    def vocabulary(self, texts: Texts, size: int, max_pieces: int = 8) -> list[tuple[int, ...]]:
        """New tokens from the merges of a whole corpus, the most frequent first, each as its base tokens.

        Args:
            size: at most so many tokens.
            max_pieces: tokens of more pieces (rulers, tables) are left out.
        """
        rows = self._base(texts, False)
        new = self._run(rows, None, size)[1]
        made: dict[bytes, tuple[int, ...]] = {}
        for joined, (left, right) in new.items():
            made[joined] = (*self._parts(left, made), *self._parts(right, made))
        return [pieces for pieces in made.values() if len(pieces) <= max_pieces]

    def _parts(self, data: bytes, made: dict[bytes, tuple[int, ...]]) -> tuple[int, ...]:
        return made[data] if data in made else (self._ids[data],)

    def fit(self, texts: Texts, batch_size: int = 32) -> DynamicTokenizer:
        """Measures mean lengths by merges on a sample, so that one number of merges serves all later batches.

        Returns:
            Itself.
        """
        rows = self._base(texts, True)
        totals: list[np.ndarray] = []
        for begin in range(0, len(rows), batch_size):
            totals.append(np.array(self._run(rows[begin : begin + batch_size], None)[2], np.float64))
        longest = max(map(len, totals))
        whole = sum(np.concatenate([item, np.full(longest - len(item), item[-1])]) for item in totals)
        self.table = np.asarray(whole) / len(rows)
        return self

    def merges_for(self, reduction: float, lengths: Sequence[float] | None = None) -> int:
        """The fewest merges that reach a share of the possible reduction, by the fitted table (or by ``lengths``)."""
        table = np.asarray(self.table if lengths is None else lengths, np.float64)
        if table.ndim != 1:
            raise BadInputError("There is no table of lengths yet.", "Call fit(texts) first.")
        target = table[0] - reduction * (table[0] - table[-1])
        return int(np.argmax(table <= target + 1e-9))

    def _base(self, texts: Texts, add_special_tokens: bool) -> list[list[int]]:
        if isinstance(texts, str) or not len(texts):
            raise BadInputError("Give a list of texts, or of token ids.", 'dynamic(["a text", "another"])')
        if isinstance(texts[0], str):
            for text in texts:
                utf8(text)  # type: ignore[arg-type]  # a lone surrogate is refused by name
            rows = self.tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
        else:
            rows = [[int(item) for item in row] for row in texts]
        for number, row in enumerate(rows):
            if not row:
                raise BadInputError(f"Text {number} has no tokens.", "Leave empty texts out.")
            if min(row) < 0 or max(row) >= len(self._bytes):
                raise BadInputError(
                    f"Text {number} has token ids outside 0..{len(self._bytes) - 1}.",
                    "Were they made by another tokenizer?",
                )
        return rows

    def __call__(self, texts: Texts, add_special_tokens: bool = True) -> DynamicBatch:
        """Merges over a batch.

        Args:
            texts: strings, or base token ids.

        Raises:
            BadInputError: no texts, an empty one, or ids of another tokenizer.
        """
        rows = self._base(texts, add_special_tokens)
        merges = self.merges
        if merges is None and self.table is not None:
            merges = self.merges_for(self.reduction)
        merger, _, lengths = self._run(rows, 0 if merges is None and self.reduction == 0 else merges)
        if merges is None:  # that was all the way, to see what is possible: now up to the share of it
            merges = self.merges_for(self.reduction, lengths)
            if merges < len(lengths) - 1:
                merger, _, lengths = self._run(rows, merges)
        size = len(self._bytes)
        pieces: list[tuple[int, ...]] = []
        order: dict[int, int] = {}
        tokens: list[list[int]] = []
        spans: list[list[tuple[int, int]]] = []
        for base, (merged, starts) in zip(rows, merger.rows(), strict=True):
            ends = [*starts[1:], len(base)]
            spans.append(list(zip(starts, ends, strict=True)))
            found = []
            for token, first, end in zip(merged, starts, ends, strict=True):
                if token >= size:
                    place = order.get(token)
                    if place is None:
                        place = order[token] = len(pieces)
                        pieces.append(tuple(base[first:end]))
                    token = -1 - place
                found.append(token)
            tokens.append(found)
        width = max(map(len, tokens))
        mask = torch.zeros(len(tokens), width, dtype=torch.long)
        left = (self.padding_side or getattr(self.tokenizer, "padding_side", "right")) == "left"
        for number, row in enumerate(tokens):
            mask[number, slice(width - len(row), None) if left else slice(len(row))] = 1
        batch = DynamicBatch(tokens, pieces, spans, rows, len(lengths) - 1, mask)
        if self.embedder is not None:
            batch.inputs_embeds = self._embed(batch, self.embedder)
        return batch

    def _embed(self, batch: DynamicBatch, embedder: Embedder) -> torch.Tensor:
        with torch.no_grad():
            made = self.cache.rows(batch.pieces, embedder) if batch.pieces else None
            return batch.place(embedder.base, made)

    def spell(self, batch: DynamicBatch, row: int) -> list[bytes]:
        """The bytes of a text's merged tokens."""
        base = batch.base_ids[row]
        return [
            b"".join(self._bytes[item] or b"" for item in base[first:end]) for first, end in batch.spans[row]
        ]  # fmt: skip
