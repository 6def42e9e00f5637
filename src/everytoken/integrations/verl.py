"""Recipes of the reinforcement station as advantage estimators and policy losses of verl.

Put this into a module of yours and name it as verl's ``actor_rollout_ref.model.external_lib``, which every process
imports; then ``algorithm.adv_estimator=hapo_tokens`` uses it::

    from everytoken import HAPO, Recipe
    from everytoken.integrations.verl import register

    register("hapo_tokens", HAPO(temperature_tau=0, adv_beta=0, clip_alpha=0).recipe())

verl 0.9.1 passes an estimator rewards, mask and groups, so that pieces can be used that need no more: group and token
advantages, token weights, and selections with ``divisor="all"`` (verl divides by all tokens of a response). It passes
no response ids, which TEMPO needs, unless the estimator is called with ``batch`` too (a pull request of verl's, or a
wrapper of its ``compute_advantage`` of your own, does that). Entropies and distributions, sampling temperature,
rollouts, prompts and rewards of a recipe are not its business; recipes with such pieces are refused by name.

Clip bounds and ratio weights are pieces of a policy loss (``register_loss``, then
``actor_rollout_ref.actor.policy_loss.loss_mode=NAME``). It is verl's own clipped loss with the recipe's bounds and
weights. verl passes no entropies to a policy loss either, so pieces that read them, as HAPO's do, are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..core.errors import BadInputError, require
from ..reinforcement.base import Recipe, RolloutBatch, UpdateBatch
from ..reinforcement.recipe_checks import BATCH_KINDS
from ..reinforcement.stages import decide

Estimator = Callable[..., tuple[torch.Tensor, torch.Tensor]]
PolicyLoss = Callable[..., tuple[torch.Tensor, dict[str, Any]]]


LOSS_KINDS = ("clip", "ratio_weight")
"""What a policy loss decides."""


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


class _Update(UpdateBatch):
    """An update of which verl passes no entropies."""

    def __init__(self, ratio: torch.Tensor, logps: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor):
        self.ratio, self.logps, self.mask, self.advantages = ratio, logps, mask, advantages

    @property
    def entropies(self) -> torch.Tensor:  # type: ignore[override]
        raise BadInputError(
            "A piece of this recipe needs entropies, which verl does not pass to its policy losses.",
            "Leave the piece out, or train with RecipeTrainer.",
        )


class _WithBounds:
    """A configuration of verl's with clip bounds of every token; all else is the configuration's."""

    def __init__(self, config: Any, low: torch.Tensor, high: torch.Tensor):
        self._config, self.clip_ratio_low, self.clip_ratio_high = config, low, high

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def policy_loss(recipe: Recipe) -> PolicyLoss:
    """A function of the form that ``register_policy_loss`` takes::

        (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights) -> loss, metrics

    with tensors ``[B, T]``: verl's ``compute_policy_loss_vanilla`` with the recipe's clip bounds and ratio weights.

    Args:
        recipe: pieces of the kinds ``clip`` and ``ratio_weight``.

    Raises:
        BadInputError: a piece of another kind; in a call, a piece that reads entropies.
    """
    for piece in recipe.pieces:
        if piece.kind not in LOSS_KINDS:
            raise BadInputError(
                f"{type(piece).__name__} sets the {piece.kind.replace('_', ' ')}, which is no part of a policy loss.",
                f"Give a recipe of these kinds: {', '.join(LOSS_KINDS)}.",
            )

    def loss(
        old_log_prob: torch.Tensor,
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla

        now = log_prob.detach()
        update = _Update((now - old_log_prob).clamp(-20, 20).exp(), now, response_mask.bool(), advantages)
        given = (config.clip_ratio_low, config.clip_ratio_high)
        bounds = [config.clip_ratio if bound is None else bound for bound in given]
        low, high = (torch.full_like(now, bound) for bound in bounds)
        with torch.no_grad():
            if (clip := recipe.one("clip")) is not None:
                low, high = clip(update, low, high)
            for piece in recipe.of("ratio_weight"):
                advantages = advantages * piece(update, low, high)
        found: tuple[torch.Tensor, dict[str, Any]] = compute_policy_loss_vanilla(
            old_log_prob,
            log_prob,
            advantages,
            response_mask,
            loss_agg_mode,
            _WithBounds(config, low, high),
            rollout_is_weights,
        )
        return found

    return loss


def register_loss(name: str, recipe: Recipe) -> PolicyLoss:
    """Registers ``policy_loss`` under a name.

    Raises:
        MissingExtraError: verl is not installed.
        BadInputError: as ``policy_loss``.
    """
    made = policy_loss(recipe)
    require("verl", None, "Registering a policy loss")
    from verl.trainer.ppo.core_algos import register_policy_loss

    register_policy_loss(name)(made)
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
