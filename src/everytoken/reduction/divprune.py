"""DivPrune: keeps the visual tokens that are farthest from each other (Alvar and others, arXiv 2503.02175).

Of the ``N`` projected tokens of an image it keeps the set ``S`` of ``m`` whose smallest distance is as large as greedy
choice makes it (the max-min diversity problem)::

    D_ij = 1 - cos(x_i, x_j)                                  in [0, 2]
    s_1  = argmax_i min_{j != i} D_ij                         the most isolated token
    s_t  = argmax_{i not in S} min_{s in S} D_is              until |S| = m

No training, no text, one choice before the language model. A zero vector has distance 1 to everything. Ties go to the
lowest index, and chosen tokens are never chosen again, so that the indices are distinct even where tokens are equal.

The distances are one matrix product as long as the matrix is small; beyond ``WHOLE`` tokens only the rows of chosen
tokens are computed, and the first choice goes through the matrix in blocks of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..core.errors import BadInputError
from .arithmetic import unit_rows
from .base import Declaration, Reduction, ReductionContext, check_features, check_share, count_kept, selection

METRICS = ("cosine", "l2", "l1")
WHOLE = 4096
"""Up to so many tokens the matrix of distances is held whole (64 MiB in float32)."""
BLOCK = 512
MIRRORED = 256
"""Blocks of the matrix are at least so wide."""


def _distances(points: torch.Tensor, rows: torch.Tensor, metric: str) -> torch.Tensor:
    """``[R, N]`` distances from the tokens ``rows`` to all tokens; a token's own is 0."""
    if metric == "cosine":
        found = (points[rows] @ points.T).neg_().add_(1.0)
    else:
        mode = "donot_use_mm_for_euclid_dist"  # exact for equal tokens
        found = torch.cdist(points[rows], points, p=2.0 if metric == "l2" else 1.0, compute_mode=mode)
    found[torch.arange(len(rows), device=points.device), rows] = 0.0
    return found


def _all_distances(points: torch.Tensor, metric: str) -> torch.Tensor:
    """``[N, N]``; half of the cosines are mirrored, for the product is most of the work."""
    total = len(points)
    if metric != "cosine":
        return _distances(points, torch.arange(total, device=points.device), metric)
    side = max(MIRRORED, -(-total // 8))
    if total <= side:
        return (points @ points.T).neg_().add_(1.0).fill_diagonal_(0.0)
    matrix = points.new_empty(total, total)
    for start in range(0, total, side):
        rows = matrix[start : start + side, start:]
        torch.mm(points[start : start + side], points[start:].T, out=rows)
        matrix[start + side :, start : start + side] = rows[:, side:].T
    return matrix.neg_().add_(1.0).fill_diagonal_(0.0)


def max_min_diverse(
    features: torch.Tensor, count: int, metric: str = "cosine", whole: int = WHOLE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy max-min diverse choice.

    The first ``k`` picks for ``count`` are the picks for ``k``: one run serves every budget up to its own.

    Args:
        features: ``[N, d]``.
        count: how many to choose, 1 to N.
        metric: ``"cosine"``, ``"l2"`` or ``"l1"``.
        whole: up to so many tokens the matrix of distances is held whole; the choice does not depend on it.

    Returns:
        ``[count]`` indices in the order of the picks, and ``[N]`` scores: a chosen token's distance when it was picked,
        another's distance to what was chosen.

    Raises:
        BadInputError: features that are no finite matrix, a count out of range, or an unknown metric.
    """
    check_features(features)
    total = len(features)
    if not 1 <= count <= total:
        raise BadInputError(f"The number of tokens to choose lies between 1 and {total}; got {count}.")
    if metric not in METRICS:
        raise BadInputError(f"metric is one of {', '.join(METRICS)}; got {metric!r}.")
    points = features.detach()
    points = unit_rows(points) if metric == "cosine" else points.to(torch.promote_types(points.dtype, torch.float32))
    matrix = _all_distances(points, metric) if total <= whole else None
    isolation = points.new_zeros(total)
    if total > 1 and matrix is not None:
        isolation = matrix.fill_diagonal_(torch.inf).min(-1).values
        matrix.fill_diagonal_(0.0)
    elif total > 1:
        for rows in torch.arange(total, device=points.device).split(BLOCK):
            block = _distances(points, rows, metric)
            block[torch.arange(len(rows), device=points.device), rows] = torch.inf
            isolation[rows] = block.min(-1).values
    picks = torch.empty(count, dtype=torch.long, device=points.device)
    scores = points.new_empty(total)
    open_scores = isolation  # of tokens that may still be picked; picked ones stand at minus infinity
    for number in range(count):
        pick = open_scores.argmax()
        picks[number] = pick
        scores[pick] = open_scores[pick]
        row = matrix[pick] if matrix is not None else _distances(points, pick[None], metric)[0]
        # what is picked stays at minus infinity: a minimum never lifts it
        open_scores = row.clone() if number == 0 else torch.minimum(open_scores, row, out=open_scores)
        open_scores[pick] = -torch.inf
    return picks, torch.where(torch.isfinite(open_scores), open_scores, scores)


@dataclass
class DivPrune:
    """Keeps a diverse subset of an image's tokens.

    Args:
        keep: the share to keep.
        num_tokens: how many to keep instead of a share (all, where an image has fewer).
        metric: ``"cosine"``, ``"l2"`` or ``"l1"``.

    Raises:
        BadInputError: a share outside (0, 1], a number below 1, or an unknown metric.
    """

    keep: float = 0.098
    num_tokens: int | None = None
    metric: str = "cosine"
    declares: ClassVar[Declaration] = Declaration(
        where=("model input",),
        criterion="smallest distance to what is kept",
        strategy="select",
        budget="fixed share or number",
    )

    def __post_init__(self) -> None:
        check_share("keep", self.keep)
        if self.num_tokens is not None and self.num_tokens < 1:
            raise BadInputError(f"num_tokens is at least 1; got {self.num_tokens}.")
        if self.metric not in METRICS:
            raise BadInputError(f"metric is one of {', '.join(METRICS)}; got {self.metric!r}.")

    def reduce(self, features: torch.Tensor, context: ReductionContext) -> Reduction:
        """``features [N, d]`` -> the most diverse of them, in their order."""
        check_features(features)
        total = len(features)
        count = count_kept(total, self.keep) if self.num_tokens is None else min(self.num_tokens, total)
        if count == total:
            return selection(features, torch.arange(total, device=features.device))
        picks, scores = max_min_diverse(features, count, self.metric)
        return selection(features, picks, scores)
