"""TGDPO: Token-level reward Guidance for DPO (arXiv 2506.14574).

PPO can use a reward for every token, DPO cannot. TGDPO gives each token of DPO a KL strength that depends on a given
token reward, and finds a loss in which the log-ratios of the tokens are scaled. The reward is the implicit one of a
guide pi_r that was trained on preferences before (with DPO, SimPO, ...)::

    r_t(y) = beta [log pi_r(y_t|x,y_<t) - log ref(y_t|x,y_<t)]
    u_t(y) = log pi(y_t|x,y_<t) - log ref(y_t|x,y_<t)

    z = sum_t beta f_w(r_t(y_w)) u_t(y_w) - sum_t beta f_l(r_t(y_l)) u_t(y_l)
    f_w(r) = 1 + alpha r        f_l(r) = 1 - alpha r        (constants: no gradient flows through them)
    loss = -log sigmoid(z)

A token that the guide likes is pushed harder where it was chosen, and pushed down less where it was rejected. Weights
can be negative where ``|alpha r| > 1``, as in the authors' code; their share is logged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from ..core.errors import BadInputError
from ..training.column_makers import ColumnMaker, ColumnSources, TokenAnnotator
from .base import PairScores, PreferenceOutput, log_ratios, weighted_log_ratios


@dataclass
class GuideLogps:
    """Makes the column ``guide_logps``: finds a guide, or trains one on the same pairs.

    Args:
        guide: hub id or folder of a DPO- or SimPO-trained copy; None trains one with DPO first.
        guide_steps, guide_lr: optimiser steps and learning rate of that training.

    Raises:
        BadInputError: a value out of range.
    """

    guide: str | None = None
    guide_steps: int = 50
    guide_lr: float = 5e-6

    def __post_init__(self) -> None:
        if self.guide_steps < 1 or self.guide_lr <= 0:
            raise BadInputError(
                f"guide_steps and guide_lr must be positive; got {self.guide_steps} and {self.guide_lr}."
            )

    def __call__(self, sources: ColumnSources) -> TokenAnnotator:
        from ..training.distributed import frozen, load_unplaced
        from .columns import ModelLogps
        from .short_training import train_guide

        if self.guide is not None:
            return ModelLogps(frozen(load_unplaced(self.guide)))
        return ModelLogps(train_guide(sources, self.guide_steps, self.guide_lr))


@dataclass
class TGDPOLoss:
    """DPO with token weights from a guide.

    Args:
        beta: strength of the pull towards the reference (paper's example: 0.1).
        alpha: how much the guide's reward changes a token's weight (0.5).
        clamp: keeps every weight in ``[1 - clamp, 1 + clamp]``; None, as in the authors' code, lets them be anything.
        shape: replaces ``alpha * r``: ``rewards [B, T] -> [B, T]``; weights are ``1 + shape(r)`` chosen,
            ``1 - shape(r)`` rejected.

    Raises:
        BadInputError: a strength out of range.
    """

    beta: float = 0.1
    alpha: float = 0.5
    clamp: float | None = None
    shape: Callable[[torch.Tensor], torch.Tensor] | None = None
    data_columns: ClassVar[Mapping[str, type[ColumnMaker]]] = {"guide_logps": GuideLogps}

    def __post_init__(self) -> None:
        if self.beta <= 0 or self.alpha < 0:
            raise BadInputError(f"TGDPO needs beta > 0 and alpha >= 0; got {self.beta} and {self.alpha}.")
        if self.clamp is not None and self.clamp < 0:
            raise BadInputError(f"clamp must not be negative; got {self.clamp}.")

    def guide_rewards(self, policy: PairScores, reference: PairScores) -> tuple[torch.Tensor, torch.Tensor]:
        """``r_t`` of chosen and rejected, two ``[B, T]`` constants; 0 outside the responses."""
        sides = (
            (policy.chosen["guide_logps"], reference.chosen_logps, policy.chosen_mask),
            (policy.rejected["guide_logps"], reference.rejected_logps, policy.rejected_mask),
        )
        chosen, rejected = (self.beta * torch.where(mask, (guide - ref).detach(), 0.0) for guide, ref, mask in sides)
        return chosen, rejected

    def weights(self, policy: PairScores, reference: PairScores) -> tuple[torch.Tensor, torch.Tensor]:
        """``f_w`` and ``f_l`` per token, two ``[B, T]`` constants; 1 outside the responses."""
        rewards, masks = self.guide_rewards(policy, reference), (policy.chosen_mask, policy.rejected_mask)
        pairs = []
        for reward, mask, sign in zip(rewards, masks, (1, -1), strict=True):
            change = sign * (self.alpha * reward if self.shape is None else self.shape(reward))
            if self.clamp is not None:
                change = change.clamp(-self.clamp, self.clamp)
            pairs.append(1 + torch.where(mask, change, 0.0))
        return pairs[0], pairs[1]

    def trace_columns(self, policy: PairScores, reference: PairScores) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The guide's reward and the weight of every token."""
        return {"guide_reward": self.guide_rewards(policy, reference), "weight": self.weights(policy, reference)}

    def __call__(self, policy: PairScores, reference: PairScores) -> PreferenceOutput:
        """See the module's docstring; ``policy.chosen["guide_logps"]`` and ``policy.rejected["guide_logps"]`` are
        ``[B, T]``.
        """
        chosen_weight, rejected_weight = self.weights(policy, reference)
        chosen, rejected = weighted_log_ratios(policy, reference, chosen_weight, rejected_weight)
        plain_chosen, plain_rejected = log_ratios(policy, reference)
        inside = torch.cat([chosen_weight[policy.chosen_mask], rejected_weight[policy.rejected_mask]])
        return PreferenceOutput(
            losses=-F.logsigmoid(self.beta * (chosen - rejected)),
            chosen_rewards=self.beta * plain_chosen.detach(),
            rejected_rewards=self.beta * plain_rejected.detach(),
            metrics={
                "weights/negative": (inside < 0).float().mean() if len(inside) else inside.new_zeros(()),
                "weights/spread": inside.std(correction=0) if len(inside) else inside.new_zeros(()),
            },
        )
