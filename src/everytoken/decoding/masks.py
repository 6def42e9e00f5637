"""A mask of one's own in the form that a model's attention takes: a row for each query, a column for each key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedModel


def attention_mask_for(model: PreTrainedModel, allowed: torch.Tensor) -> torch.Tensor | BlockMask:
    """A boolean mask ``[1, 1, q, k]`` in the form that the model's attention takes.

    Eager attention adds it to its scores. Flex attention takes a function of places and may ask it beyond the last one.
    """
    attention = getattr(model.config.get_text_config(), "_attn_implementation", None)
    if attention == "flex_attention":
        return _block_mask(allowed[0, 0])
    if attention != "eager":
        return allowed
    return torch.zeros(allowed.shape, dtype=model.dtype, device=allowed.device).masked_fill(
        ~allowed, torch.finfo(model.dtype).min
    )


def _block_mask(allowed: torch.Tensor, block: int = 128) -> BlockMask:
    """``[q, k]`` as flex attention takes it. Its blocks reach past the last row and column: what is there is False."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, columns = allowed.shape
    table = torch.nn.functional.pad(allowed, (0, -columns % block, 0, -rows % block))

    def visible(_batch: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return table[query, key]

    return create_block_mask(visible, 1, None, rows, columns, device=allowed.device)
