"""D3S: dynamic dual-level down-sampling (arXiv 2509.22115).

Most rollouts and most tokens teach GRPO little. D3S computes advantages with all rollouts and then trains on a part::

    S = argmax over N rollouts of the batch of Var(A)          N and K grow linearly over the training
    T = the K of the tokens in S with the largest |A| x entropy

A subset of the largest variance consists of the smallest and the largest values, so one sort and one scan find it.
Published are the schedule's form and that less than a fifth of the tokens is used, but not the numbers: the defaults
here are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..core.errors import BadInputError, check_choices
from ..core.logprobs import masked_mean
from .base import Recipe, RolloutBatch


@dataclass(frozen=True)
class LinearSchedule:
    """From ``start`` to ``end`` with the progress of training."""

    start: float
    end: float

    def __post_init__(self) -> None:
        if not (0 < self.start <= 1 and 0 < self.end <= 1):
            raise BadInputError(f"Shares lie above 0 and at most at 1; got {self.start} and {self.end}.")

    def __call__(self, progress: float) -> float:
        return (1 - progress) * self.start + progress * self.end


def max_variance_subset(values: torch.Tensor, keep: int) -> torch.Tensor:
    """The ``keep`` of the values with the largest variance, bool ``[n]``; of equal values the first in order."""
    ordered, order = values.double().sort(stable=True)
    sums, squares = (torch.nn.functional.pad(part.cumsum(0), (1, 0)) for part in (ordered, ordered.square()))
    low = torch.arange(keep + 1, device=values.device)  # so many of the smallest, the rest of the largest
    high = len(values) - keep + low
    total = sums[low] + sums[-1] - sums[high]
    square = squares[low] + squares[-1] - squares[high]
    best = (square / keep - (total / keep).square()).argmax()
    place = torch.arange(len(values), device=values.device)
    chosen = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    chosen[order] = (place < best) | (place >= len(values) - keep + best)
    return chosen


def share_of(count: int | torch.Tensor, share: float) -> Any:
    """``ceil(share x count)``, safe from the last bit of a product."""
    if isinstance(count, torch.Tensor):
        return torch.ceil(count * share - 1e-6).long()
    return math.ceil(count * share - 1e-6)


@dataclass
class MaxVarianceRollouts:
    """Keeps the rollouts whose advantages vary most.

    Args:
        share: of the rollouts.
        scope: ``"batch"``, or ``"group"`` for each group by itself.
        drop_zero_advantage: leave out rollouts of advantage 0 beforehand.
        tie_seed: which of equal advantages are kept is drawn anew every step, the same on all processes.
        divisor: of the loss; see ``Piece``.
    """

    kind: ClassVar[str] = "rollouts"
    share: LinearSchedule
    scope: str = "batch"
    drop_zero_advantage: bool = False
    tie_seed: int = 0
    divisor: str = "kept"
    metrics: dict[str, float] = field(default_factory=dict, init=False)

    def __call__(self, batch: RolloutBatch, advantages: torch.Tensor) -> torch.Tensor:
        values = masked_mean(advantages, batch.mask)  # a rollout's own where its tokens share it
        chosen = torch.zeros_like(values, dtype=torch.bool)
        draw = torch.Generator().manual_seed(1_000_003 * self.tie_seed + batch.step)
        for rows in [torch.arange(len(values), device=values.device)] if self.scope == "batch" else batch.group_rows():
            keep = min(len(rows), max(2, round(self.share(batch.progress) * len(rows))))
            rows = rows[torch.randperm(len(rows), generator=draw).to(rows.device)]
            if self.drop_zero_advantage:
                rows = rows[values[rows] != 0]
            if values[rows].any():  # otherwise nothing is to be learnt
                chosen[rows] = max_variance_subset(values[rows], min(keep, len(rows)))
        kept = values[chosen].double()
        self.metrics = {
            "advantage_variance": kept.var(correction=0).item() if len(kept) else 0.0,
            "useful_rollouts": (kept != 0).double().mean().item() if len(kept) else 0.0,
        }
        return chosen


@dataclass
class AdvantageEntropyTokens:
    """Keeps the tokens with the largest ``|advantage| x entropy``.

    Args:
        share: of the tokens of the kept rollouts; rounded up.
        scope: ``"batch"`` ranks all tokens together, which favours long and uncertain responses; ``"response"`` keeps
            the same share of each.
        divisor: of the loss; see ``Piece``.
    """

    kind: ClassVar[str] = "tokens"
    needs: ClassVar[frozenset[str]] = frozenset({"entropies"})
    share: LinearSchedule
    scope: str = "batch"
    divisor: str = "kept"

    def __call__(self, batch: RolloutBatch, advantages: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        assert batch.entropies is not None
        share = self.share(batch.progress)
        keys = advantages.abs() * batch.entropies
        if not keys[kept].any():  # a policy that is sure of everything
            keys = advantages.abs()
        keys = keys.masked_fill(~kept, -1.0)
        if self.scope == "response":
            ranks = keys.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            return kept & (ranks < share_of(kept.sum(1), share)[:, None])
        chosen = torch.zeros_like(kept).flatten()
        chosen[keys.flatten().argsort(dim=0, descending=True, stable=True)[: share_of(int(kept.sum()), share)]] = True
        return chosen.view_as(kept)


@dataclass
class D3S:
    """D3S's settings.

    Args:
        rollouts_start, rollouts_end: share of the rollouts at the start and at the end of training (at least two are
            kept).
        tokens_start, tokens_end: share of their tokens.
        scope: of the choice of rollouts: ``"batch"``, or ``"group"``.
        token_scope: of the choice of tokens: ``"batch"``, or ``"response"``.
        divisor: of the loss: the ``"kept"`` tokens, or ``"all"``.
        drop_zero_advantage: never keep a rollout without advantage.
        tie_seed: draws which of equal advantages are kept.

    Raises:
        BadInputError: a share outside (0, 1], an unknown scope or divisor.
    """

    rollouts_start: float = 0.25
    rollouts_end: float = 0.75
    tokens_start: float = 0.1
    tokens_end: float = 0.5
    scope: str = "batch"
    token_scope: str = "batch"
    divisor: str = "kept"
    drop_zero_advantage: bool = False
    tie_seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self, scope=("batch", "group"), token_scope=("batch", "response"), divisor=("kept", "all"))
        self.recipe()

    def recipe(self) -> Recipe:
        """The two selections."""
        rollouts = LinearSchedule(self.rollouts_start, self.rollouts_end)
        tokens = LinearSchedule(self.tokens_start, self.tokens_end)
        return Recipe(
            MaxVarianceRollouts(rollouts, self.scope, self.drop_zero_advantage, self.tie_seed, self.divisor),
            AdvantageEntropyTokens(tokens, self.token_scope, self.divisor),
        )

    def arguments(self) -> dict[str, Any]:
        """Settings of GRPOConfig: the loss is a mean over tokens."""
        return {"loss_type": "dapo"}
