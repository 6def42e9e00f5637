"""What a recipe and GRPOConfig cannot do together: refused by name when the trainer is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..core.errors import BadInputError, UnsupportedModelError
from ..training.arguments import Refusals
from ..training.distributed import in_shards
from .base import Recipe
from .rollouts import check_columns

if TYPE_CHECKING:
    from datasets import Dataset

BATCH_KINDS = ("group_advantage", "token_advantage", "token_weight", "rollouts", "tokens")
"""What makes advantages of every token, once a batch."""
CLIPPING = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""Losses with a clipped ratio."""
START = "the reference is the policy as it starts, and stays it"
REFUSALS: Refusals = {
    "sync_ref_model": (False, START),
    "ref_model_mixup_alpha": (0.6, START),
    "ref_model_sync_steps": (512, START),
}
"""What would change nothing here."""


def limited(recipe: Recipe) -> list[Any]:
    return [piece for piece in recipe.of("prompt") if hasattr(piece, "max_new_tokens")]


def check_recipe(
    recipe: Recipe, args: Any, dataset: Dataset, more: Mapping[str, Any] | None = None, on_canvas: bool = False
) -> None:
    """Refuses settings under which a piece would not do what it says.

    Args:
        dataset: of training.
        more: further arguments of the trainer.
        on_canvas: whether the trainer writes texts in any order.

    Raises:
        BadInputError, UnsupportedModelError: see ``RecipeTrainer``.
    """

    def refuse(setting: str, why: str, hint: str) -> None:
        value = getattr(args, setting)
        raise BadInputError(f"This recipe cannot be trained with {setting}={value!r}: {why}.", hint)

    aggregation = recipe.one("aggregation")
    loss_type = args.loss_type if aggregation is None else aggregation.loss_type
    if args.loss_type not in ("dapo", loss_type):  # dapo is TRL's default
        refuse("loss_type", f"its aggregation is {loss_type}", "Leave loss_type out, or the piece.")
    by_token = recipe.of(*BATCH_KINDS, "ratio_weight")
    if by_token and args.off_policy_mask_threshold is not None:
        refuse("off_policy_mask_threshold", "it reads one advantage a response", "Leave it out.")
    if by_token and loss_type == "vespo":
        refuse("loss_type", "it reads one advantage a response", "Use another loss_type.")
    if recipe.of("clip", "ratio_weight") and loss_type not in CLIPPING:
        refuse("loss_type", "it has no clipped ratio", f"Use one of {', '.join(CLIPPING)}.")
    if recipe.of("clip", "ratio_weight", "tokens") and args.importance_sampling_level != "token":
        refuse("importance_sampling_level", "its pieces decide about single tokens", "Use token.")
    if recipe.of("tokens") and args.top_entropy_quantile < 1:
        refuse("top_entropy_quantile", "a piece selects tokens already", "Leave one of them out.")
    if recipe.one("temperature") is not None or limited(recipe):
        for name in ("use_vllm", "use_transformers_continuous_batching"):
            if getattr(args, name, False):
                refuse(name, "these engines sample by their own settings", "Leave it out.")
    if args.beta != 0:
        if recipe.of("rollouts", "tokens") and recipe.divisor == "all":
            refuse("beta", "the KL of tokens that are left out would still be charged", "Use beta=0 or divisor kept.")
        if weighted := [piece for piece in recipe.pieces if getattr(piece, "weighs_kl", False)]:
            refuse("beta", f"{type(weighted[0]).__name__} would have to weigh the KL too", "Use beta=0.")
    if recipe.of("canvas", "likelihood", "steps") and not on_canvas:
        raise BadInputError("These pieces are for text in any order.", "Train them with DiffusionGRPOTrainer.")
    columns = check_columns("RecipeTrainer", dataset)
    if recipe.needs - {"ids"} and {"image", "images"} & columns:
        raise UnsupportedModelError("This recipe scores text only, and these prompts have images.")
    if recipe.one("rollout") is not None:
        _check_own_rollouts(recipe, args, columns, dataset, more or {})
    if recipe.one("sampler") is not None and dataset is not None and not hasattr(dataset, "__len__"):
        raise BadInputError("A sampler needs a dataset whose rows can be looked up.", "Load it without streaming.")
    if "distributions" in recipe.needs:
        if in_shards():
            raise UnsupportedModelError("This recipe reads whole distributions, which FSDP's shards do not give.")
        rows = args.per_device_train_batch_size * args.steps_per_generation
        if rows % args.num_generations:
            raise BadInputError(
                f"This recipe compares the distributions of a group, which must lie on one process: {rows} rows a "
                f"process are no multiple of num_generations={args.num_generations}.",
                "Change per_device_train_batch_size or steps_per_generation.",
            )


def _check_own_rollouts(
    recipe: Recipe, args: Any, columns: set[str], dataset: Dataset, more: Mapping[str, Any]
) -> None:
    """A piece that writes rollouts itself holds the unfinished ones of one process, and reads text only."""
    name = type(recipe.one("rollout")).__name__
    for engine in ("use_vllm", "use_transformers_continuous_batching"):
        if getattr(args, engine, False):
            raise BadInputError(
                f"This recipe cannot be trained with {engine}=True: {name} writes by transformers' own generation.",
                "Leave it out.",
            )
    for given in ("tools", "environment_factory", "rollout_func"):
        if more.get(given):
            raise BadInputError(f"{name} writes rollouts itself, without {given}.", f"Leave {given} out.")
    if dataset is not None and not hasattr(dataset, "__len__"):
        raise BadInputError(f"{name} looks up rows of the data.", "Load the data without streaming.")
    if args.world_size > 1:
        raise BadInputError(f"{name} keeps unfinished responses on one process.", "Train on one process.")
    if limited(recipe):
        raise BadInputError(
            f"{name} goes on with responses whose prompt may have had another budget.", "Leave one of them out."
        )
    if {"image", "images"} & columns:
        raise UnsupportedModelError(f"{name} writes text only, and these prompts have images.")
