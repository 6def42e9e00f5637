"""A package token: what was dropped goes on as one token, its mean (soft pruning; arXiv 2505.18227, section 3).

::

    X' = [kept tokens, mean of dropped tokens]          the mean at the place of the last dropped token
"""

from __future__ import annotations

import torch

from ..core.errors import BadInputError
from .base import Reduction, combination


def with_package(features: torch.Tensor, reduction: Reduction, weights: torch.Tensor | None = None) -> Reduction:
    """A selection with a package token behind it; the selection itself where nothing was dropped.

    Args:
        features: ``[N, d]``, what was reduced.
        reduction: a selection of them.
        weights: ``[N]``, not negative, of the mean; None for equal ones.

    Raises:
        BadInputError: a reduction that combines tokens, or weights that vanish on everything that was dropped.
    """
    if reduction.kept is None:
        raise BadInputError("A package token goes behind a selection; here every token went on already.")
    dropped = (reduction.groups() < 0).nonzero()[:, 0]
    if not len(dropped):
        return reduction
    share = torch.ones(len(dropped), device=features.device) if weights is None else weights[dropped].float()
    if not bool(share.sum() > 0):
        raise BadInputError("The weights of what was dropped are all zero.")
    places = torch.cat([reduction.kept, dropped[-1:]])
    member = torch.zeros(len(places), len(features), device=features.device)
    member[torch.arange(len(reduction.kept)), reduction.kept] = 1.0
    member[-1, dropped] = share / share.sum()
    sizes = torch.cat([reduction.sizes, torch.tensor([len(dropped)], device=features.device)])
    order = places.argsort()
    packed = combination(features, member[order], sizes[order])
    packed.places, packed.scores = places[order], reduction.scores
    return packed
