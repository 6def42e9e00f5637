"""What a recipe for masked diffusion models cannot be trained with: refused by name when the trainer is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.errors import BadInputError, UnsupportedModelError
from ..training.arguments import Refusals, check_arguments
from .base import Recipe
from .recipe_checks import BATCH_KINDS, limited

REFUSALS: Refusals = {
    "use_vllm": (False, "a canvas sampler writes the rollouts"),
    "use_transformers_continuous_batching": (False, "a canvas sampler writes the rollouts"),
    "top_p": (1.0, "the sampler draws from all tokens"),
    "top_k": (0, "the sampler draws from all tokens"),
    "min_p": (None, "the sampler draws from all tokens"),
    "repetition_penalty": (1.0, "the sampler draws by the model's own probabilities"),
    "generation_kwargs": (None, "the sampler has settings of its own"),
    "cache_implementation": (None, "a canvas is read whole at every step"),
    "pad_to_multiple_of": (None, "a canvas has the width of its texts"),
    "mask_truncated_completions": (False, "a canvas is always written to its end"),
    "top_entropy_quantile": (1.0, "entropies of a canvas are those of single draws"),
    "entropy_coef": (0.0, "entropies of a canvas are those of single draws"),
    "use_adaptive_entropy": (False, "entropies of a canvas are those of single draws"),
}
"""Settings of GRPOConfig that a canvas cannot honour."""
LEFT_TO_RIGHT = ("rollout", "temperature", "auxiliary")
"""Kinds that read or write from left to right."""


def check_canvas_recipe(recipe: Recipe, args: Any, more: Mapping[str, Any]) -> None:
    """Refuses pieces that do not compose on a canvas, and settings that it cannot honour.

    Args:
        more: further arguments of the trainer.

    Raises:
        BadInputError, UnsupportedModelError: see ``DiffusionGRPOTrainer``.
    """
    canvas, likelihood, steps = (recipe.one(kind) for kind in ("canvas", "likelihood", "steps"))
    if canvas is None or likelihood is None:
        raise BadInputError(
            "A masked diffusion model needs a piece that writes a canvas and one that gives its likelihood.",
            "For example: Recipe(CanvasRollouts(), OneStep()).",
        )
    for piece in recipe.pieces:
        name = type(piece).__name__
        needs: Any = getattr(piece, "needs", None)
        if piece.kind in LEFT_TO_RIGHT or needs or piece in limited(recipe):
            raise BadInputError(f"{name} reads a text from left to right, which a canvas is not.", "Leave it out.")
        if steps is not None and piece.kind in (*BATCH_KINDS, "clip", "ratio_weight"):
            raise BadInputError(
                f"{type(steps).__name__} sets the advantage of every prediction, and {name} would change it.",
                "Leave one of them out.",
            )
        if getattr(piece, "needs_record", False) and canvas.remask is not None:
            raise BadInputError(
                f"{name} scores the step that wrote each token, and {type(canvas.remask).__name__} takes tokens back.",
                "Leave one of them out.",
            )
    if steps is not None and not likelihood.of_states:
        raise BadInputError(
            f"{type(steps).__name__} trains the guesses of single steps, and {type(likelihood).__name__} scores whole "
            "texts.",
            "Use OneStep.",
        )
    if not canvas.score_after_end and not getattr(likelihood, "needs_record", False):
        raise BadInputError(
            f"{type(likelihood).__name__} masks what is scored, and positions behind the end would stay in its sight.",
            "Score the whole canvas (score_after_end=True), or the steps that wrote it (Transitions).",
        )
    check_arguments("DiffusionGRPOTrainer", args, REFUSALS)
    for piece in recipe.pieces:
        for setting, wanted in getattr(piece, "asks", {}).items():
            if getattr(args, setting) != wanted:
                raise BadInputError(
                    f"{type(piece).__name__} needs {setting}={wanted!r}; got {getattr(args, setting)!r}.",
                    f"Give GRPOConfig({setting}={wanted!r}).",
                )
    if args.temperature <= 0:
        raise BadInputError("Rollouts of a group must differ.", "Give a temperature above 0.")
    if more.get("eval_dataset") is not None:
        raise BadInputError("This trainer has no evaluation.", "Measure the trained model with a sampler.")
    for given in ("tools", "environment_factory", "rollout_func"):
        if more.get(given):
            raise BadInputError(f"A canvas sampler writes the rollouts, without {given}.", f"Leave {given} out.")
    if args.world_size > 1:
        raise UnsupportedModelError("Masked diffusion models are trained on one process here.")
    columns = set(getattr(more.get("train_dataset"), "column_names", None) or ())
    if {"image", "images"} & columns:
        raise UnsupportedModelError("A canvas holds text only, and these prompts have images.")
