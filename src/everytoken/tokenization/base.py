"""The station's contracts: what a method of tokenization may be.

- ``Retokenizer`` rewrites token sequences: the same bytes in other tokens.
- ``BatchMerger`` makes longer tokens of a batch.
- ``ByteMethod`` turns a model of tokens into a ``ByteModel``.
- ``Transplanter`` puts another tokenizer under a model.

A class keeps a contract if it has the contract's methods; ``trial`` runs it by the contract that it keeps. The bytes of
tokens are in ``core.vocabulary``; ``byte_view`` encodes bytes and tells which token sequences can begin an encoding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ..core.errors import BadInputError
from ..core.progress import Report, silent
from ..core.vocabulary import byte_stand_ins, own_ids, spell, token_bytes, utf8

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..core.trace import TokenTrace

__all__ = [
    "BatchMerger",
    "ByteMethod",
    "ByteModel",
    "MergedBatch",
    "Retokenized",
    "Retokenizer",
    "Transplanter",
    "bits_a_byte",
    "byte_stand_ins",
    "own_ids",
    "spell",
    "start_token",
    "token_bytes",
    "utf8",
]


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a text starts from: BOS, or EOS where there is none.

    Raises:
        BadInputError: the tokenizer has neither.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise BadInputError("The tokenizer has neither BOS nor EOS.", "Pass context=[token ids].")
    return int(start)


def bits_a_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, window: int = 512) -> float:
    """Bits per byte of a text; comparable over tokenizers.

    Args:
        window: tokens that are read together; each window starts from nothing.

    Raises:
        BadInputError: the tokenizer makes no tokens of the text, or it holds a lone surrogate.
    """
    import torch

    from ..core.logprobs import token_stats
    from ..core.scoring import output_head

    size = len(utf8(text))
    ids, start, total = tokenizer(text, add_special_tokens=False)["input_ids"], start_token(tokenizer), 0.0
    if not ids:
        raise BadInputError("The tokenizer makes no tokens of this text.", "Give a text that is not empty.")
    head = output_head(model)
    with torch.inference_mode():
        for begin in range(0, len(ids), window):
            row = torch.tensor([[start, *ids[begin : begin + window]]], device=model.device)
            hidden = model.base_model(input_ids=row).last_hidden_state[0, :-1]
            stats = token_stats(hidden, head.weight, row[0, 1:], bias=head.bias, rule=head.rule)
            total -= float(stats.logps.sum())
    return total / math.log(2) / size


@dataclass
class Retokenized:
    """A token sequence made from another one.

    Attributes:
        ids: the new token ids, int64.
        source: for each new token, the index of the old token that it came from, non-decreasing.
    """

    ids: np.ndarray
    source: np.ndarray


@runtime_checkable
class Retokenizer(Protocol):
    """Rewrites token sequences: the same bytes, other tokens. Built as ``factory(tokenizer, seed=..., **settings)``."""

    def expand(self, ids: Sequence[int], seed: int | None = None) -> Retokenized:
        """Rewrites one sequence; with a ``seed`` the result depends on nothing else."""
        ...


class MergedBatch(Protocol):
    """What a ``BatchMerger`` gives.

    Attributes:
        tokens: for each text its tokens: ids of the vocabulary, or ``-1 - n`` for the new token number n.
        pieces: base tokens of every new token.
        spans: for each text and token ``(first, end)`` in the base tokens.
    """

    tokens: list[list[int]]
    pieces: list[tuple[int, ...]]
    spans: list[list[tuple[int, int]]]


@runtime_checkable
class BatchMerger(Protocol):
    """Makes longer tokens of a batch. Such a method brings a trial of its own (``trial`` on its card)."""

    def merges_for(self, reduction: float) -> int:
        """The fewest merges that reach a share of the possible reduction."""
        ...

    def __call__(self, texts: Sequence[str]) -> MergedBatch: ...


@runtime_checkable
class ByteModel(Protocol):
    """A model of text by bytes, whatever its tokens.

    Attributes:
        forwards: forward passes so far.
    """

    forwards: int

    def next_byte_logprobs(self, prefix: str | bytes) -> np.ndarray:
        """``[257]`` natural log-probabilities; the last is the end of the text."""
        ...

    def generate(
        self,
        prefix: str | bytes,
        max_new_bytes: int = 64,
        do_sample: bool = False,
        temperature: float = 1.0,
        seed: int | None = None,
        unit: str | None = None,
    ) -> bytes:
        """New bytes after a prefix; ``unit`` is ``"token"``, ``"byte"`` or None for the model's own setting."""
        ...

    def trace(self, prefix: str | bytes) -> TokenTrace:
        """The tokens that the model weighs after a prefix."""
        ...


@runtime_checkable
class ByteMethod(Protocol):
    """Turns a model of tokens into a model of bytes. Built as ``factory(**settings)``."""

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises UnsupportedModelError for an architecture that it cannot read; the weights may be missing."""
        ...

    def on(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] | None = None
    ) -> ByteModel:
        """The model of bytes, with token ids before every text (default: BOS)."""
        ...


@runtime_checkable
class Transplanter(Protocol):
    """Puts another tokenizer under a trained model. Built as ``factory(**settings)``."""

    def transplant(
        self,
        model: PreTrainedModel,
        old_tokenizer: PreTrainedTokenizerBase,
        new_tokenizer: PreTrainedTokenizerBase,
        report: Report = silent,
    ) -> PreTrainedModel:
        """A copy of the model for the new tokenizer."""
        ...

    def trace(
        self,
        old_tokenizer: PreTrainedTokenizerBase,
        new_tokenizer: PreTrainedTokenizerBase,
        ids: Sequence[int],
    ) -> TokenTrace:
        """What the new tokens of a text are made of."""
        ...

    def summary(self) -> str:
        """One sentence on the last transplant."""
        ...
