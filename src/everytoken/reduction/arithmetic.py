"""Small pieces of arithmetic that several reducers use."""

from __future__ import annotations

import math

import torch

SLACK = 1e-9
"""Shares such as 7/9 are no exact floats: without it 352 tokens would be 351."""


def whole_part(total: float, share: float) -> int:
    """``floor(total share)``."""
    return math.floor(total * share + SLACK)


def unit_rows(points: torch.Tensor) -> torch.Tensor:
    """``[..., d]`` vectors of unit length in float32 at least; zero vectors stay zero."""
    points = points if points.dtype == torch.float64 else points.float()
    norms = torch.linalg.vector_norm(points, dim=-1, keepdim=True)
    return points / norms.masked_fill(norms == 0, 1.0)


def cosines(points: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """``[P, d], [Q, d]`` -> ``[P, Q]`` in float32 at least; 0 where a vector is zero."""
    return unit_rows(points) @ unit_rows(others).T


def top_indices(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` largest scores' indices, the largest first; ties to the lowest index."""
    return scores.argsort(descending=True, stable=True)[:count]


def means_of(owner: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ``[count, N]`` that average the tokens of every group, and the groups' sizes ``[count]``.

    Args:
        owner: ``[N]``, the group of each token; none is empty.
    """
    member = torch.nn.functional.one_hot(owner, count).T.float()
    sizes = member.sum(-1)
    return member / sizes[:, None], sizes.long()
