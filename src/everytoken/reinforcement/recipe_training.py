"""``everytoken train recipe --config recipe.yaml``: methods of the station, and pieces of your own, in one recipe.

    pieces:
      - hapo: {token_average: false, adv_beta: 0, clip_alpha: 0}   # its temperature alone
      - tempo
      - mypieces:FirstTokens: {count: 4}                           # a class of yours, from module mypieces
    grpo_arguments: {loss_type: dapo}                              # where the methods ask for different things
    steps: 100

A method contributes all its pieces, and the settings of GRPOConfig that it asks for.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

import yaml

from ..core.errors import BadInputError, UnknownNameError
from ..core.quiet import quiet_training
from ..core.settings import load_function, settable
from ..training.base import Training, TrainingContext, TrainingResult
from .base import Recipe
from .rollout_training import RolloutTraining, train_on_rollouts
from .training import is_method

CARDS = "everytoken.catalog.cards:find_card"
"""Looked up when it is needed: methods are found by their cards, and no station imports another."""
OWN = {
    "output_dir": "--out",
    "num_generations": "the setting num_generations",
    "num_iterations": "the setting num_iterations",
    "temperature": "the setting temperature",
    "max_completion_length": "the setting sample_tokens",
    "learning_rate": "the setting lr",
    "per_device_train_batch_size": "the setting batch_size",
    "max_steps": "the setting steps",
    "seed": "the setting seed",
}
"""Arguments that have a setting of their own."""


@dataclass
class RecipeTraining(RolloutTraining):
    """A recipe on the model's own rollouts.

    Args:
        pieces: a list of methods (``tempo``) or of pieces of yours (``module:Class``), each with its settings.
        grpo_arguments: further settings of GRPOConfig, which win over those that the methods ask for.

    Raises:
        BadInputError: no list, an unknown setting, pieces that cannot train together, or methods that ask for different
            settings.
    """

    pieces: str = ""
    grpo_arguments: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        assembled(self.pieces, self.grpo_arguments)  # before anything is loaded


@dataclass
class Assembled:
    """A method that was put together."""

    parts: list[Any]
    settings: dict[str, Any]

    def recipe(self) -> Recipe:
        return Recipe(*self.parts)

    def arguments(self) -> dict[str, Any]:
        return self.settings


def _read(text: str, what: str, kind: type, example: str) -> Any:
    """A list or mapping of a YAML file, which arrives as Python writes it, or one of the command line, in YAML."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        try:
            found = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise BadInputError(f"{what} cannot be read: {error}", f"For example: {example}") from error
    if not isinstance(found, kind):
        raise BadInputError(f"{what} must be a {kind.__name__}; got {text!r}.", f"For example: {example}")
    return found


def assembled(pieces: str, arguments: str) -> Assembled:
    """The recipe of a configuration.

    Raises:
        BadInputError, UnknownNameError: as for ``RecipeTraining``.
    """
    listed = _read(pieces, "pieces", list, "pieces=[tempo, {d3s: {tokens_end: 0.5}}]")
    given = _read(arguments or "{}", "grpo_arguments", dict, "grpo_arguments={loss_type: dapo}")
    parts: list[Any] = []
    asked: dict[str, tuple[Any, str]] = {}
    for item in listed:
        name, settings = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (item, {})
        if not isinstance(name, str) or not isinstance(settings or {}, dict):
            raise BadInputError(f"{item!r} names no piece.", "Write a name, or `name: {setting: value}`.")
        factory = load_function(name, "A piece") if ":" in name else load_function(CARDS)(name).load()
        made = _made(name, factory, settings or {})
        if not is_method(factory):
            parts.append(made)
            continue
        if hasattr(made, "rows"):
            raise BadInputError(
                f"{name} learns from texts, and a recipe from prompts.",
                f"Use `everytoken train {name}`, or its pieces in Python.",
            )
        if getattr(made, "any_order", False):
            raise BadInputError(
                f"{name} is for models that write in any order.",
                f"Use `everytoken train {name}`, or its pieces in Python.",
            )
        parts += made.recipe().pieces
        for key, value in made.arguments().items():
            if key in asked and asked[key][0] != value and key not in given:
                raise BadInputError(
                    f"{asked[key][1]} asks for {key}={asked[key][0]!r} and {name} for {key}={value!r}.",
                    f"Decide: grpo_arguments: {{{key}: ...}}.",
                )
            asked[key] = (value, name)
    if not parts:
        raise BadInputError("The recipe has no pieces.", "For example: pieces=[tempo, d3s]")
    Recipe(*parts)
    _check_arguments(given)
    return Assembled(parts, {key: value for key, (value, _) in asked.items()} | given)


def _made(name: str, factory: Any, settings: dict[str, Any]) -> Any:
    known = settable(factory)
    if known or settings:
        for key in settings:
            if known and key not in known:
                raise UnknownNameError(f"setting of {name}", str(key), known)
    try:
        return factory(**settings)
    except TypeError as error:
        raise BadInputError(f"{name} cannot be made of {settings}: {error}.") from error


def _check_arguments(given: dict[str, Any]) -> None:
    import dataclasses

    from trl import GRPOConfig

    known = [item.name for item in dataclasses.fields(GRPOConfig)]
    for key in given:
        if key in OWN:
            raise BadInputError(f"grpo_arguments: {key} has a setting of its own.", f"Use {OWN[key]}.")
        if key not in known:
            raise UnknownNameError("argument of GRPOConfig", str(key), known)


@quiet_training()
def run(config: RecipeTraining, context: TrainingContext) -> TrainingResult:
    return train_on_rollouts("recipe", config, assembled(config.pieces, config.grpo_arguments), context)


TRAINING = Training(
    "recipe", "a model on its own rollouts with a recipe of pieces", RecipeTraining, run, ("train", "trl")
)
