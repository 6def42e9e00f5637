"""Token healing: the cheap baseline for prompts that end inside a token.

The prompt's last tokens are dropped, and the model chooses again among the tokens that start with the dropped bytes.

::

    model.generate(**inputs, max_new_tokens=16, custom_generate=TokenHealing(tokenizer))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor

from ..core.errors import BadInputError
from .byte_view import ByteView


@dataclass
class TokenHealing:
    """The cheap baseline, as ``custom_generate``: drop the prompt's last token and choose again among tokens that start with it.

    Args:
        tokenizer: the model's.
        back: how many tokens to drop.

    Where a prompt's end is split into more tokens than are dropped, the bias stays.
    """

    tokenizer: Any
    back: int = 1

    def __post_init__(self) -> None:
        if self.back < 1:
            raise BadInputError(f"back is at least 1; got {self.back}.")
        self.view = ByteView.of(self.tokenizer)

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """As ``generate``; the row returned starts with the prompt's bytes, not always with its tokens.

        Raises:
            BadInputError: more than one row, or a prompt that is not longer than what is dropped.
        """
        from transformers import LogitsProcessorList

        if input_ids.shape[0] != 1 or input_ids.shape[1] <= self.back:
            raise BadInputError(
                f"TokenHealing takes one row of more than {self.back} tokens; got {tuple(input_ids.shape)}."
            )
        dropped = input_ids[0, -self.back :].tolist()
        healer = _Healer(self.view, self.view.spell(dropped), input_ids.shape[1] - self.back)
        if model_kwargs.get("attention_mask") is not None:
            model_kwargs["attention_mask"] = model_kwargs["attention_mask"][:, : -self.back]
        return model._sample(
            input_ids[:, : -self.back],
            logits_processor=LogitsProcessorList([healer, *(logits_processor or [])]),
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **model_kwargs,
        )


class _Healer(LogitsProcessor):
    """Allows only tokens that agree with bytes still to be spelled."""

    def __init__(self, view: ByteView, data: bytes, length: int):
        self.view, self.data, self.length = view, data, length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        done = self.view.spell(input_ids[0, self.length :].tolist())
        rest = self.data[len(done) :]
        if not rest:
            return scores
        ids = self.view.starting_with(rest)[0].tolist()
        ids += [
            i
            for size in range(1, len(rest))
            for i in self.view.starting_with(rest[:size])[0].tolist()
            if self.view.bytes[i] == rest[:size]
        ]
        kept = torch.full_like(scores, -torch.inf)
        kept[:, ids] = scores[:, ids]
        return kept
