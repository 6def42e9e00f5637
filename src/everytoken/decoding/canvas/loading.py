"""Models for a canvas, from the hub, a folder, or those that ship."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...core.errors import BadInputError
from ...core.loading import read_pretrained, resolve
from ...core.weights import weights_folder
from .base import CanvasSampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_denoiser(model: str | None = None, weights: str = CanvasSampler.weights) -> PreTrainedModel:
    """A model for a canvas: a masked language model, or another kind whose logits are tried; None is a small one
    that ships, ``weights``.

    Raises:
        BadInputError, EverytokenError: as for ``load_model``.
    """
    name = str(weights_folder(weights)) if model is None else resolve(model)
    lacking = BadInputError(f"transformers has no masked language model for {name}.")
    try:
        return read_pretrained("AutoModelForMaskedLM", name, "float32", None, False, {}, lacking)
    except BadInputError as error:
        if error is not lacking:
            raise
    return read_pretrained("AutoModelForCausalLM", name, "float32", None, False, {})
