"""What each class of vision-language models hands over as features of its images, and how it takes them back.

transformers models take ready features as ``mm_encoder_outputs``. What ``get_image_features`` puts into
``pooler_output`` differs by class, and so does the numbering of positions. A class that is not in ``FAMILIES`` is
refused by name: what it would do with fewer features has not been tried.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import BadInputError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MODALITIES = ("image", "video")
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
Grid = tuple[int, int] | None


@dataclass
class Unit:
    """The features that are reduced together: an image, a video, or a crop where the class knows only crops.

    Attributes:
        features: ``[N, d]``, in the order of the placeholders.
        grid: ``(rows, columns)`` where the features are a full grid.
        modality: ``"image"`` or ``"video"``.
    """

    features: torch.Tensor
    grid: Grid
    modality: str


@dataclass(frozen=True)
class Family:
    """How one class works.

    Attributes:
        grids: ``(config, pieces, inputs, modality) -> pieces``: what the encoder returned as ``(features, grid)``.
        gridded: whether the grid is known.
        axes: whether positions have several axes, so that a shorter sequence cannot be numbered anew.
        crops: the units are crops of images.
        summary: the type of vision encoders that have a summary token (CLS) and one feature a patch.
    """

    grids: Callable[[Any, Sequence[torch.Tensor], dict[str, Any], str], list[tuple[torch.Tensor, Grid]]]
    gridded: bool = True
    axes: bool = False
    crops: bool = False
    summary: str = ""


def square(count: int) -> Grid:
    """The square grid of so many features, if there is one."""
    side = math.isqrt(count)
    return (side, side) if side * side == count else None


def _whole(
    config: PreTrainedConfig, pieces: Sequence[torch.Tensor], inputs: dict[str, Any], modality: str
) -> list[tuple[torch.Tensor, Grid]]:
    """One piece an image, a square grid."""
    return [(piece, square(len(piece))) for piece in pieces]


def _unknown(
    config: PreTrainedConfig, pieces: Sequence[torch.Tensor], inputs: dict[str, Any], modality: str
) -> list[tuple[torch.Tensor, Grid]]:
    """One piece an image: a thumbnail, tiles without their padding, and vectors that end rows."""
    return [(piece, None) for piece in pieces]


def _crops(
    config: PreTrainedConfig, pieces: Sequence[torch.Tensor], inputs: dict[str, Any], modality: str
) -> list[tuple[torch.Tensor, Grid]]:
    """One piece a prompt, all its crops in a row; every crop has the same number of features."""
    side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
    return [(crop, (side, side)) for piece in pieces for crop in piece.split(side * side)]


def _merged_grid(
    config: PreTrainedConfig, pieces: Sequence[torch.Tensor], inputs: dict[str, Any], modality: str
) -> list[tuple[torch.Tensor, Grid]]:
    """One piece an image or video, of ``grid_thw`` patches, merged in squares; the frames of a video lie below each
    other."""
    size = config.vision_config.spatial_merge_size
    shapes = inputs[f"{modality}_grid_thw"].tolist()
    return [(piece, (t * h // size, w // size)) for piece, (t, h, w) in zip(pieces, shapes, strict=True)]


FAMILIES: dict[str, Family] = {
    "llava": Family(_whole, summary="clip_vision_model"),
    "llava_next": Family(_unknown, gridded=False),
    "smolvlm": Family(_crops, crops=True),
    "idefics3": Family(_crops, crops=True),
    "internvl": Family(_whole),
    "qwen2_vl": Family(_merged_grid, axes=True),
    "qwen2_5_vl": Family(_merged_grid, axes=True),
}
"""By ``config.model_type``."""


def family_of(model: PreTrainedModel) -> Family:
    """How a model's class works.

    Raises:
        UnsupportedModelError: a class that takes no ready features, or one that has not been tried.
    """
    kind, name = getattr(getattr(model, "config", None), "model_type", None), type(model).__name__
    if kind in FAMILIES and hasattr(model, "get_image_features"):
        return FAMILIES[kind]
    base = getattr(model, "get_base_model", None)
    if callable(base):
        raise UnsupportedModelError(f"{name} wraps the model.", "Give the model itself: model.get_base_model().")
    known = f"These can be reduced: {', '.join(sorted(FAMILIES))}."
    if not hasattr(model, "get_image_features"):
        raise UnsupportedModelError(f"{name} has no images whose tokens could be reduced.", known)
    raise UnsupportedModelError(f"What {name} ({kind}) does with fewer visual tokens has not been tried.", known)


def encoder_arguments(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """modality -> arguments of its encoder, for every modality whose pixels are given."""
    found = {}
    for modality in MODALITIES:
        encode = getattr(model.base_model, f"get_{modality}_features", None)
        if encode is not None and inputs.get(PIXELS[modality]) is not None:
            names = inspect.signature(encode).parameters
            found[modality] = {name: inputs[name] for name in names if inputs.get(name) is not None}
    return found


def encoded(
    model: PreTrainedModel, family: Family, inputs: dict[str, Any]
) -> tuple[dict[str, Any], list[Unit], set[str]]:
    """Runs the encoders once.

    Returns:
        modality -> the encoder's whole output; the units in the order of their features, images first; and the names
        of the inputs that are used up.
    """
    outputs: dict[str, Any] = {}
    units: list[Unit] = []
    used: set[str] = set()
    for modality, arguments in encoder_arguments(model, inputs).items():
        output = getattr(model.base_model, f"get_{modality}_features")(**arguments, return_dict=True)
        outputs[modality] = output
        used |= set(arguments)
        pieces = family.grids(model.config, list(output.pooler_output), inputs, modality)
        units += [Unit(features, grid, modality) for features, grid in pieces]
    return outputs, units, used


def take_back(output: Any, features: list[torch.Tensor]) -> None:
    """Writes reduced features into an encoder's output, in the kind of container that was there."""
    given = output.pooler_output
    if not isinstance(given, torch.Tensor):
        output.pooler_output = type(given)(features)
    elif len({len(item) for item in features}) == 1:
        output.pooler_output = torch.stack(features)
    else:  # images of unequal counts do not stack: one row of all of them reads the same
        output.pooler_output = torch.cat(features)[None]


def positions_of(model: PreTrainedModel, family: Family, inputs: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
    """The positions of the full prompt: ``[B, L]``, or ``[3, B, L]`` where they have axes.

    Raises:
        BadInputError: the class needs ``mm_token_type_ids`` and they are not there.
    """
    if not family.axes:
        return (mask.long().cumsum(-1) - 1).masked_fill(~mask, 0)
    if inputs.get("mm_token_type_ids") is None:
        raise BadInputError(
            f"{type(model).__name__} numbers image tokens by mm_token_type_ids, which are missing.",
            "The processor returns them; pass all that it returns.",
        )
    names = inspect.signature(model.base_model.get_rope_index).parameters
    arguments = {name: inputs[name] for name in names if inputs.get(name) is not None}
    return model.base_model.get_rope_index(**arguments | {"attention_mask": mask.long()})[0]
