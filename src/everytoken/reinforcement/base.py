"""The contract of the station: a recipe is a list of pieces, each a pure function of a batch of rollouts.

A piece is any object with a ``kind`` and the call of that kind (``KINDS``). One batch of rollouts passes them in this
order::

    sampler -> prompt -> rollout -> temperature -> reward          while rollouts are made
    group_advantage -> token_advantage -> token_weight             once a batch: [B, T] advantages
    rollouts -> tokens                                             once a batch: what is trained on
    clip -> ratio_weight -> auxiliary -> aggregation               in every update

Weights multiply, selections intersect. A weight is never negative, so it may be multiplied into the advantage: it
commutes with the minimum of the clipped surrogate. A piece of your own::

    class FirstTokens:
        kind = "token_weight"

        def __call__(self, batch, advantages):
            return torch.where(batch.positions < 4, 1.0, 0.5)

    trainer = RecipeTrainer(model, recipe=Recipe(FirstTokens()), reward_funcs=score, args=GRPOConfig(...), ...)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from ..core.errors import BadInputError, UnknownNameError

KINDS: dict[str, str] = {
    "sampler": "(dataset, repeats, batches) -> Sampler: RepeatSampler's arguments, and how many batches there are",
    "prompt": "(row, step, steps) -> row with another prompt",
    "rollout": "(rows, writer) -> Written: writes itself (writer is a rollouts.Writer), perhaps for other rows",
    "temperature": "processor() -> LogitsProcessor in front of all others",
    "reward": "TRL's reward function, with a weight: (completions, completion_ids, trainer_state, ...) -> list[float]",
    "group_advantage": "(batch) -> [B] or [B, T], in place of TRL's own",
    "token_advantage": "(batch, advantages [B, T]) -> [B, T]",
    "token_weight": "(batch, advantages [B, T]) -> [B, T], not negative",
    "rollouts": "(batch, advantages [B, T]) -> bool [B]",
    "tokens": "(batch, advantages [B, T], kept [B, T]) -> bool [B, T]; kept are the tokens of the kept rollouts",
    "clip": "(update, low, high) -> (low [b, T], high [b, T])",
    "ratio_weight": "(update, low, high) -> [b, T], not negative; low and high are the bounds that clip chose",
    "auxiliary": "(model, inputs, step, steps) -> a scalar that is added to the loss",
    "aggregation": "no call: loss_type is the name of TRL's aggregation",
    "canvas": "sampler(temperature, ends, mask_id, length, record_guesses) -> DenoisingSampler that writes rollouts",
    "likelihood": "(model, rows, temperature) -> LikelihoodEstimate of texts that were written in any order",
    "steps": "(rewards [B, S], groups [B]) -> StepChoice; weights(found, step) -> [B, T] of each prediction",
}
"""Every kind of piece, in the order of use, and its call; the last three are for text in any order."""

ONCE = frozenset(KINDS) - {
    "prompt", "reward", "token_advantage", "token_weight", "rollouts", "tokens", "ratio_weight", "auxiliary"
}  # fmt: skip
"""Kinds of which a recipe has one piece at most: two could not both decide."""

NEEDS = frozenset({"ids", "logps", "entropies", "distributions"})
"""What a piece may ask of the rollouts and of the policy that wrote them, as ``needs``."""


@dataclass
class RolloutBatch:
    """Rollouts of all processes, or of one where ``distributions`` is there.

    Attributes:
        ids: ``[B, T]`` completion tokens; padding may be anything.
        mask: ``[B, T]`` bool, the tokens that the policy chose, the end token included.
        groups: ``[B]``, equal for completions of one prompt.
        rewards: ``[B]``; NaN where no reward function scored the row.
        truncated: ``[B]`` bool, completions without an end token.
        step, steps: optimiser steps done when the rollouts were made, and in all.
        logps, entropies: ``[B, T]`` of the policy that wrote them, at the training temperature, in nats; for pieces
            that need them.
        distributions: rows ``[n]`` -> hidden states ``[n, T, D]`` and logits ``[n, T, V]`` that predict the tokens,
            without gradients; for pieces that need them. Ask for a group at a time: nothing is kept.
        canvas: the record of rollouts that were written in any order (``canvas_pieces.CanvasRows``).
    """

    ids: torch.Tensor
    mask: torch.Tensor
    groups: torch.Tensor
    rewards: torch.Tensor
    step: int = 0
    steps: int = 1
    logps: torch.Tensor | None = None
    entropies: torch.Tensor | None = None
    distributions: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
    truncated: torch.Tensor | None = None
    canvas: Any = None

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        return min(1.0, self.step / max(1, self.steps))

    @property
    def positions(self) -> torch.Tensor:
        """``[B, T]``: how many tokens of the completion stand before each."""
        return torch.arange(self.mask.shape[1], device=self.mask.device).expand_as(self.mask)

    def group_rows(self) -> Iterator[torch.Tensor]:
        """The rows of every group."""
        for group in self.groups.unique():
            yield (self.groups == group).nonzero()[:, 0]


@dataclass
class UpdateBatch:
    """What one forward of an update says; nothing of it carries gradients.

    Attributes:
        ratio: ``[b, T]``, probability under the policy over that under the one that wrote the rollout.
        logps, entropies: ``[b, T]`` of the policy.
        mask: ``[b, T]`` bool.
        advantages: ``[b, T]``.
    """

    ratio: torch.Tensor
    logps: torch.Tensor
    entropies: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor


class Piece(Protocol):
    """Anything with a ``kind``. A piece may also have ``needs`` (of ``NEEDS``), ``state_dict`` with
    ``load_state_dict``, ``check_model(model)`` that refuses or prepares a model before training,
    ``use_tokenizer(tokenizer)``, ``metrics`` (numbers by name that the trainer logs after its call),
    ``observe(batch)`` of every batch of rollouts, ``carry(rows, own)``: of all processes' rows the tensors of its
    ``own``, which an auxiliary finds in its inputs, and ``picture(batch, texts)``: of the rollouts' tokens, titles and
    HTML for a report. A prompt may limit its completions: ``max_new_tokens(step, steps)``. Selections may have a
    ``divisor``: ``"kept"`` divides the loss by the tokens that are left, ``"all"`` by those there were. A weight that
    must weigh the KL too has ``weighs_kl``.
    """

    kind: ClassVar[str]


class Recipe:
    """Pieces that train together, checked when they are put together.

    Args:
        pieces: in any order; those of one kind are used in the order given. A recipe without pieces is stock GRPO.

    Raises:
        UnknownNameError: a piece of an unknown kind.
        BadInputError: what is no piece, two pieces that would decide the same, or selections with two divisors.
    """

    def __init__(self, *pieces: Any):
        for piece in pieces:
            kind = getattr(piece, "kind", None)
            if not isinstance(kind, str):
                raise BadInputError(f"{_name(piece)} is no piece.", f"A piece has a kind: {', '.join(KINDS)}.")
            if kind not in KINDS:
                raise UnknownNameError("kind of piece", kind, KINDS)
            if kind in ONCE and (same := [other for other in pieces if getattr(other, "kind", None) == kind])[1:]:
                raise BadInputError(
                    f"{' and '.join(map(_name, same))} would both set the {kind.replace('_', ' ')}.",
                    "Keep one of them.",
                )
            if unknown := set(getattr(piece, "needs", ())) - NEEDS:
                raise UnknownNameError(f"need of {_name(piece)}", sorted(unknown)[0], NEEDS)
        self.pieces = tuple(pieces)
        divisors = {getattr(piece, "divisor", "kept") for piece in self.of("rollouts", "tokens")}
        if len(divisors) > 1 or divisors - {"kept", "all"}:
            raise BadInputError(
                f"Selections divide the loss by one count of tokens; these say {' and '.join(sorted(divisors))}.",
                "Give them the same divisor: kept or all.",
            )
        self.divisor: str = next(iter(divisors), "kept")

    def of(self, *kinds: str) -> list[Any]:
        """The pieces of some kinds."""
        return [piece for piece in self.pieces if piece.kind in kinds]

    def one(self, kind: str) -> Any | None:
        """The piece of a kind of which there is one at most."""
        return next(iter(self.of(kind)), None)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(getattr(piece, "needs", ()) for piece in self.pieces))

    def state_dict(self) -> list[tuple[str, Any]]:
        """Name and state of every piece, or None."""
        return [(_name(piece), piece.state_dict() if hasattr(piece, "state_dict") else None) for piece in self.pieces]

    def load_state_dict(self, states: list[tuple[str, Any]]) -> None:
        """Raises ``BadInputError`` where the states are those of other pieces."""
        names, here = [name for name, _ in states], [_name(piece) for piece in self.pieces]
        if names != here:
            raise BadInputError(
                f"The checkpoint is of the recipe {', '.join(names) or 'without pieces'}, and this one is "
                f"{', '.join(here) or 'without pieces'}.",
                "Go on with the same recipe, or begin anew in another folder.",
            )
        for piece, (_, state) in zip(self.pieces, states, strict=True):
            if state is not None:
                piece.load_state_dict(state)


def _name(piece: Any) -> str:
    return type(piece).__name__
