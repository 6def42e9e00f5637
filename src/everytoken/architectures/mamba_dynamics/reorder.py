"""Reordering tokens by a learned importance before a scan (arXiv 2410.03292).

Where tokens diverge, they do so at different speeds, so their order matters. A token's score is a learned weighing of
its step size, ``score_l = K . (S_D x_l)``. The tokens are sorted by it, least important first, by the soft permutation
of SoftSort, so that K learns::

    M_ij = softmax_j(-|s_(i) - s_j|^p / tau)          s_(1) >= s_(2) >= ... the sorted negated scores

and ``M x`` is scanned. At tau 1 that is a blur more than a permutation; ``hard`` permutes, and learns as the soft form
does.

Reordering lets a token see later ones. It is for networks that read all tokens at once, not for causal ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.errors import BadInputError, UnsupportedModelError


@dataclass
class Reordered:
    """Tokens in their new order.

    Attributes:
        hidden: ``[B, L, E]``.
        restore: ``[B, L, E]`` of the scan's output back into the tokens' own order.
        scores: ``[B, L]``, by token.
        matrix: ``[B, L, L]``; row i is the mixture that stands at position i.
    """

    hidden: torch.Tensor
    restore: Callable[[torch.Tensor], torch.Tensor]
    scores: torch.Tensor
    matrix: torch.Tensor

    @property
    def ranks(self) -> torch.Tensor:
        """``[B, L]``: the place of every token by importance, 0 the least; ties go by place."""
        return self.scores.argsort(dim=-1, stable=True).argsort(dim=-1)


def soft_sort(scores: torch.Tensor, tau: float = 1.0, power: float = 1.0, hard: bool = False) -> torch.Tensor:
    """SoftSort's matrix: ``[..., L] -> [..., L, L]``, the largest score in the first row.

    Args:
        tau: temperature; towards zero it becomes the permutation.
        power: of the distances.
        hard: the permutation itself, with the soft form's gradient. Equal scores keep their order.

    Raises:
        BadInputError: a temperature or power that is not positive.
    """
    if tau <= 0 or power <= 0:
        raise BadInputError(f"tau and power are positive; got {tau} and {power}.")
    order = scores.argsort(dim=-1, descending=True, stable=True)
    apart = (scores.gather(-1, order).unsqueeze(-1) - scores.unsqueeze(-2)).abs()
    soft = torch.softmax(-(apart if power == 1 else apart**power) / tau, -1)
    if not hard:
        return soft
    chosen = nn.functional.one_hot(order, scores.shape[-1]).to(soft.dtype)
    return chosen + (soft - soft.detach())


class TokenReorder(nn.Module):
    """Puts tokens into the order of their importance, and back.

    Args:
        channels: E.
        tau, power, hard: as for ``soft_sort``.
        restore: bring the scan's output back into the tokens' order, by the transpose of M. False is the released
            code, which adds outputs by importance to gates by place.
    """

    def __init__(self, channels: int, tau: float = 1.0, power: float = 1.0, hard: bool = False, restore: bool = True):
        super().__init__()
        if channels < 1:
            raise BadInputError(f"channels is 1 or more; got {channels}.")
        soft_sort(torch.zeros(1), tau, power)  # refuses bad settings now
        self.weight = nn.Parameter(torch.randn(channels) * channels**-0.5)
        self.tau, self.power, self.hard, self.restores = tau, power, hard, restore

    def forward(self, hidden: torch.Tensor, steps: torch.Tensor) -> Reordered:
        """Reorders.

        Args:
            hidden: ``[B, L, E]``.
            steps: ``S_D x``, ``[B, L, E]``, before bias and softplus.
        """
        scores = steps.float() @ self.weight.float()
        matrix = soft_sort(-scores, self.tau, self.power, self.hard)

        def restore(output: torch.Tensor) -> torch.Tensor:
            return (matrix.transpose(-1, -2) @ output.float()).to(output.dtype) if self.restores else output

        return Reordered((matrix @ hidden.float()).to(hidden.dtype), restore, scores, matrix)


def reorder_layers(
    model: nn.Module, layers: tuple[int, ...] = (0,), tau: float = 1.0, hard: bool = False, restore: bool = True
) -> list[TokenReorder]:
    """Gives the scans of some layers a ``TokenReorder`` of their own, and returns them; they learn with the model.

    Args:
        model: one whose scans read all tokens at once and have a place for it (an attribute ``reorder``), such as
            PlainMamba.
        layers: numbers of the layers from 0.
        tau, hard, restore: as for ``TokenReorder``.

    Raises:
        UnsupportedModelError: a causal language model, where a token would see later ones; or no such place.
        BadInputError: a layer that the model has not.
    """
    if getattr(model, "_is_stateful", False) or hasattr(model, "lm_head"):
        raise UnsupportedModelError(
            f"{type(model).__name__} reads from left to right: an order by importance would show it the future.",
            "Reorder a network that reads all tokens at once, for example PlainMamba.",
        )
    places: list[Any] = [item for item in model.modules() if hasattr(item, "reorder") and hasattr(item, "A_log")]
    if not places:
        raise UnsupportedModelError(f"{type(model).__name__} has no scan that takes an order.")
    if not layers or min(layers) < 0 or max(layers) >= len(places):
        raise BadInputError(f"The model has layers 0 to {len(places) - 1}; got {layers}.")
    made = []
    for number in layers:
        weight = places[number].A_log
        item = TokenReorder(weight.shape[0], tau=tau, hard=hard, restore=restore).to(weight.device)
        places[number].reorder = item
        made.append(item)
    return made
