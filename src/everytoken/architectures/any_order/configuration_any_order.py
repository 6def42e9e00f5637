"""The shape of a network that reads and writes text in any order."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ...core.errors import BadInputError


class AnyOrderConfig(PreTrainedConfig):
    """A transformer whose attention looks both ways.

    Args:
        vocab_size: V, the mask token included.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: of the layers; the intermediate size is
            four times the hidden one where it is None.
        max_position_embeddings: the longest text; positions are rotary.
        mask_token_id: what stands for an open position; None takes the last id.
        streams: 2 adds a query stream, which predicts a position without seeing its token (XLNet's two-stream
            attention).
        stop_head: adds a classifier at the first position: class 0 says that nothing is missing.
        shift_logits: row i of the logits predicts position i + 1, as in models that began as left-to-right ones.

    Raises:
        BadInputError: settings that contradict each other.
    """

    model_type = "any_order"

    vocab_size: int = 32
    hidden_size: int = 128
    intermediate_size: int | None = None
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    mask_token_id: int | None = None
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    streams: int = 1
    stop_head: bool = False
    shift_logits: bool = False
    hidden_dropout_prob: float = 0.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.streams not in (1, 2):
            raise BadInputError(f"There are 1 or 2 streams; got {self.streams}.")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise BadInputError(
                f"A width of {self.hidden_size} does not give {self.num_attention_heads} heads an even size each."
            )
        if self.mask_token_id is None:
            self.mask_token_id = self.vocab_size - 1
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise BadInputError(f"mask_token_id={self.mask_token_id} is no token: there are {self.vocab_size}.")
        if self.streams == 2 and self.shift_logits:
            raise BadInputError("A query stream predicts its own position.", "Leave shift_logits out.")
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)
