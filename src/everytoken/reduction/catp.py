"""CATP: prunes the image tokens of few-shot prompts by their text and by the query (Li and others, arXiv 2508.07871).

A prompt is ``(I_1, T_1), ..., (I_n, T_n), (I_q, T_q)``: images, each with its text, the query last. A share ``R`` of
all image tokens goes in two steps. Before the decoder, for every image, the greedy maximiser of ::

    F(Y) = sum_{x in X_i} max_{y in Y} s(y, x) + lambda1 sum_{y in Y} s(y, v_i),     |Y| = floor(S_i (1 - R/2))

with ``s = (1 + cos) / 2`` and ``v_i`` the mean embedding of the image's text. Inside the decoder, behind layer K, the
demonstrations' image tokens in one ranking, and behind layer K + 1 the query's::

    score(c) = max(0, A^K[t, c] - A^(K-1)[t, c]) + lambda2 cos(h^K_c, mean of h^K over the query)
    score(u) = cos(h^(K+1)_u, mean of h^(K+1) over the demonstrations that are left)

``A[t, .]`` is the attention of the prompt's last token, averaged over heads. They keep ``floor(sum S_i (1 - R))`` and
``floor(S_q (1 - R))`` tokens. Text always stays, and a token keeps the position that it has after the first step.

The paper leaves open whether layers count from 0 (here they do) and whether the text of the demonstrations belongs to
their mean (here it does; ``context="images"`` leaves it out). Growth is far smaller than similarity;
``normalize="minmax"`` brings both to [0, 1] before they are added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..core.errors import BadInputError
from .arithmetic import cosines, top_indices, whole_part
from .base import Declaration, Reduction, ReductionContext, check_features, selection
from .inside import DecoderStage, DecoderView

BLOCK = 32
SMALL = 256


def facility_location(
    similarity: torch.Tensor, count: int, bonus: torch.Tensor | None = None, small: int = SMALL
) -> torch.Tensor:
    """Greedy choice of a set that covers everything: ``F(Y) = sum_x max_{y in Y} s(y, x) + sum_{y in Y} bonus(y)``.

    Gains only fall as the set grows, so that an old gain bounds a new one: candidates are looked at again in blocks,
    best first, until none could be better. The result is that of the plain greedy choice; ties go to the lowest index.

    Args:
        similarity: ``[S, S]``, at least 0, row y and column x.
        count: how many to choose, 1 to S.
        bonus: ``[S]``, or None for nothing.
        small: up to so many tokens all gains are computed at every step, which is faster; the result is the same.

    Returns:
        ``[count]`` indices in the order of the picks.

    Raises:
        BadInputError: a count out of range.
    """
    total = len(similarity)
    if not 1 <= count <= total:
        raise BadInputError(f"The number of tokens to choose lies between 1 and {total}; got {count}.")
    extra = torch.zeros(total, dtype=similarity.dtype, device=similarity.device) if bonus is None else bonus
    covered = torch.zeros_like(extra)
    bounds = similarity.clamp(min=0).sum(-1) + extra
    fresh = torch.ones(total, dtype=torch.bool, device=similarity.device)
    picks = torch.empty(count, dtype=torch.long, device=similarity.device)
    for number in range(count):
        if number and total <= small:
            gains = (similarity - covered).clamp_(min=0).sum(-1).add_(extra)
            bounds = gains.masked_fill_(torch.isinf(bounds), -torch.inf)
        best = bounds.argmax()
        while total > small and not fresh[best]:
            stale = bounds.masked_fill(fresh, -torch.inf)
            rows = stale.topk(min(BLOCK, total)).indices
            rows = rows[torch.isfinite(stale[rows])]
            bounds[rows] = (similarity[rows] - covered).clamp(min=0).sum(-1) + extra[rows]
            fresh[rows] = True
            best = bounds.argmax()
        picks[number] = best
        covered = torch.maximum(covered, similarity[best])
        bounds[best] = -torch.inf
        fresh.fill_(False)
        fresh |= torch.isinf(bounds)
    return picks


def _scaled(values: torch.Tensor) -> torch.Tensor:
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else torch.zeros_like(values)


@dataclass
class CATP:
    """Prunes images of few-shot prompts before and inside the decoder.

    Args:
        remove: R, the share of all image tokens to remove.
        layer: K, the decoder layer (from 0) whose attention and output rank the demonstrations; K + 1 ranks the query.
        align_weight: lambda1, of the agreement with the image's text.
        relevance_weight: lambda2, of the similarity with the query.
        normalize: None adds growth and similarity as they are, ``"minmax"`` brings both to [0, 1].
        query_stage: cut the query's image behind layer K + 1; False leaves it as the first step does.
        context: ``"all"`` compares the query's image with all that is left of the demonstrations, ``"images"`` with
            their images only.

    Raises:
        BadInputError: a share outside [0, 1), a layer below 1, a negative weight or an unknown word.
    """

    remove: float = 7 / 9
    layer: int = 6
    align_weight: float = 0.7
    relevance_weight: float = 0.6
    normalize: str | None = None
    query_stage: bool = True
    context: str = "all"
    declares: ClassVar[Declaration] = Declaration(
        where=("model input", "decoder"),
        criterion="coverage and agreement with the text; growth of attention and relevance to the query",
        strategy="select",
        budget="fixed share, one for all demonstrations",
        needs=("text", "segments", "attention"),
    )

    def __post_init__(self) -> None:
        if not 0 <= self.remove < 1:
            raise BadInputError(f"remove is a share from 0 to below 1; got {self.remove}.")
        if self.layer < 1:
            raise BadInputError(f"layer is at least 1, since growth looks at the layer before; got {self.layer}.")
        if self.align_weight < 0 or self.relevance_weight < 0:
            raise BadInputError("align_weight and relevance_weight are not negative.")
        if self.normalize not in (None, "minmax"):
            raise BadInputError(f"normalize is None or 'minmax'; got {self.normalize!r}.")
        if self.context not in ("all", "images"):
            raise BadInputError(f"context is 'all' or 'images'; got {self.context!r}.")

    @classmethod
    def for_depth(cls, depth: int) -> dict[str, int | bool]:
        """Settings for a decoder of so few layers that the usual one is too late; empty where it is not.

        With fewer than four layers there is none behind the second cut.
        """
        if cls.layer + 2 < depth:
            return {}
        return {"layer": 1} if depth > 3 else {"layer": 1, "query_stage": False}

    def reduce(self, features: torch.Tensor, context: ReductionContext) -> Reduction:
        """The first step: ``features [N, d]`` with ``context.text [T, d]`` -> a subset that covers them and agrees with
        the text (which may be missing)."""
        check_features(features)
        total = len(features)
        count = max(1, whole_part(total, 1 - self.remove / 2))
        if count == total:
            return selection(features, torch.arange(total, device=features.device))
        points, agreement = features.detach(), None
        if context.text is not None and self.align_weight:
            text = context.text.detach().to(points.device, torch.promote_types(points.dtype, torch.float32))
            agreement = (1 + cosines(points, text.mean(0, keepdim=True))[:, 0]) / 2
        bonus = None if agreement is None else self.align_weight * agreement
        return selection(features, facility_location((1 + cosines(points, points)) / 2, count, bonus), agreement)

    def stages(self) -> list[DecoderStage]:
        """Behind layer K the demonstrations, behind layer K + 1 the query."""
        first = DecoderStage(self.layer, (self.layer - 1, self.layer), self._demonstrations)
        return [first, DecoderStage(self.layer + 1, (), self._query)] if self.query_stage else [first]

    def _demonstrations(self, view: DecoderView) -> torch.Tensor:
        """Keeps what grows in attention and is relevant to the query, of all demonstrations together."""
        query = view.segments == view.segments.max()
        candidates = ((view.units >= 0) & ~query).nonzero()[:, 0]
        budget = self._left(view, candidates)
        if len(candidates) <= budget:
            return torch.ones_like(query)
        hidden = view.hidden.float()
        growth = (view.attention[self.layer] - view.attention[self.layer - 1]).clamp(min=0)[candidates]
        relevance = cosines(hidden[candidates], hidden[query].mean(0, keepdim=True))[:, 0]
        if self.normalize:
            growth, relevance = _scaled(growth), _scaled(relevance)
        return _keep(view, candidates, growth + self.relevance_weight * relevance, budget)

    def _query(self, view: DecoderView) -> torch.Tensor:
        """Keeps what of the query's image is relevant to what is left of the demonstrations, else to the question."""
        query = view.segments == view.segments.max()
        candidates = ((view.units >= 0) & query).nonzero()[:, 0]
        budget = max(1, self._left(view, candidates))
        if len(candidates) <= budget:
            return torch.ones_like(query)
        others = ~query & (view.segments >= 0)
        if self.context == "images":
            others &= view.units >= 0
        if not bool(others.any()):  # one image and a question: the paper says nothing; the question decides
            others = query & (view.units < 0)
        if not bool(others.any()):
            others = query
        hidden = view.hidden.float()
        return _keep(view, candidates, cosines(hidden[candidates], hidden[others].mean(0, keepdim=True))[:, 0], budget)

    def _left(self, view: DecoderView, candidates: torch.Tensor) -> int:
        """How many of the images' tokens stay; a share of what the images had before the first step."""
        return whole_part(sum(view.totals[unit] for unit in view.units[candidates].unique().tolist()), 1 - self.remove)


def _keep(view: DecoderView, candidates: torch.Tensor, scores: torch.Tensor, budget: int) -> torch.Tensor:
    """``[L]`` bool: all but the candidates that are not among the ``budget`` best."""
    keep = torch.ones(len(view.units), dtype=torch.bool, device=view.units.device)
    keep[candidates] = False
    keep[candidates[top_indices(scores, budget)]] = True
    return keep
