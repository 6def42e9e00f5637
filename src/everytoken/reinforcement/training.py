"""``everytoken train`` for every recipe of the station: one way to train, with settings derived from the method.

A method needs nothing but its card for this (``training_for``): its implementation is a dataclass of settings with
``recipe()`` and ``arguments()``, the settings of GRPOConfig that it differs in. One for models that write in any order
says so by ``any_order = True``.
"""

from __future__ import annotations

from typing import Any

from ..core.quiet import quiet_training
from ..training.base import Training, TrainingContext, TrainingResult
from ..training.config import derive_config
from .rollout_training import RolloutTraining, train_on_rollouts


def is_method(factory: object) -> bool:
    """Whether something is the class of a method's settings."""
    return isinstance(factory, type) and callable(getattr(factory, "recipe", None))


def training_for(slug: str, factory: Any) -> Training | None:
    """How ``everytoken train`` trains a card of this station that names no ``training``; None where its implementation
    is no method of the contract.
    """
    if not is_method(factory):
        return None
    if getattr(factory, "any_order", False):
        return _of_canvases(slug, factory)
    config = derive_config(f"{factory.__name__}Training", RolloutTraining, factory)

    @quiet_training()
    def run(config: RolloutTraining, context: TrainingContext) -> TrainingResult:
        return train_on_rollouts(slug, config, config.part(factory), context)

    return Training(slug, f"a model on its own rollouts with {slug}", config, run, ("train", "trl"))


def _of_canvases(slug: str, factory: Any) -> Training:
    """As ``training_for``, for methods whose models write in any order."""
    from .diffusion_training import CanvasTraining, train_on_canvases

    config = derive_config(f"{factory.__name__}Training", CanvasTraining, factory)

    @quiet_training()
    def run(config: Any, context: TrainingContext) -> TrainingResult:
        return train_on_canvases(slug, config, config.part(factory), context)

    return Training(slug, f"a masked diffusion model on its own rollouts with {slug}", config, run, ("train", "trl"))
