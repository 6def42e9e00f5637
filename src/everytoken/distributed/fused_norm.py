"""Reduce-scatter, residual and RMSNorm on a shard, all-gather: one operation in the place of an all-reduce and a norm.

Rank ``r`` has the partial sum ``X_r`` and holds the residual's own rows only::

    Y = (sum_r X_r) on own rows        reduce-scatter
    R <- R + Y                         own rows
    N = norm(R), gathered              all-gather

The bytes on the wire are those of the all-reduce. A rank normalises ``1/W`` of the rows. Rows that ``W`` does not
divide are padded with zeros. The operation has a gradient: that of the sum of all ranks' losses. Ranks hold the norm's
weight whole, so each gets its rows' part of that weight's gradient, and the sum over ranks is the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from ..core.errors import BadInputError
from .splits import rounded

Group = Any
"""A ``torch.distributed`` process group, or None for one rank without one. A group of one rank sends to itself."""
Norm = Callable[[torch.Tensor], torch.Tensor]


def ranks(group: Group) -> int:
    """How many ranks a group has."""
    return 1 if group is None else dist.get_world_size(group)


def reduce_scatter(rows: torch.Tensor, group: Group) -> torch.Tensor:
    """``[W m, h] -> [m, h]``: this rank's rows of the sum over ranks."""
    own = rows.new_empty(rows.shape[0] // ranks(group), *rows.shape[1:])
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # the old name before torch 2.13
    call(own, rows.contiguous(), group=group)
    return own


def all_gather(own: torch.Tensor, group: Group) -> torch.Tensor:
    """``[m, h] -> [W m, h]``: the rows of all ranks."""
    rows = own.new_empty(own.shape[0] * ranks(group), *own.shape[1:])
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    call(rows, own.contiguous(), group=group)
    return rows


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return reduce_scatter(rows, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return all_gather(gradient, ctx.group), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return all_gather(own, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return reduce_scatter(gradient, ctx.group), None


def own_rows(rows: torch.Tensor, group: Group) -> torch.Tensor:
    """This rank's rows of what all ranks hold: ``[m, h] -> [ceil(m / W), h]``, padded with zeros."""
    world = ranks(group)
    if world == 1:
        return rows
    each = rounded(rows.shape[0], world) // world
    padded = F.pad(rows, (0, 0, 0, each * world - rows.shape[0]))
    first = dist.get_rank(group) * each
    return padded[first : first + each]


def reduce_add_norm(
    partial: torch.Tensor, residual: torch.Tensor, norm: Norm, group: Group = None, reduce: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operation.

    Args:
        partial: ``[m, h]``, this rank's part of the sum.
        residual: ``[ceil(m / W), h]``, this rank's rows.
        norm: a norm of single rows, such as a model's RMSNorm.
        group: the ranks; None is one rank.
        reduce: whether ``partial`` is a part; else every rank has the whole, and the reduce-scatter is left out.

    Returns:
        The normalised rows ``[m, h]`` of all ranks, and this rank's rows of the new residual.

    Raises:
        BadInputError: a residual of other rows.
    """
    world, count = ranks(group), partial.shape[0]
    each = rounded(count, world) // world
    if partial.dim() != 2 or residual.shape != (each, partial.shape[1]):
        raise BadInputError(
            f"Rows {tuple(partial.shape)} on {world} ranks go with a residual of {(each, partial.shape[-1])} on each; "
            f"got {tuple(residual.shape)}."
        )
    if group is None:
        residual = residual + partial
        return norm(residual), residual
    if reduce:
        own = _ReduceScatter.apply(F.pad(partial, (0, 0, 0, each * world - count)), group)
    else:
        own = own_rows(partial, group)
    residual = residual + own
    return _AllGather.apply(norm(residual), group)[:count], residual


def all_reduce_add_norm(
    partial: torch.Tensor, residual: torch.Tensor, norm: Norm, group: Group = None, reduce: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """What it stands for: all-reduce, residual and norm of all rows on every rank; without a gradient.

    Args:
        residual: ``[m, h]``, all rows.

    Returns:
        ``[m, h]`` normalised, and the new residual.
    """
    if reduce and group is not None:
        partial = partial.contiguous().clone()
        dist.all_reduce(partial, group=group)
    residual = residual + partial
    return norm(residual), residual
