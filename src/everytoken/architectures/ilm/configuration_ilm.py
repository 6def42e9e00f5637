"""The shape of an insertion language model."""

from __future__ import annotations

from typing import Any

from ...core.errors import BadInputError
from ..any_order.configuration_any_order import AnyOrderConfig


class InsertionLMConfig(AnyOrderConfig):
    """A network for any order that says what is missing, where, and whether anything is.

    Further arguments are those of ``AnyOrderConfig``.

    Args:
        cls_token_id: begins every text and carries the stop head; nothing is inserted right behind it.
        bos_token_id: stands between a question and its answer, or begins a text without a question.
        prefix_gaps: whether tokens may be inserted into the question too, as the released code trains it.

    Raises:
        BadInputError: settings that contradict each other.
    """

    model_type = "ilm"

    cls_token_id: int = 2
    bos_token_id: int | None = 3
    stop_head: bool = True
    prefix_gaps: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not self.stop_head or self.streams != 1 or self.shift_logits:
            raise BadInputError(
                "An insertion language model has a stop head, one stream, and logits that do not shift."
            )
        if not 0 <= self.cls_token_id < self.vocab_size:
            raise BadInputError(f"cls_token_id={self.cls_token_id} is no token: there are {self.vocab_size}.")

    @property
    def never_inserted(self) -> tuple[int, ...]:
        """Ids of padding, of masks, and of what begins a text or an answer."""
        named = (self.pad_token_id, self.mask_token_id, self.cls_token_id, self.bos_token_id)
        return tuple(sorted({item for item in named if item is not None}))
