"""Orders of a canvas as masks of attention: who may see whom where some positions are known and the others follow."""

from __future__ import annotations

import torch


def subset_order(known: torch.Tensor) -> torch.Tensor:
    """``[B, T]`` ranks of the order that knows some positions: known ones first, the others from left to right.

    One order a subset: a model learns ``2^T`` conditionals instead of ``T!``.
    """
    return (~known).long().sort(dim=1, stable=True).indices.argsort(1)


def order_mask(ranks: torch.Tensor, known: torch.Tensor, upto: torch.Tensor | None = None) -> torch.Tensor:
    """``perm_mask [B, T, T]``, float, 1 where position i must not see position j.

    Args:
        ranks: ``[B, T]``, see ``subset_order``.
        known: ``[B, T]`` bool; known positions see each other both ways, since nobody asks for their density.
        upto: ``[B]``, draft: every open position sees those of a rank below this alone. None: each sees the earlier
            ones.
    """
    if upto is not None:
        ranks = torch.where(ranks >= upto[:, None], ranks.shape[1], ranks)
    hidden = ranks[:, :, None] <= ranks[:, None, :]
    return (hidden & ~(known[:, :, None] & known[:, None, :])).float()
