"""The station's contracts: methods that rewrite token sequences (same bytes, other tokens), batches that merge, models over bytes.

The bytes of tokens are in ``core.vocabulary``; ``byte_view`` encodes bytes and tells which token sequences can begin an encoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..core.errors import BadInputError
from ..core.vocabulary import byte_stand_ins, spell, token_bytes

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "BatchMerger",
    "ByteModel",
    "Retokenized",
    "Retokenizer",
    "byte_stand_ins",
    "spell",
    "start_token",
    "token_bytes",
]


def start_token(tokenizer: Any) -> int:
    """What a text starts from: BOS, or EOS where there is none.

    Raises:
        BadInputError: the tokenizer has neither.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise BadInputError("The tokenizer has neither BOS nor EOS.", "Pass context=[token ids].")
    return int(start)


@dataclass
class Retokenized:
    """A token sequence made from another one.

    Attributes:
        ids: the new token ids, int64.
        source: for each new token, the index of the old token that it came from, non-decreasing.
    """

    ids: np.ndarray
    source: np.ndarray


class Retokenizer(Protocol):
    """The station's contract for methods that rewrite token sequences: same bytes, other tokens."""

    def expand(self, ids: Any, seed: int | None = None) -> Retokenized: ...


class BatchMerger(Protocol):
    """Methods that make longer tokens of a batch; what they give has ``tokens``, ``pieces``, ``spans`` and ``inputs_embeds``."""

    def merges_for(self, reduction: float) -> int: ...

    def __call__(self, texts: Any) -> Any: ...


class ByteModel(Protocol):
    """A model of text by bytes, whatever its tokens; what ``factory(**settings).on(model, tokenizer)`` gives."""

    forwards: int

    def next_byte_logprobs(self, prefix: str | bytes) -> np.ndarray:
        """``[257]`` natural log-probabilities; the last is the end of the text."""
        ...

    def generate(self, prefix: str | bytes, max_new_bytes: int = 64, **options: Any) -> bytes: ...
