"""Several models as one, whatever their vocabularies: all of them know bytes (arXiv 2410.09303).

::

    P(next byte | text) = sum over models m of w_m P_m(next byte | text)

    ByteEnsemble([lm, other_lm]).generate("def fib", 32)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..core.errors import BadInputError
from ..core.vocabulary import utf8
from .byte_lm import ByteLM, generate_bytes


class ByteEnsemble:
    """Several models as one, whatever their vocabularies: the mixture of their next-byte distributions.

    Args:
        models: ``ByteLM`` objects.
        weights: of the mixture; default equal.

    Raises:
        BadInputError: no model, or weights that are not as many positive numbers.
    """

    def __init__(self, models: Sequence[ByteLM], weights: Sequence[float] | None = None):
        weights = [1.0] * len(models) if weights is None else list(weights)
        if not models or len(weights) != len(models) or min(weights) <= 0:
            raise BadInputError(
                f"An ensemble needs models and as many positive weights; got {len(models)} and {weights}."
            )
        self.models = list(models)
        self.weights = np.array(weights) / sum(weights)

    def next_byte_logprobs(self, prefix: str | bytes) -> np.ndarray:
        """``[257]``, as for ``ByteLM``."""
        parts = [
            model.next_byte_logprobs(prefix) + math.log(w) for model, w in zip(self.models, self.weights, strict=True)
        ]
        return np.logaddexp.reduce(parts)

    def logprob(self, text: str | bytes) -> float:
        """Log-probability (nats) that a text starts with ``text``, by the chain rule: one step a byte."""
        data = utf8(text)
        return float(sum(self.next_byte_logprobs(data[:place])[data[place]] for place in range(len(data))))

    def generate(
        self,
        prefix: str | bytes,
        max_new_bytes: int = 64,
        do_sample: bool = False,
        temperature: float = 1.0,
        seed: int | None = None,
    ) -> bytes:
        """New bytes after a prefix, byte by byte."""
        start = utf8(prefix)
        return generate_bytes(self, start, max_new_bytes, do_sample, temperature, np.random.default_rng(seed))
