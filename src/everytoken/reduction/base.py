"""The contract of this station: many tokens become fewer, and it stays known where each one came from.

A reducer is a dataclass of its settings with two things::

    declares: Declaration                                            # where it works, by what, with what budget
    reduce(features [N, d], context) -> Reduction(features [M, d], kept [M] or assignment [M, N], sizes [M])

It is a pure function of the features of one image (or of one crop, where the model reads an image in crops) and of what
the context holds, so that a model's hook, a training loop and a serving engine can all call it. What runs it inside a
transformers model is ``reduction.seam``. Reducers that work inside the encoder or the decoder have more to them:
``reduction.inside``.

Rules for all reducers: text is never dropped, the order of the tokens stays, at least one token stays, indices are
distinct, scores are computed in float32, ties go to the lowest index, and where nothing is to be removed the features
come back as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch

from ..core.errors import BadInputError

WHERE = ("encoder", "projector", "model input", "decoder")
"""Where a reducer can work: inside the vision encoder, in place of the projector, on the projected features before the
language model, or between two layers of the language model."""
STRATEGIES = ("select", "merge", "pool", "distil", "add")
NEEDS = ("grid", "levels", "text", "segments", "cls", "keys", "attention", "generator", "training")
"""What a reducer can ask for: fields of the context (``cls`` is ``cls_queries``), the segments of the prompt, or a
training."""
POSITIONS = ("packed", "original")


@dataclass(frozen=True)
class Declaration:
    """What kind of reducer a class is; the comparison table of the docs is made of these.

    Attributes:
        where: one of ``WHERE``; several where it works in stages.
        criterion: what decides, in a few words.
        strategy: one of ``STRATEGIES``.
        budget: how many tokens stay, in a few words.
        needs: of ``NEEDS``; empty for a reducer of features alone.
        positions: how the tokens that stay are numbered unless the caller says otherwise: ``"packed"`` numbers the
            shorter sequence anew, ``"original"`` keeps every token's number (as if the others were hidden).

    Raises:
        BadInputError: a word that is none of those.
    """

    where: tuple[str, ...]
    criterion: str
    strategy: str
    budget: str
    needs: tuple[str, ...] = ()
    positions: str = "packed"

    def __post_init__(self) -> None:
        for name, given, known in (
            ("where", self.where, WHERE),
            ("strategy", (self.strategy,), STRATEGIES),
            ("needs", self.needs, NEEDS),
            ("positions", (self.positions,), POSITIONS),
        ):
            if wrong := [item for item in given if item not in known]:
                raise BadInputError(f"{name} cannot be {', '.join(wrong)}.", f"Known: {', '.join(known)}.")


@dataclass
class ReductionContext:
    """What a reducer may look at besides the features; None or empty where it is not known.

    Attributes:
        grid: ``(rows, columns)`` where the features are a full grid in raster order.
        levels: features of several encoder levels, each ``[N, d_l]``.
        text: embeddings ``[T, d]`` of the text that belongs to the image.
        cls_queries: the summary token's queries in the encoder layers that the reducer names, each ``[heads, dk]``.
        keys: the patches' keys in the same layers, each ``[heads, N, dk]``.
        attention: attention weights ``[N]`` from the prompt's last token, averaged over heads.
        generator: of random choices; None draws from torch's own.
    """

    grid: tuple[int, int] | None = None
    levels: tuple[torch.Tensor, ...] = ()
    text: torch.Tensor | None = None
    cls_queries: tuple[torch.Tensor, ...] = ()
    keys: tuple[torch.Tensor, ...] = ()
    attention: torch.Tensor | None = None
    generator: torch.Generator | None = None


@dataclass
class Reduction:
    """What is left of one image.

    Attributes:
        features: ``[M, d]``, in the order of their anchors.
        kept: ``[M]`` ascending indices of the tokens that were selected; None where tokens were combined.
        assignment: ``[M, N]`` weights with which old tokens make new ones, rows summing to 1; None after a selection.
        sizes: ``[M]``, how many old tokens each new one stands for.
        scores: ``[N]``, what decided, for pictures; None where there is no score of a token.
        total: N.
        places: ``[M]`` ascending, the anchors where a reducer that combines names them itself; None for the rule below.
    """

    features: torch.Tensor
    kept: torch.Tensor | None
    assignment: torch.Tensor | None
    sizes: torch.Tensor
    total: int
    scores: torch.Tensor | None = None
    places: torch.Tensor | None = None

    @property
    def anchors(self) -> torch.Tensor:
        """``[M]`` ascending indices of the old tokens whose places the new ones take.

        A selected token keeps its own place, a combined one takes the place of its first part. Where parts overlap
        (every new token looks at all old ones), the places are spread evenly.
        """
        if self.kept is not None:
            return self.kept
        if self.places is not None:
            return self.places
        assert self.assignment is not None
        first = (self.assignment != 0).int().argmax(-1)
        if bool((first[1:] > first[:-1]).all()):
            return first
        count = len(self.features)
        return ((torch.arange(count, device=first.device) + 0.5) * self.total / count).long()

    def groups(self) -> torch.Tensor:
        """``[N]``: the new token that each old one went into (its largest share), or -1 for one that was dropped."""
        if self.kept is not None:
            groups = torch.full((self.total,), -1, dtype=torch.long, device=self.kept.device)
            groups[self.kept] = torch.arange(len(self.kept), device=self.kept.device)
            return groups
        assert self.assignment is not None
        share, owner = self.assignment.max(0)
        return torch.where(share > 0, owner, -1)


@runtime_checkable
class Reducer(Protocol):
    """Any object that says what it is and reduces the features of one image."""

    declares: ClassVar[Declaration]

    def reduce(self, features: torch.Tensor, context: ReductionContext) -> Reduction:
        """``features [N, d]`` -> what is left of them; raises BadInputError for what no reducer could work with."""
        ...


def check_features(features: torch.Tensor) -> None:
    """Raises BadInputError unless the features are a finite, not empty matrix of floats ``[N, d]``."""
    if features.dim() != 2 or not features.is_floating_point() or not len(features):
        raise BadInputError(
            f"Features are floats of shape [N, d], N at least 1; got {features.dtype} {tuple(features.shape)}."
        )
    if not bool(torch.isfinite(features).all()):
        raise BadInputError("The features contain NaN or infinity.", "Check the encoder's precision (float16?).")


def check_share(name: str, value: float) -> None:
    """Raises BadInputError unless a share lies in (0, 1]."""
    if not 0 < value <= 1:
        raise BadInputError(f"{name} is a share above 0 and up to 1; got {value}.")


def count_kept(total: int, keep: float) -> int:
    """How many of ``total`` tokens a share keeps: rounded, halves to even, at least 1."""
    return max(1, min(total, round(keep * total)))


def selection(features: torch.Tensor, kept: torch.Tensor, scores: torch.Tensor | None = None) -> Reduction:
    """The reduction that keeps some tokens; gradients flow through their features, not through the choice.

    Args:
        kept: distinct indices in any order.
    """
    kept = kept.to(features.device).sort().values
    chosen = features if len(kept) == len(features) else features[kept]
    ones = torch.ones(len(kept), dtype=torch.long, device=features.device)
    return Reduction(chosen, kept, None, ones, len(features), scores)


def combination(features: torch.Tensor, assignment: torch.Tensor, sizes: torch.Tensor) -> Reduction:
    """The reduction that makes every new token a weighted mean of old ones.

    Args:
        assignment: ``[M, N]`` weights, rows summing to 1.
        sizes: ``[M]`` old tokens that each new one stands for.
    """
    mixed = (assignment.float() @ features.float()).to(features.dtype)
    return Reduction(mixed, None, assignment, sizes, len(features))


def comparison_table(reducers: Iterable[tuple[str, type[Reducer]]]) -> str:
    """The declarations of reducers as a Markdown table: one row a name, in the order given."""
    heads = ("reducer", "where", "criterion", "strategy", "budget", "needs", "positions")
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for name, reducer in reducers:
        says = reducer.declares
        cells = (name, ", ".join(says.where), says.criterion, says.strategy, says.budget)
        lines.append(f"| {' | '.join((*cells, ', '.join(says.needs) or 'features alone', says.positions))} |")
    return "\n".join(lines) + "\n"
