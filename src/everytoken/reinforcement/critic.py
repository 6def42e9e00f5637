"""A critic: values of the states before every response token, trained on the returns of a policy's rollouts."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..core.logprobs import masked_mean
from ..core.scoring import base_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Critic(nn.Module):
    """A copy of a causal model's body with a scalar head.

    Args:
        model: the model to copy (its output head is left out); make the critic before a trainer patches the model.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        base = base_model(model)
        self.body = copy.deepcopy(base.base_model)
        self.body.requires_grad_(True)
        self._no_split_modules = base._no_split_modules  # the layers that FSDP keeps together
        self.head = nn.Linear(base.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)  # begins by expecting nothing
        nn.init.zeros_(self.head.bias)
        self.head.to(next(self.body.parameters()).dtype)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor, length: int) -> torch.Tensor:
        """Values ``[B, length]`` of the states from which the last ``length`` tokens of ``ids`` ``[B, P + length]``
        were chosen.
        """
        positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        hidden = self.body(
            input_ids=ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        return self.head(hidden[:, -length - 1 : -1])[..., 0].float()


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    clip: float | None = 0.2,
    by_row: bool = True,
) -> torch.Tensor:
    """PPO's clipped value loss (arXiv 1707.06347): half the mean over ``mask`` of the larger of two squared errors; all
    ``[B, T]``.

    Args:
        by_row: the mean of the rows' means, so that every response counts alike; False takes the mean of all tokens.
    """
    errors = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        errors = torch.maximum(errors, (near - returns).square())
    return 0.5 * (masked_mean(errors, mask).mean() if by_row else masked_mean(errors, mask, dim=None))
