"""Points and boxes in a LLaVA: their tokens stand behind those of the image, and no layer of the model is touched.

::

    with prompting(model, "folder") as encoder:
        inputs = prompted_inputs(model, processor, encoder, [image], ["<image> What is it?"], [[Point(20, 31)]])
        model.generate(**inputs)

``save_prompting`` writes such a folder: an encoder, and the model's weights that were trained with it. None ships. The
tokens are handed over with the image's features, through transformers' own ``mm_encoder_outputs``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...core.errors import BadInputError, UnsupportedModelError
from ...core.quiet import quiet_transformers
from ...core.weights import safetensors_file
from ..changed_weights import read_changed, save_changed, swapped
from .modeling_visual_prompts import VisualPromptEncoder
from .prompts import Prompts, VisualPrompt, encode_prompts

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, ProcessorMixin


STAGES = ("alignment", "instructions")
"""The stages of the paper's training."""


def stage_weights(model: PreTrainedModel, encoder: VisualPromptEncoder, stage: str) -> dict[str, nn.Parameter]:
    """What learns in a stage of the paper's training, by name; everything else is frozen.

    The frequencies of the encoder are no weights and never learn, and the image encoder learns in no stage. Names of
    the prompt encoder's weights begin with ``prompts.``.

    Args:
        stage: ``"alignment"``: the prompt encoder, the image projector, word embeddings, the final norm and the head;
            ``"instructions"``: the prompt encoder's projection and its marks, and the language model.

    Raises:
        BadInputError: an unknown stage.
        UnsupportedModelError: not a LLaVA.
    """
    check_llava(model)
    if stage not in STAGES:
        raise BadInputError(f"There is no stage {stage!r}.", f"Stages: {', '.join(STAGES)}.")
    base = model.base_model
    parts: list[nn.Module]
    if stage == "alignment":
        parts = [base.multi_modal_projector, model.get_input_embeddings(), base.language_model.norm, encoder]
    else:
        parts = [base.language_model, encoder.project, encoder.norm, encoder.ends]
    head = model.get_output_embeddings()
    chosen = {id(weight) for part in (*parts, head) for weight in part.parameters()}
    names = {**dict(model.named_parameters()), **{f"prompts.{k}": v for k, v in encoder.named_parameters()}}
    return {name: weight for name, weight in names.items() if id(weight) in chosen}


def check_llava(model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError for all models but LLaVA: where others place image tokens has not been tried."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    if kind != "llava":
        raise UnsupportedModelError(
            f"Visual prompts stand behind the image's tokens of a LLaVA; {type(model).__name__} has not been tried."
        )


def save_prompting(
    encoder: VisualPromptEncoder, folder: Path, changed: Mapping[str, torch.Tensor] | None = None
) -> None:
    """An encoder and the model's weights that were trained with it, by their names.

    Args:
        folder: made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        encoder.save_pretrained(folder)
    save_changed(folder, changed or {})


@contextlib.contextmanager
def prompting(model: PreTrainedModel, folder: str | Path) -> Iterator[VisualPromptEncoder]:
    """Inside the block the model has the weights that were trained with the encoder.

    Args:
        folder: from ``save_prompting``.

    Raises:
        UnsupportedModelError: not a LLaVA.
        BadInputError: there is no trained encoder, or it is for another width.
    """
    check_llava(model)
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise BadInputError(f"There is no visual prompt encoder in {folder}.", "save_prompting writes one.")
    safetensors_file(folder)  # pickles are named as such
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
