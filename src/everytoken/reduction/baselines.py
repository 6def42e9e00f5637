"""What every choice of tokens has to beat: chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Declaration, Reduction, ReductionContext, check_features, check_share, count_kept, selection


@dataclass
class RandomTokens:
    """Keeps random tokens.

    Args:
        keep: the share to keep.

    Raises:
        BadInputError: a share outside (0, 1].
    """

    keep: float = 0.098
    declares: ClassVar[Declaration] = Declaration(("model input",), "chance", "select", "fixed share", ("generator",))

    def __post_init__(self) -> None:
        check_share("keep", self.keep)

    def reduce(self, features: torch.Tensor, context: ReductionContext) -> Reduction:
        """``features [N, d]`` -> a random subset in its order; the generator, if there is one, is the CPU's."""
        check_features(features)
        order = torch.randperm(len(features), generator=context.generator)
        return selection(features, order[: count_kept(len(features), self.keep)])
