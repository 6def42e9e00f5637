"""FastV: inside the decoder, keeps the image tokens that the prompt's last token attends to (Chen and others, arXiv
2403.06764); the baseline that every reducer is compared with.

Layers ``0 .. K-1`` run on everything. With the attention of layer ``K-1``, averaged over heads, from the last token::

    keep = the floor((1 - R) N) image tokens with the largest weight          per image

and layers ``K`` and later never see the others. Tokens keep their positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..core.errors import BadInputError
from .arithmetic import top_indices, whole_part
from .base import Declaration, Reduction, ReductionContext, check_features, selection
from .inside import DecoderStage, DecoderView


@dataclass
class FastV:
    """Drops image tokens that the last token does not attend to, behind an early layer of the decoder.

    Args:
        layer: K, how many layers see everything; at least 1.
        remove: R, the share of each image's tokens to drop.

    Raises:
        BadInputError: a layer below 1, or a share outside [0, 1).
    """

    layer: int = 3
    remove: float = 0.5
    declares: ClassVar[Declaration] = Declaration(
        where=("decoder",),
        criterion="attention from the prompt's last token",
        strategy="select",
        budget="fixed share",
        needs=("attention",),
        positions="original",
    )

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise BadInputError(f"layer counts the layers that see everything, at least 1; got {self.layer}.")
        if not 0 <= self.remove < 1:
            raise BadInputError(f"remove is a share from 0 to below 1; got {self.remove}.")

    @classmethod
    def for_depth(cls, depth: int) -> dict[str, int]:
        """Settings for a decoder of so few layers that the usual one is too late; empty where it is not."""
        return {} if cls.layer < depth else {"layer": 1}

    def reduce(self, features: torch.Tensor, context: ReductionContext) -> Reduction:
        """``features [N, d]`` with ``context.attention [N]`` -> those with the largest attention.

        Raises:
            BadInputError: there is no attention in the context.
        """
        check_features(features)
        total = len(features)
        count = max(1, whole_part(total, 1 - self.remove))
        if count == total:
            return selection(features, torch.arange(total, device=features.device))
        if context.attention is None:
            raise BadInputError("FastV needs the attention of the prompt's last token.", "Use it inside the decoder.")
        return selection(features, top_indices(context.attention.float(), count), context.attention)

    def stages(self) -> list[DecoderStage]:
        """One cut, behind layer ``layer - 1``."""
        return [DecoderStage(self.layer - 1, (self.layer - 1,), self._choose)]

    def _choose(self, view: DecoderView) -> torch.Tensor:
        keep = view.units < 0
        for unit in view.units[view.units >= 0].unique().tolist():
            places = (view.units == unit).nonzero()[:, 0]
            context = ReductionContext(attention=view.attention[self.layer - 1][places])
            reduction = self.reduce(view.hidden[places], context)
            keep[places[reduction.anchors]] = True
        return keep
