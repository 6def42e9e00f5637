"""Pieces of recipes for text that is written in any order: who writes the rollouts, and what their likelihood is.

A recipe for a masked diffusion model has one piece of each of two kinds, and perhaps one of a third::

    canvas       CanvasRollouts: a canvas sampler writes the rollouts, and leaves a record of every step
    likelihood   OneStep (diffu-GRPO), Bound (an evidence lower bound), Transitions (the steps that were taken)
    steps        credit of single steps: each trained step of a rollout becomes a row of its own

``DiffusionGRPOTrainer`` trains them; TRL's loss stays as it is. Other pieces of the station compose with these where
they read no text from left to right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

import torch

from ..core.errors import BadInputError
from ..decoding.canvas.denoising import DenoisingSampler, RemaskRule, Transform
from ..decoding.canvas.schedules import Schedule
from ..decoding.canvas.trajectory import Trajectory
from .base import Recipe, RolloutBatch
from .likelihoods import LikelihoodEstimate, elbo, one_step, quadrature, trajectory_logps


@dataclass
class CanvasRows:
    """Rows of canvases whose likelihood is asked; ``C`` positions, prompt included.

    Attributes:
        ids: ``[b, C]``, the texts as they were written.
        attention, editable: ``[b, C]`` bool, where a row has tokens, and which of them the sampler wrote.
        scored: ``[b, C]`` bool, the written positions that count.
        fix_step: ``[b, C]``, the step that wrote each; -1 outside of ``editable``.
        seeds: ``[b]``, one a row, of what an estimator draws.
        steps: S, how many steps the rollouts took.
        mask_id: the token of an open position.
    """

    ids: torch.Tensor
    attention: torch.Tensor
    editable: torch.Tensor
    scored: torch.Tensor
    fix_step: torch.Tensor
    seeds: torch.Tensor
    steps: int
    mask_id: int

    def __post_init__(self) -> None:
        shape = list(self.ids.shape)
        for name in ("attention", "editable", "scored", "fix_step"):
            if (found := list(getattr(self, name).shape)) != shape:
                raise BadInputError(
                    f"{name} has the shape {found}, and the texts {shape}.", "A record of other texts does not fit."
                )
        if len(self.seeds) != len(self.ids):
            raise BadInputError(f"seeds are one a row, {len(self.ids)}; got {len(self.seeds)}.")

    def rows(self, chosen: slice | torch.Tensor) -> CanvasRows:
        """Some of the rows."""
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        return CanvasRows(**values | {k: v[chosen] for k, v in values.items() if isinstance(v, torch.Tensor)})

    def trajectory(self) -> Trajectory:
        """The record of the steps."""
        counts = self.fix_step.new_zeros(len(self.ids), self.steps)
        nothing = torch.zeros_like(self.fix_step, dtype=torch.float32)
        return Trajectory(self.ids, self.editable, self.attention, self.fix_step, nothing, counts, self.mask_id)


# -- who writes --------------------------------------------------------------------------------------------------------
@dataclass
class CanvasRollouts:
    """Rollouts by a ``DenoisingSampler``, drawn at the training temperature.

    A prompt with open positions (mask tokens) is filled in; behind one without, ``max_completion_length`` positions are
    written.

    Args:
        steps, block_length, remasking, schedule, remask: see ``DenoisingSampler``.
        transform: end tokens -> a transform of confidences, or None.
        tempered: rank and record probabilities at the temperature of sampling; else at 1.
        score_after_end: also train on what stands behind the first end token. Rewards see the text up to it.
    """

    kind: ClassVar[str] = "canvas"
    steps: int | None = None
    block_length: int | None = None
    remasking: str = "low_confidence"
    schedule: str | Schedule = field(default="even", metadata={"text": (str,)})
    remask: RemaskRule | None = None
    transform: Callable[[tuple[int, ...]], Transform] | None = None
    tempered: bool = False
    score_after_end: bool = True

    def __post_init__(self) -> None:
        self.sampler(1.0, (0,), None, None, False)  # its own checks, before anything is loaded

    def sampler(
        self,
        temperature: float,
        ends: tuple[int, ...],
        mask_id: int | None,
        length: int | None,
        record_guesses: bool,
    ) -> DenoisingSampler:
        """The sampler of one batch of rollouts.

        Args:
            ends: the tokenizer's end tokens.
            length: positions behind the prompt; None where prompts have open positions.

        Raises:
            BadInputError: a transform of end tokens where there are none.
        """
        transform = None
        if self.transform is not None:
            if not ends:
                raise BadInputError("This tokenizer has no end token to hold back.", "Leave the rejection of ends out.")
            transform = self.transform(ends)
        return DenoisingSampler(
            steps=self.steps,
            block_length=self.block_length,
            temperature=temperature,
            remasking=self.remasking,
            schedule=self.schedule,
            rank_temperature=temperature if self.tempered else 1.0,
            transform=transform,
            remask=self.remask,
            gen_length=length,
            mask_id=mask_id,
            record_guesses=record_guesses,
        )


# -- likelihoods -------------------------------------------------------------------------------------------------------
@dataclass
class OneStep:
    """All scored positions masked at once (diffu-GRPO): one forward, and no token sees another.

    Args:
        prompt_mask_prob: each prompt token is masked with this probability, anew in every inner iteration.
    """

    kind: ClassVar[str] = "likelihood"
    asks: ClassVar[Mapping[str, Any]] = {}
    of_states: ClassVar[bool] = True
    prompt_mask_prob: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.prompt_mask_prob < 1:
            raise BadInputError(f"prompt_mask_prob lies from 0 to below 1; got {self.prompt_mask_prob}.")

    @property
    def draws(self) -> bool:
        """Whether its value depends on the seeds."""
        return self.prompt_mask_prob > 0

    def __call__(self, model: Any, rows: CanvasRows, temperature: float) -> LikelihoodEstimate:
        return one_step(
            model,
            rows.ids,
            rows.scored,
            rows.attention,
            seeds=rows.seeds,
            prompt_mask_prob=self.prompt_mask_prob,
            mask_id=rows.mask_id,
            temperature=temperature,
        )


@dataclass
class Bound:
    """An evidence lower bound, with one ratio a text; see ``likelihoods.elbo`` for the settings."""

    kind: ClassVar[str] = "likelihood"
    asks: ClassVar[Mapping[str, Any]] = {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.0}
    of_states: ClassVar[bool] = False
    draws: ClassVar[bool] = True
    rule: str = "gauss-2"
    masks: int = 1
    count: str = "fixed"
    weight: str = "L/k"

    def __post_init__(self) -> None:
        if self.rule != "mc":
            quadrature(self.rule)
        if self.masks < 1 or self.count not in ("fixed", "bernoulli") or self.weight not in ("L/k", "1/t"):
            raise BadInputError("masks is 1 or more, count is fixed or bernoulli, and weight is L/k or 1/t.")
        if self.count == "bernoulli" and self.weight == "L/k":
            raise BadInputError("Bernoulli masks weigh 1/t.", "Use weight=1/t.")

    def __call__(self, model: Any, rows: CanvasRows, temperature: float) -> LikelihoodEstimate:
        return elbo(
            model,
            rows.ids,
            rows.scored,
            rows.attention,
            seeds=rows.seeds,
            rule=self.rule,
            masks=self.masks,
            count=self.count,
            weight=self.weight,
            mask_id=rows.mask_id,
            temperature=temperature,
        )


@dataclass
class Transitions:
    """Exactly the steps that the sampler took: each token given the canvas on which it was chosen."""

    kind: ClassVar[str] = "likelihood"
    asks: ClassVar[Mapping[str, Any]] = {"importance_sampling_level": "token"}
    of_states: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    needs_record: ClassVar[bool] = True

    def __call__(self, model: Any, rows: CanvasRows, temperature: float) -> LikelihoodEstimate:
        found = trajectory_logps(model, rows.trajectory(), temperature=temperature)
        return LikelihoodEstimate(found.per_position * rows.scored, found.forwards)


# -- weights and steps -------------------------------------------------------------------------------------------------
@dataclass
class StepMean:
    """Every step weighs alike: ``1 / (S sum_b |U_s|)`` a token of step s, as a weight beside TRL's mean of a row."""

    kind: ClassVar[str] = "token_weight"
    asks: ClassVar[Mapping[str, Any]] = {"loss_type": "grpo", "beta": 0.0}
    needs_record: ClassVar[bool] = True
    weighs_kl: ClassVar[bool] = True

    def __call__(self, batch: RolloutBatch, advantages: torch.Tensor) -> torch.Tensor:
        if batch.canvas is None:
            raise BadInputError("This weight reads the steps of a canvas.", "Train with DiffusionGRPOTrainer.")
        steps = batch.canvas.fix_step[:, -batch.mask.shape[1] :]
        sizes = torch.bincount(steps[batch.mask], minlength=batch.canvas.steps)
        own = batch.mask.sum(1, keepdim=True)  # TRL divides by it, and by the rows
        weight = len(own) * own / ((sizes > 0).sum() * sizes[steps.clamp(min=0)].clamp(min=1))
        return torch.where(batch.mask, weight, 0.0)


class StepChoice(NamedTuple):
    """What a piece of the kind ``steps`` decides.

    Attributes:
        advantages: ``[B, S]``.
        steps: which steps are trained, in ascending order; none where no step has a signal.
    """

    advantages: torch.Tensor
    steps: list[int]


# -- methods -----------------------------------------------------------------------------------------------------------
@dataclass
class CanvasMethod:
    """What methods for masked diffusion models are told about their rollouts.

    Args:
        denoising_steps: forward passes of a rollout; None fixes one position a step.
        block_length: the text is written in blocks of so many positions; None is one block.
        remasking: what positions are ranked by; see ``DenoisingSampler``.
    """

    any_order: ClassVar[bool] = True
    denoising_steps: int | None = None
    block_length: int | None = None
    remasking: str = "low_confidence"

    def __post_init__(self) -> None:
        self.recipe()  # every setting is checked by the piece that it is for

    def rollouts(self, **settings: Any) -> CanvasRollouts:
        """The piece that writes."""
        return CanvasRollouts(self.denoising_steps, self.block_length, self.remasking, **settings)

    def recipe(self) -> Recipe:
        """The pieces of the method."""
        raise NotImplementedError(f"{type(self).__name__} names no pieces.")

    def arguments(self) -> dict[str, Any]:
        """Settings of GRPOConfig that it differs in."""
        return {"loss_type": "grpo", "scale_rewards": "none", "beta": 0.0}


@dataclass
class DiffuGRPO(CanvasMethod):
    """diffu-GRPO (d1, arXiv 2504.12216), the baseline: one step's likelihood of the whole text, reward less its group's
    mean.

    Args:
        prompt_mask_prob: share of prompt tokens that are masked, anew in every inner iteration.
    """

    prompt_mask_prob: float = 0.15

    def recipe(self) -> Recipe:
        return Recipe(self.rollouts(), OneStep(self.prompt_mask_prob))
