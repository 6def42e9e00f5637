"""EOSER, ASS and CJ-GRPO (arXiv 2509.23924), as pieces.

- EOSER: early in a full diffusion run the end token is what the model is surest of, which cuts the answer. Its
  confidence is multiplied by ``f_s = g_min + (g_max - g_min) u_s``, which grows with the steps; only the rank changes.
- ASS: confidence is low early and high late, so step s fixes 2^s tokens: about log2 L steps for L tokens.
- CJ-GRPO: the loss scores exactly the transitions that the sampler made, each step alike::

    loss = 1/S sum_s [ sum_{b, i in U_s} -min(rho_i A, clip(rho_i) A) / sum_b |U_s| ]

with U_s the positions that step s fixed (``likelihoods.trajectory_logps``), and A a group's rewards less their mean.
``CJGRPO`` trains it by TRL's own loss with weights of tokens (``StepMean``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..core.errors import BadInputError
from ..decoding.canvas.denoising import StepInfo
from ..decoding.canvas.schedules import Plan
from ..decoding.canvas.trajectory import Trajectory
from .base import Recipe
from .canvas_pieces import CanvasMethod, OneStep, StepMean, Transitions


def ascending_counts(length: int, mode: str = "official") -> list[int]:
    """How many tokens each step of ASS fixes.

    Args:
        mode: ``official``: floor(log2 L) steps of 2^s, the last fixes all the rest; ``tight``: ceil(log2(L + 1)) steps,
            so that the last one is no larger than twice the one before.

    Raises:
        BadInputError: no token, or an unknown mode.
    """
    if length < 1 or mode not in ("official", "tight"):
        raise BadInputError(f"ASS fixes 1 token or more, in the mode official or tight; got {length} and {mode!r}.")
    steps = max(1, length.bit_length() - 1) if mode == "official" else length.bit_length()
    first = [2**step for step in range(steps - 1)]
    return [*first, length - sum(first)]


@dataclass
class AscendingSteps:
    """ASS as the schedule of a ``DenoisingSampler``; it chooses the number of steps itself.

    With blocks the last one holds what the last step fixes, the one before what the step before fixes, and so on; the
    first block takes the steps that are left.
    """

    mode: str = "official"

    def plan(self, length: int, steps: int | None, blocks: int) -> Plan:
        """Raises ``BadInputError`` for another number of steps than ASS takes, or more blocks than steps."""
        counts = ascending_counts(length, self.mode)
        if steps is not None and steps != len(counts):
            raise BadInputError(
                f"ASS takes {len(counts)} steps for {length} tokens; got steps={steps}.", "Leave it out."
            )
        if blocks > len(counts):
            raise BadInputError(
                f"{blocks} blocks are more than the {len(counts)} steps of ASS.", "Lengthen the blocks."
            )
        first = len(counts) - blocks + 1
        return [counts[:first], *([count] for count in counts[first:])]


@dataclass
class EosEarlyRejection:
    """EOSER as the ``transform`` of a ``DenoisingSampler``.

    Args:
        eos_token_id: the end token, or several.
        g_min, g_max: what confidences of end tokens are multiplied by at the first step, and at the last.
        ascending: for ASS: ``u_s = (2^(s+1) - 1) / 2^S``; else ``u_s = s / (S - 1)`` with the block's own steps.

    Raises:
        BadInputError: factors out of order.
    """

    eos_token_id: int | tuple[int, ...]
    g_min: float = 0.4
    g_max: float = 1.0
    ascending: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.g_min <= self.g_max <= 1:
            raise BadInputError(f"0 <= g_min <= g_max <= 1; got {self.g_min} and {self.g_max}.")

    def factor(self, at: StepInfo) -> torch.Tensor:
        """``[N]``."""
        if self.ascending:
            share = (2.0 ** (at.step + 1) - 1) / 2.0**at.steps
            alone = at.steps == 1
        else:
            share = at.block_step / (at.block_steps - 1).clamp(min=1)
            alone = at.block_steps == 1
        return torch.where(alone, self.g_max, self.g_min + (self.g_max - self.g_min) * share)

    def __call__(self, confidence: torch.Tensor, tokens: torch.Tensor, at: StepInfo) -> torch.Tensor:
        ends = (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id
        ended = torch.isin(tokens, torch.tensor(ends, device=tokens.device))
        factor = self.factor(at)
        # confidences by entropy are below 0, where a share of them would be more
        lower = torch.where(confidence < 0, confidence / factor.clamp(min=1e-9), confidence * factor)
        return torch.where(ended, lower, confidence)


def step_mean_weights(found: Trajectory) -> torch.Tensor:
    """``[B, T]``, ``1 / (S sum_b |U_s|)`` at the positions of step s: a sum with them is the mean over steps of the
    mean over a step's tokens. Steps that fixed nothing are left out.
    """
    fixed = found.fix_step.clamp(min=0)
    sizes = torch.bincount(found.fix_step[found.editable], minlength=found.steps)
    steps = (sizes > 0).sum()
    return found.editable / (steps * sizes[fixed].clamp(min=1))


def cj_grpo_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    epsilon: float = 0.2,
    ref_logps: torch.Tensor | None = None,
    beta: float = 0.0,
) -> torch.Tensor:
    """The loss, a scalar.

    Args:
        logps, old_logps, ref_logps: ``[B, T]``, see ``likelihoods.trajectory_logps``.
        advantages: ``[B]``.
        weights: ``[B, T]``, see ``step_mean_weights``.
        beta: of the k3 estimate of the KL.
    """
    ratio = (logps - old_logps).exp()
    loss = -torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - epsilon, 1 + epsilon) * advantages[:, None])
    if beta and ref_logps is not None:
        away = ref_logps - logps
        loss = loss + beta * (away.exp() - away - 1)
    return (loss * weights).sum()


@dataclass
class CJGRPO(CanvasMethod):
    """Consistent trajectories: rollouts in few, growing steps, and a loss of exactly those steps.

    Args:
        ascending: ASS: step s fixes 2^s tokens, about log2 L steps in all; else ``denoising_steps`` of equal size.
        eoser: hold back end tokens early in a rollout (EOSER).
        g_min, g_max: what EOSER multiplies the confidence of end tokens by, first and last.
        consistent: score the steps that were taken. False scores one step for the whole text, as diffu-GRPO does, with
            the same rollouts and weights: the comparison of the paper.
        score_after_end: also train on what stands behind the first end token, as the released code does.
        epsilon: the ratio is clipped to ``1 - epsilon`` and ``1 + epsilon``.

    Raises:
        BadInputError: a number of steps beside ``ascending``, which chooses it.

    Likelihoods are at the temperature of sampling; the released code leaves it out. Its KL is not there: in TRL's loss
    the weights of steps would count for it too.
    """

    ascending: bool = True
    eoser: bool = False
    g_min: float = 0.01
    g_max: float = 1.0
    consistent: bool = True
    score_after_end: bool = True
    epsilon: float = 0.2

    def recipe(self) -> Recipe:
        if self.ascending and self.denoising_steps is not None:
            raise BadInputError("ascending chooses the steps itself.", "Leave denoising_steps out, or ascending.")
        rejection = partial(EosEarlyRejection, g_min=self.g_min, g_max=self.g_max, ascending=self.ascending)
        return Recipe(
            self.rollouts(
                schedule=AscendingSteps() if self.ascending else "even",
                transform=rejection if self.eoser else None,
                score_after_end=self.score_after_end,
            ),
            Transitions() if self.consistent else OneStep(),
            StepMean(),
        )

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"epsilon": self.epsilon}
