"""Points and boxes in a LLaVA: their tokens stand behind those of the image, and no layer of the model is touched.

::

    with prompting(model, VisualPrompting()) as encoder:
        inputs = prompted_inputs(model, processor, encoder, image, "<image> shape? <prompt>", [[Point(20, 31)]])
        model.generate(**inputs)

The tokens are handed over with the image's features, through transformers' own ``mm_encoder_outputs``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...core.errors import BadInputError, UnsupportedModelError
from ...core.weights import safetensors_file, weights_for
from ..base import Declaration
from ..changed_weights import read_changed, swapped
from .modeling_visual_prompts import VisualPromptEncoder
from .prompts import Prompts, VisualPrompt, encode_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

KIND = "visual prompts"
"""The kind of shipped weights."""
SHAPES = ("point", "box")


@dataclass
class VisualPrompting:
    """An encoder of points and boxes, and the model's weights that were trained with it.

    Args:
        shape: what the trial points with, ``"point"`` or ``"box"``.
        weights: folder of a trained encoder (``everytoken train sphinx-v``); None takes the one that ships for the
            model.

    Raises:
        BadInputError: another shape.
    """

    shape: str = "box"
    weights: str | None = None
    declares: ClassVar[Declaration] = Declaration(
        where=("model input",),
        criterion="none: it adds what the user points at",
        strategy="add",
        budget="10 prompts and 2 marks",
        needs=("training",),
    )

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise BadInputError(f"One points with a point or a box; got {self.shape!r}.")

    def folder(self, model: PreTrainedModel) -> Path:
        """Where the trained encoder for a model lies.

        Raises:
            BadInputError: none is given, and none ships for this model.
        """
        found = Path(self.weights).expanduser() if self.weights else weights_for(model.config, KIND)
        if found is None or not (found / "config.json").is_file():
            raise BadInputError(
                f"There is no visual prompt encoder in {found}."
                if found
                else "No prompt encoder ships for this model.",
                "Train one: everytoken train sphinx-v --out prompts; then set weights=prompts/encoder.",
            )
        return found


def check_llava(model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError for all models but LLaVA: where others place image tokens has not been tried."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    if kind != "llava":
        raise UnsupportedModelError(
            f"Visual prompts stand behind the image's tokens of a LLaVA; {type(model).__name__} has not been tried."
        )


@contextlib.contextmanager
def prompting(model: PreTrainedModel, settings: VisualPrompting) -> Iterator[VisualPromptEncoder]:
    """Inside the block the model has the weights that were trained with the encoder.

    Raises:
        UnsupportedModelError: not a LLaVA.
        BadInputError: there is no trained encoder, or it is for another width.
    """
    check_llava(model)
    folder = settings.folder(model)
    safetensors_file(folder)
    encoder = VisualPromptEncoder.from_pretrained(folder, use_safetensors=True).to(model.device).eval()
    check_width(model, encoder)
    before = swapped(model, read_changed(folder))
    try:
        yield encoder
    finally:
        swapped(model, before)


def check_width(model: PreTrainedModel, encoder: VisualPromptEncoder) -> None:
    """Raises BadInputError where the encoder was made for another width than the language model's."""
    width = model.config.get_text_config().hidden_size
    if encoder.config.hidden_size != width:
        raise BadInputError(
            f"This prompt encoder makes tokens of width {encoder.config.hidden_size}; the model's: {width}."
        )


def with_prompts(
    model: PreTrainedModel, encoder: VisualPromptEncoder, inputs: dict[str, Any], prompts: Prompts
) -> dict[str, Any]:
    """Inputs of a batch with the tokens of its prompts behind those of each image.

    Args:
        inputs: what a processor made, one image a row: ``input_ids``, ``pixel_values``, and ``attention_mask`` and
            ``labels`` where there are any.
        prompts: of the images.

    Returns:
        Arguments of ``model(...)`` or ``model.generate(...)``, with ready features instead of pixels.

    Raises:
        UnsupportedModelError: not a LLaVA.
        BadInputError: not one image a row, or images with different numbers of tokens (with ``drop_empty``).
    """
    check_llava(model)
    check_width(model, encoder)
    ids = inputs["input_ids"]
    if inputs.get("pixel_values") is None or len(inputs["pixel_values"]) != len(ids) or len(prompts.valid) != len(ids):
        raise BadInputError("Visual prompts need one image, and the prompts of one image, for every row.")
    output = model.get_image_features(inputs["pixel_values"], return_dict=True)
    tokens = encoder.tokens(prompts)
    if len({len(row) for row in tokens}) != 1:
        raise BadInputError(
            "The images of this batch have different numbers of prompts.",
            "Use drop_empty=False, or one number a batch.",
        )
    pieces = [torch.cat([image, row.to(image.dtype)]) for image, row in zip(output.pooler_output, tokens, strict=True)]
    placeholder = ids == model.config.image_token_id
    if not bool((placeholder.sum(1) == len(output.pooler_output[0])).all()):
        raise BadInputError("The texts do not have as many image tokens as the image.", "Use the model's processor.")
    output.pooler_output = pieces
    last = ids.shape[1] - 1 - placeholder.flip(1).int().argmax(1)
    extra = len(tokens[0])
    place = torch.arange(ids.shape[1] + extra, device=ids.device)[None].expand(len(ids), -1)
    added = (place > last[:, None]) & (place <= last[:, None] + extra)
    source = torch.where(place <= last[:, None], place, place - extra).clamp(min=0)
    fills = {"input_ids": model.config.image_token_id, "attention_mask": 1, "labels": -100}
    rest = {name: value for name, value in inputs.items() if name not in ("pixel_values", *fills)}
    for name, fill in fills.items():
        if inputs.get(name) is not None:
            rest[name] = torch.where(added, fill, inputs[name].gather(1, source))
    return rest | {"mm_encoder_outputs": {"image": output}}


def prompted_inputs(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    encoder: VisualPromptEncoder,
    images: Sequence[Any],
    texts: Sequence[str],
    prompts: Sequence[Sequence[VisualPrompt]],
) -> dict[str, Any]:
    """Images, texts and prompts as arguments of ``model.generate(...)``.

    The processor must pad an image to a square, as LLaVA's does, or the images must be squares: prompts are placed so.

    Args:
        images: PIL images, one a text.
        texts: with one image token each.
        prompts: of every image, in pixels of the image as it is given.

    Raises:
        BadInputError: see ``encode_prompts`` and ``with_prompts``; or an image that is no square, of which this
            processor would cut off the ends.
    """
    sizes = [(image.height, image.width) for image in images]
    pads = bool(getattr(processor.image_processor, "do_pad", False))
    if not pads and any(height != width for height, width in sizes):
        raise BadInputError(
            "This processor cuts off the ends of images that are no squares, so prompts would point elsewhere.",
            "Pad the images to squares first, content in the middle, and move the prompts alike.",
        )
    encoded = encode_prompts(prompts, sizes, encoder.config.max_prompts)
    inputs = processor(images=list(images), text=list(texts), return_tensors="pt", padding=True)
    device = model.device
    return with_prompts(model, encoder, {name: value.to(device) for name, value in inputs.items()}, encoded)
