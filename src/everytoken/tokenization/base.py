"""The station's contract: methods that rewrite token sequences, same bytes, other tokens (see ``core.vocabulary`` for bytes)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..core.vocabulary import byte_stand_ins, spell, token_bytes

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Retokenized", "Retokenizer", "byte_stand_ins", "spell", "token_bytes"]


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
