"""Exact byte probabilities of a tokenised model (arXiv 2410.09303).

A prompt that ends inside what would be a longer token biases the model. After "hel" tokenised alone, "lo" gets next to
no mass, because "hello" was one token in training. The probability that the text starts with the bytes x is a sum over
the *covers* of x: the token sequences whose last token reaches the end of x and may stick out::

    P(x_1..x_n) = sum over t in cover(x) of P(t_1..t_k)
    cover(x) = { t : t can begin an encoding,
                     bytes(t_1..t_k-1) is a proper prefix of x,  x is a prefix of bytes(t_1..t_k) }

    P(x_n+1 | x_1..x_n) = P(x_1..x_n+1) / P(x_1..x_n)

Up to the last settled word the encoding is fixed, so only splits inside the window after it count. For each split these
are the ways to encode the left part, and the vocabulary's tokens that start with the right part. All left parts form a
small tree that runs through the model in one forward pass a byte, on a cache that is kept from byte to byte.

::

    lm = ExactBytes().on(model, tokenizer)
    lm.generate("The capital of France is Par", 16)          # b"is, ..."
    lm.next_byte_logprobs("hel")                             # [257]: 256 bytes and the end of the text
    ByteEnsemble([lm, other_lm]).generate("def fib", 32)     # models with different vocabularies

``exact`` drops covers that are no beginning of any text's encoding, and normalises what is left. A perfect model would
give such covers no mass; a trained one leaks a little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..core.errors import BadInputError, check_choices
from .byte_lm import ByteLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class ExactBytes:
    """The settings of a ``ByteLM``, apart from its model: ``ExactBytes().on(model, tokenizer)``.

    Args:
        unit: ``"token"`` or ``"byte"``: how ``generate`` goes on after the prompt.
        exact, tolerance: see ``ByteLM``.
    """

    trace_columns: ClassVar[tuple[str, ...]] = ("probability", "beyond", "tokens in the window")
    unit: str = "token"
    exact: bool = True
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        check_choices(self, unit=("byte", "token"))
        if not 0 <= self.tolerance < 1:
            raise BadInputError(f"tolerance is a share of the mass, 0 to 1; got {self.tolerance}.")

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises UnsupportedModelError for an architecture that ``ByteLM`` cannot read; the weights may be missing."""
        ByteLM.check_model(model)

    def on(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] | None = None
    ) -> ByteLM:
        """The model as a model of bytes.

        Args:
            context: token ids before every text; default BOS.
        """
        return ByteLM(model, tokenizer, context, self.exact, self.tolerance, self.unit)
