"""MDPO: masked diffusion policy optimisation (arXiv 2508.13148), as pieces.

Denoising is a decision process: every step s guesses the whole answer, the guess is verified (r_s), and each step gets
an advantage of its own, relative to its group::

    a_s = (r_s - r_{s-1}) + 1 + F_s        F_s = mean(r_{s+1}, ..., r_{S-1}), F_{S-1} = r_{S-1}, r_{-1} = 0
    A_s = (a_s - mean_G a_s) / (std_G a_s + 1e-4)

The loss of a trained step, with n masks M of L tokens and the recorded confidence C of each guess, weighs surer guesses
and emptier canvases more::

    loss = [ sum_i M_i C_i (L / n) (-min(rho_i A, clip(rho_i) A)) + M_i C_i KL_i ] / (n + 1e-4)

``MDPO`` trains it: the K steps of the largest ``sum |A_s|``, as rows of TRL's batch (``StepCredit``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..core.errors import BadInputError, UnknownNameError
from ..decoding.canvas.denoising import RemaskRule
from ..decoding.canvas.schedules import Schedule
from ..decoding.canvas.trajectory import Trajectory
from .base import Recipe
from .canvas_pieces import CanvasMethod, OneStep, StepChoice

MODES = ("difference+future", "final", "step", "future")
"""What a step is judged by: the change of reward and what follows (the paper's), the last guess, its own, what
follows."""
SMALL = 1e-4


def step_values(rewards: torch.Tensor, mode: str = "difference+future") -> torch.Tensor:
    """``a_s [G, S]`` of rewards ``[G, S]`` of every step's guess.

    Raises:
        UnknownNameError: an unknown mode.
        BadInputError: no steps.
    """
    if mode not in MODES:
        raise UnknownNameError("mode of step advantages", mode, MODES)
    if rewards.dim() != 2 or rewards.shape[1] == 0:
        raise BadInputError(f"rewards are [G, S], one a step; got {list(rewards.shape)}.")
    steps = rewards.shape[1]
    if mode == "step":
        return rewards
    if mode == "final":
        return rewards[:, -1:].expand_as(rewards)
    behind = rewards.flip(1).cumsum(1).flip(1) - rewards
    left = torch.arange(steps - 1, -1, -1, device=rewards.device).clamp(min=1)
    future = behind / left
    future[:, -1] = rewards[:, -1]
    if mode == "future":
        return future
    before = torch.cat([torch.zeros_like(rewards[:, :1]), rewards[:, :-1]], 1)
    return rewards - before + 1 + future


def step_advantages(
    rewards: torch.Tensor, mode: str = "difference+future", groups: torch.Tensor | None = None
) -> torch.Tensor:
    """``A_s [G, S]``, each step normalised within its group by the sample deviation.

    Args:
        rewards: ``[B, S]``, of every step's guess.
        groups: ``[B]``, equal for rollouts of one prompt; None is one group.

    Raises:
        UnknownNameError: an unknown mode.
        BadInputError: a group of one, which nothing is compared with, or groups of another length.
    """
    values = step_values(rewards.double(), mode)  # so that equal rewards have no advantage by rounding
    groups = torch.zeros(len(rewards), dtype=torch.long, device=rewards.device) if groups is None else groups
    if len(groups) != len(rewards):
        raise BadInputError(f"groups are one a row, {len(rewards)}; got {len(groups)}.")
    place, count = groups.unique(return_inverse=True, return_counts=True)[1:]
    if bool((count < 2).any()):
        raise BadInputError("A group has one rollout: there is nothing to compare it with.", "Draw two or more.")
    sums = values.new_zeros(len(count), values.shape[1]).index_add(0, place, values)
    means = (sums / count[:, None])[place]
    squares = torch.zeros_like(sums).index_add(0, place, (values - means) ** 2)
    deviation = (squares / (count - 1)[:, None]).sqrt()[place]
    return ((values - means) / (deviation + SMALL)).to(rewards.dtype)


def select_steps(advantages: torch.Tensor, count: int) -> list[int]:
    """The ``count`` steps of the largest ``sum_b |A_s|``, in ascending order; steps without any signal are left out.

    Raises:
        BadInputError: fewer than one.
    """
    if count < 1:
        raise BadInputError(f"At least one step is trained; got {count}.")
    signal = advantages.abs().sum(0)
    best = signal.sort(descending=True, stable=True).indices[:count]
    return sorted(int(step) for step in best if signal[step] > 0)


def step_weights(
    found: Trajectory, step: int, weight: str | None = "confidence", time_weight: bool = True
) -> torch.Tensor:
    """``[B, T]``, what each prediction of a step weighs: ``M C (L / n) / (n + 1e-4)``; its sum over a row is the loss.

    Args:
        found: with ``guesses``; its ``confidence`` is that of every step's guess.
        weight: ``"confidence"``, or None for equal weights.
        time_weight: by ``L / n``.

    Raises:
        BadInputError: a record without guesses, or an unknown weight.
    """
    if found.confidence is None:
        raise BadInputError("The record holds no guesses.", "Sample with record_guesses=True.")
    if weight not in ("confidence", None):
        raise BadInputError(f"weight is confidence or None; got {weight!r}.")
    masked = (found.state(step) == found.mask_id) & found.editable
    count = masked.sum(1, keepdim=True).to(torch.float32)
    weights = found.confidence[:, step] * masked if weight else masked.to(torch.float32)
    if time_weight:
        weights = weights * found.editable.sum(1, keepdim=True) / count.clamp(min=1)
    return weights / (count + SMALL)


def mdpo_step_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    weights: torch.Tensor,
    advantages: torch.Tensor,
    epsilon: float = 0.2,
    ref_logps: torch.Tensor | None = None,
    beta: float = 0.0,
    kl_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of one trained step, ``[B]``.

    Args:
        logps, old_logps: ``[B, T]`` of the step's guess given its canvas.
        weights: ``[B, T]``, see ``step_weights``.
        advantages: ``[B]`` of the step.
        epsilon: the ratio is clipped to ``1 - epsilon`` and ``1 + epsilon``.
        ref_logps, beta: KL term ``beta (ref - logp)^2 / 2``.
        kl_weights: what it weighs; None takes ``weights`` (give those without ``time_weight`` for the paper's).
    """
    ratio = (logps - old_logps).exp()
    gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - epsilon, 1 + epsilon) * advantages[:, None])
    loss = -(weights * gain).sum(1)
    if beta and ref_logps is not None:
        loss = loss + beta * ((weights if kl_weights is None else kl_weights) * (ref_logps - logps) ** 2 / 2).sum(1)
    return loss


@dataclass
class StepCredit:
    """Every step's guess is verified, and the steps that tell rollouts apart are trained.

    Args:
        mode: of ``MODES``, what a step is judged by.
        count: K, steps that are trained.
        weight: ``confidence`` or None, see ``step_weights``.
        time_weight: whether a step weighs by L / n.

    Raises:
        BadInputError, UnknownNameError: a setting out of range.
    """

    kind: ClassVar[str] = "steps"
    asks: ClassVar[Mapping[str, Any]] = {"loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.0}
    mode: str = "difference+future"
    count: int = 8
    weight: str | None = "confidence"
    time_weight: bool = True

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UnknownNameError("mode of step advantages", self.mode, MODES)
        if self.count < 1 or self.weight not in ("confidence", None):
            raise BadInputError("At least one step is trained, and its weight is confidence or None.")

    def __call__(self, rewards: torch.Tensor, groups: torch.Tensor) -> StepChoice:
        """The advantages of rewards ``[B, S]``, and the steps of the largest ones."""
        advantages = step_advantages(rewards, self.mode, groups)
        return StepChoice(advantages, select_steps(advantages, self.count))

    def weights(self, found: Trajectory, step: int) -> torch.Tensor:
        """``[B, T]``, ``C (L / n) n / (n + 1e-4)``: TRL divides a row's sum by its n predictions."""
        count = ((found.state(step) == found.mask_id) & found.editable).sum(1, keepdim=True)
        return step_weights(found, step, self.weight, self.time_weight) * count


@dataclass
class MDPO(CanvasMethod):
    """Rewards for every step of the denoising, and training on the canvases that the sampler met.

    Args:
        advantage: what a step is judged by, of ``MODES``.
        trained_steps: K, how many steps of each rollout are trained.
        confidence_weight: weigh each prediction by its confidence.
        time_weight: weigh a step by L / n, the length over its open positions.
        epsilon: the ratio is clipped to ``1 - epsilon`` and ``1 + epsilon``; it moves with ``num_iterations`` above 1.
        schedule: how many positions each step fixes.
        remask: a rule that takes tokens back while rollouts are written, such as ``RunningConfidence()``.

    The temperature of training also divides the logits of confidences, as in the paper. Its KL is not there: in TRL's
    loss the weights would count for it too.
    """

    advantage: str = "difference+future"
    trained_steps: int = 8
    confidence_weight: bool = True
    time_weight: bool = True
    epsilon: float = 0.2
    schedule: str | Schedule = field(default="even", metadata={"text": (str,)})
    remask: RemaskRule | None = None

    def recipe(self) -> Recipe:
        weight = "confidence" if self.confidence_weight else None
        return Recipe(
            self.rollouts(tempered=True, schedule=self.schedule, remask=self.remask),
            StepCredit(self.advantage, self.trained_steps, weight, self.time_weight),
            OneStep(),
        )

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"epsilon": self.epsilon}
