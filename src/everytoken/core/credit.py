"""Sums over what follows a token: the one recursion of returns, advantages and propagated losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK = 256
"""Positions that are summed by one small matrix product; blocks are linked by a carry."""


def discounted_sums(values: torch.Tensor, gamma: float) -> torch.Tensor:
    """``c_t = sum_{i >= t} gamma^(i - t) values_i`` over the last dimension, differentiable: ``[..., T] -> [..., T]``.

    Positions with value 0 add nothing but still count as a step. Works block by block: no loop over tokens, and no
    powers that underflow for long sequences.
    """
    import torch

    length = values.shape[-1]
    if length == 0 or gamma == 0:
        return values.clone()
    size = min(BLOCK, length)
    steps = torch.arange(size, device=values.device)
    gaps = steps[:, None] - steps  # [i, t]: i - t
    decay = torch.where(
        gaps >= 0, torch.full((), gamma, dtype=values.dtype, device=values.device) ** gaps.clamp(min=0), 0
    )
    ahead = torch.full((), gamma, dtype=values.dtype, device=values.device) ** (
        size - steps
    )  # from t to the next block
    padded = torch.nn.functional.pad(values, (0, -length % size))
    blocks = padded.unflatten(-1, (-1, size)) @ decay
    parts, carry = [], torch.zeros_like(blocks[..., 0, :1])
    for index in range(blocks.shape[-2] - 1, -1, -1):
        parts.append(blocks[..., index, :] + ahead * carry)
        carry = parts[-1][..., :1]
    return torch.cat(parts[::-1], -1)[..., :length]
