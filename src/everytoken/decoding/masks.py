"""Attention masks in the form that a model's attention takes."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def attention_mask_for(model: PreTrainedModel, allowed: torch.Tensor) -> torch.Tensor:
    """A boolean mask in the form that the model's attention takes: eager attention adds it to its scores."""
    if getattr(model.config, "_attn_implementation", None) != "eager":
        return allowed
    return torch.zeros(allowed.shape, dtype=model.dtype, device=allowed.device).masked_fill(
        ~allowed, torch.finfo(model.dtype).min
    )
