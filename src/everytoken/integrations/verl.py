"""Recipes of the reinforcement station as advantage estimators of verl.

Put this into a module of yours and name it as verl's ``actor_rollout_ref.model.external_lib``, which every process
imports; then ``algorithm.adv_estimator=hapo_tokens`` uses it::

    from everytoken import HAPO, Recipe
    from everytoken.integrations.verl import register

    register("hapo_tokens", HAPO(temperature_tau=0, adv_beta=0, clip_alpha=0).recipe())

verl 0.9.1 passes an estimator rewards, mask and groups, so that pieces can be used that need no more: group and token
advantages, token weights, and selections with ``divisor="all"`` (verl divides by all tokens of a response). It passes
no response ids, which TEMPO needs, unless the estimator is called with ``batch`` too (a pull request of verl's, or a
wrapper of its ``compute_advantage`` of your own, does that). Entropies and distributions, sampling temperature, clip
bounds, rollouts, prompts and rewards of a recipe are not its business; recipes with such pieces are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..core.errors import BadInputError, require
from ..reinforcement.base import Recipe, RolloutBatch
from ..reinforcement.recipe_checks import BATCH_KINDS
from ..reinforcement.stages import decide

Estimator = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass
class _Batch(RolloutBatch):
    """A batch that knows its place in training only where it was told."""

    known: bool = False

    @property
    def progress(self) -> float:
        if not self.known:
            raise BadInputError(
                "This recipe changes with the progress of training, which verl does not pass.",
                "Say how many steps there are: advantage_estimator(recipe, steps=...).",
            )
        return min(1.0, self.step / max(1, self.steps))


def advantage_estimator(recipe: Recipe, steps: int | None = None, first_step: int = 0) -> Estimator:
    """A function of the form that ``register_adv_est`` takes::

        (token_level_rewards [B, T], response_mask [B, T], index [B], config, ...) -> advantages, returns, both [B, T]

    A response's reward is the sum of its tokens'. Without a group advantage of the recipe it is GRPO's, divided by the
    sample standard deviation. Both results are the same tensor: there is no critic.

    Args:
        recipe: pieces of ``recipe_checks.BATCH_KINDS``.
        steps: of the training, for recipes that change with it: the function counts its calls.
        first_step: from where it counts, in a training that goes on from a checkpoint.

    Raises:
        BadInputError: pieces that verl cannot serve; in a call, what a piece needs and verl did not pass.
    """
    _check(recipe)
    calls = [first_step]

    def estimator(
        token_level_rewards: torch.Tensor,
        response_mask: torch.Tensor,
        index: Any,
        config: Any = None,
        batch: Mapping[str, torch.Tensor] | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            mask = response_mask.bool()
            found = _Batch(
                _ids(recipe, mask, batch),
                mask,
                _groups(index).to(mask.device),
                (token_level_rewards * mask).sum(1),
                calls[0],
                steps or 1,
                known=steps is not None,
            )
            calls[0] += 1
            group = recipe.one("group_advantage") or _grpo
            decided = decide(recipe, found, group(found))
            advantages = decided.advantages * decided.kept
        return advantages, advantages

    return estimator


def register(name: str, recipe: Recipe, steps: int | None = None, first_step: int = 0) -> Estimator:
    """Registers ``advantage_estimator`` under a name.

    Raises:
        MissingExtraError: verl is not installed.
        BadInputError: as ``advantage_estimator``.
    """
    made = advantage_estimator(recipe, steps, first_step)
    require("verl", None, "Registering an advantage estimator")
    from verl.trainer.ppo.core_algos import register_adv_est

    register_adv_est(name)(made)
    return made


def _check(recipe: Recipe) -> None:
    for piece in recipe.pieces:
        name = type(piece).__name__
        if piece.kind not in BATCH_KINDS:
            raise BadInputError(
                f"{name} sets the {piece.kind.replace('_', ' ')}, and verl's estimators set advantages only.",
                f"Give a recipe of these kinds: {', '.join(BATCH_KINDS)}.",
            )
        if missing := set(getattr(piece, "needs", ())) - {"ids"}:
            raise BadInputError(
                f"{name} needs {' and '.join(sorted(missing))}, which verl does not pass to its estimators.",
                "Leave it out, or train with RecipeTrainer.",
            )
    if recipe.of("rollouts", "tokens") and recipe.divisor != "all":
        raise BadInputError(
            "verl divides the loss by all tokens of a response, and this recipe by those that it keeps.",
            "Give its selections divisor='all'.",
        )


def _ids(recipe: Recipe, mask: torch.Tensor, batch: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    if batch is not None and "responses" in batch:
        return batch["responses"]
    if "ids" in recipe.needs:
        name = next(type(piece).__name__ for piece in recipe.pieces if "ids" in getattr(piece, "needs", ()))
        raise BadInputError(
            f"{name} needs the responses' ids, which verl did not pass.",
            "Wrap verl's compute_advantage so that it passes batch=data.batch to the estimator.",
        )
    return torch.zeros_like(mask, dtype=torch.long)


def _groups(index: Any) -> torch.Tensor:
    """Numbers of groups from whatever names prompts."""
    numbers: dict[Any, int] = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in list(index)])


def _grpo(batch: RolloutBatch) -> torch.Tensor:
    found = torch.zeros_like(batch.rewards)
    for rows in batch.group_rows():
        rewards = batch.rewards[rows]
        if len(rows) > 1:
            found[rows] = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    return found
