"""Weights of a model that were trained with something put into it: kept beside that, and swapped in and out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..core.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHANGED = "changed.safetensors"


@torch.no_grad()
def swapped(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Writes weights into a model and returns what was there.

    Raises:
        BadInputError: a name or shape that the model has not.
    """
    own, before = dict(model.named_parameters()), {}
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            raise BadInputError(f"The model has no weights {name} of shape {tuple(value.shape)}.")
    for name, value in weights.items():
        before[name] = own[name].detach().clone()
        own[name].copy_(value)
    return before


def save_changed(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Keeps weights by their names in the model; no file where there are none."""
    from safetensors.torch import save_file

    if weights:
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, folder / CHANGED)


def read_changed(folder: Path) -> dict[str, torch.Tensor]:
    """What ``save_changed`` kept; empty where it kept nothing."""
    if not (folder / CHANGED).is_file():
        return {}
    from safetensors.torch import load_file

    return load_file(folder / CHANGED)
