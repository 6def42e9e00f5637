"""What reducers have that work inside a model: between layers of the language model, or in the vision encoder.

``reduction.seam`` attaches them; ``reduction.base`` is what all reducers share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

import torch

from .base import Declaration, Reduction

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class DecoderView:
    """One prompt as a decoder layer hands it on, for the choice of what the next layers may see.

    Attributes:
        hidden: ``[L, d]`` hidden states of the tokens that are still there, without padding.
        units: ``[L]``, the number of the image that a token belongs to, -1 for text.
        segments: ``[L]``, the number of the part of the prompt (an image with its text), -1 for text before the first.
        attention: layer -> ``[L]`` weights from the prompt's last token, averaged over heads.
        totals: image -> how many tokens it had before any reduction.
    """

    hidden: torch.Tensor
    units: torch.Tensor
    segments: torch.Tensor
    attention: dict[int, torch.Tensor]
    totals: dict[int, int]


@dataclass(frozen=True)
class DecoderStage:
    """A cut between two layers of the language model.

    Attributes:
        after: the layer (from 0) whose output is cut.
        rows: the layers whose attention from the last token is needed, ``after`` the highest of them.
        choose: a view -> ``[L]`` bool, True for what stays; text stays in any case.
    """

    after: int
    rows: tuple[int, ...]
    choose: Callable[[DecoderView], torch.Tensor]


@runtime_checkable
class DecoderReducer(Protocol):
    """A reducer that (also) works inside the language model, at the prompt only."""

    declares: ClassVar[Declaration]

    def stages(self) -> Sequence[DecoderStage]:
        """The cuts, in the order of their layers."""
        ...


class EncoderRun(Protocol):
    """What a reducer inside the encoder did in one pass."""

    def reduction(self, image: int, features: torch.Tensor) -> Reduction:
        """The reduction of one image, from the features ``[M, d]`` that the encoder returned for it."""
        ...


@runtime_checkable
class EncoderReducer(Protocol):
    """A reducer that works inside the vision encoder, so that the features come out fewer."""

    declares: ClassVar[Declaration]

    def inside(self, model: PreTrainedModel) -> AbstractContextManager[EncoderRun]:
        """Works in the model's encoder inside the block."""
        ...


@runtime_checkable
class ModelReducer(Protocol):
    """A reducer that was trained for some models, and refuses others before anything runs."""

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises BadInputError or UnsupportedModelError for a model that it cannot serve."""
        ...
