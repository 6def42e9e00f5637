"""GDPO for diffusion models (arXiv 2510.08554), as a piece: one ratio a text, from bounds that share their masks.

The ratio is that of evidence lower bounds, estimated with the same masks for both policies (``likelihoods.elbo``)::

    rho = exp((ELBO_theta - ELBO_old) / L)        A = r - mean_group(r)
    loss = mean_g [ -min(rho A, clip(rho, 1 - eps, 1 + eps) A) + beta KL ]

``DiffusionGDPO`` trains it by TRL's own loss: with a ratio a sequence, TRL takes the mean of the log-ratios over the
scored tokens, which is the difference of the bounds over L.

TRL, verl and others call another method GDPO, one that normalises several rewards; hence the module's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..core.errors import BadInputError
from .base import Recipe
from .canvas_pieces import Bound, CanvasMethod
from .likelihoods import LikelihoodEstimate


def mean_advantages(rewards: torch.Tensor, groups: torch.Tensor | None = None) -> torch.Tensor:
    """``[B]``, rewards less their group's mean; no deviation divides them.

    Args:
        groups: ``[B]``, equal for rollouts of one prompt; None is one group.
    """
    if groups is None:
        return rewards - rewards.mean()
    place, count = groups.unique(return_inverse=True, return_counts=True)[1:]
    sums = rewards.new_zeros(len(count)).index_add(0, place, rewards)
    return rewards - (sums / count)[place]


def diffusion_gdpo_loss(
    estimate: LikelihoodEstimate,
    old: LikelihoodEstimate,
    advantages: torch.Tensor,
    lengths: torch.Tensor,
    epsilon: float = 0.2,
    ref: LikelihoodEstimate | None = None,
    beta: float = 0.0,
    kl: str = "k3",
) -> torch.Tensor:
    """The loss, a scalar.

    Args:
        estimate, old, ref: of the policy, the one that wrote the texts, and the reference; with the same seeds.
        advantages: ``[B]``.
        lengths: ``[B]``, scored tokens L; the released code takes the canvas's whole length.
        kl: ``k3``, ``e^d - d - 1`` with the difference of bounds d cut to 20, or ``k2``, ``d^2 / 2``.

    Raises:
        BadInputError: shapes that do not fit, an unknown estimate of the KL, or a beta without a reference.
    """
    if estimate.per_position.shape != old.per_position.shape or len(advantages) != len(estimate.per_position):
        raise BadInputError("Estimates and advantages must be of the same texts.")
    if kl not in ("k3", "k2") or (beta and ref is None):
        raise BadInputError("kl is k3 or k2, and a beta needs a reference.")
    ratio = ((estimate.sequence - old.sequence.detach()) / lengths).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
    if beta and ref is not None:
        away = (ref.sequence.detach() - estimate.sequence).clamp(-20, 20)
        loss = loss + beta * (away.exp() - away - 1 if kl == "k3" else away**2 / 2)
    return loss.mean()


@dataclass
class DiffusionGDPO(CanvasMethod):
    """Group diffusion policy optimisation: one ratio a text, from bounds by a quadrature over the mask level.

    Args:
        rule: nodes of the quadrature, ``gauss-1`` to ``gauss-4``, ``simpson``, or ``mc`` for levels that are drawn.
        masks: K, masks at a node.
        mask_count: ``fixed``, a set number of masks at a node, or ``bernoulli``.
        mask_weight: ``L/k``, or ``1/t``, which is biased with a fixed count of few tokens.
        epsilon: the ratio is clipped to ``1 - epsilon`` and ``1 + epsilon``.

    L counts the tokens that are scored. The paper's KL of bounds is not there: TRL's is one of single tokens.
    """

    rule: str = "gauss-2"
    masks: int = 1
    mask_count: str = "fixed"
    mask_weight: str = "L/k"
    epsilon: float = 0.2

    def recipe(self) -> Recipe:
        return Recipe(self.rollouts(), Bound(self.rule, self.masks, self.mask_count, self.mask_weight))

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"importance_sampling_level": "sequence", "epsilon": self.epsilon}
