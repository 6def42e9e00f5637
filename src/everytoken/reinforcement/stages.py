"""From rewards of responses to advantages of tokens: a recipe's stages in their order, for any trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..core.errors import BadInputError
from .base import Recipe, RolloutBatch


def plain(piece: Any, *arguments: Any) -> Any:
    return piece(*arguments)


class Decided(NamedTuple):
    """What a recipe says of the tokens of a batch, all ``[B, T]``.

    Attributes:
        advantages: weights included.
        kept: bool, the tokens that are trained on.
        weights: the product of the token weights.
    """

    advantages: torch.Tensor
    kept: torch.Tensor
    weights: torch.Tensor


def decide(
    recipe: Recipe,
    batch: RolloutBatch,
    group: torch.Tensor,
    called: Callable[..., Any] = plain,
    weigh: Callable[[Any, torch.Tensor], torch.Tensor] | None = None,
) -> Decided:
    """Advantages of every token, and the tokens that are trained on.

    Args:
        group: ``[B]`` or ``[B, T]``, of the recipe's group advantage or of the trainer's own.
        called: calls a piece.
        weigh: ``(piece, advantages) -> weights``, where weights are not those of one call for the whole batch.

    Raises:
        BadInputError: a negative weight.
    """
    advantages = group * batch.mask if group.dim() == 2 else group[:, None] * batch.mask
    for piece in recipe.of("token_advantage"):
        advantages = called(piece, batch, advantages) * batch.mask
    weights = torch.ones_like(advantages)
    for piece in recipe.of("token_weight"):
        weight = called(piece, batch, advantages) if weigh is None else weigh(piece, advantages)
        if (weight[batch.mask] < 0).any():
            raise BadInputError(f"{type(piece).__name__} gave a negative weight.", "Weights are at least 0.")
        advantages, weights = advantages * weight, weights * weight
    kept = batch.mask
    for piece in recipe.of("rollouts"):
        kept = kept & called(piece, batch, advantages)[:, None]
    for piece in recipe.of("tokens"):
        kept = kept & called(piece, batch, advantages, kept)
    return Decided(advantages, kept, weights)
