"""Vision-language models and their processors: a hub id, a local folder, or the tiny one that ships.

The shipped model (``scenes-vlm``) is a LLaVA of 0.7 million weights that answers questions about coloured shapes. It
knows nothing else: it is there so that everything about images runs offline, in seconds, on transformers' own classes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .converted import check_model_name
from .errors import BadInputError, UnsupportedModelError, require
from .loading import check_loading, hub_error, read_pretrained
from .quiet import quiet_transformers
from .weights import weights_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

EMBEDDED_VLM = "scenes-vlm"


def resolve_vlm(model: str | os.PathLike[str] | None = None) -> str:
    """What to pass to ``from_pretrained``: a hub id or a folder.

    Args:
        model: None or ``"scenes-vlm"`` for the shipped model, a hub id, or a folder.

    Raises:
        BadInputError: a path that does not exist or holds no model, or a GGUF file.
    """
    if model is None or str(model) == EMBEDDED_VLM:
        return str(weights_folder(EMBEDDED_VLM))
    text = os.fspath(model)
    if text.endswith(".gguf"):
        raise BadInputError(
            "A GGUF file holds no image encoder that transformers reads.", "Give a hub id (owner/name) or a folder."
        )
    check_model_name(text)
    path = Path(text).expanduser()
    return str(path) if path.is_dir() else text


def load_vlm(
    model: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """A vision-language model in evaluation mode. Its weights are read from safetensors, never from a pickle.

    ::

        model, processor = load_vlm(), load_processor()
        inputs = processor(images=image, text="<image> shape? red", return_tensors="pt")
        print(processor.decode(model.generate(**inputs, max_new_tokens=2)[0, -2:]))

    Args:
        model: None for the shipped tiny model, a hub id, or a local folder.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, a torch dtype, or ``"auto"`` (as stored).
        device: where to put it; default CPU, or CUDA if there is one.
        trust_remote_code: run code that a hub repository or folder brings; off unless you ask.
        kwargs: passed on to ``AutoModelForImageTextToText.from_pretrained``.

    Raises:
        BadInputError: an unknown dtype or path; weights that are pickles only; a model that needs code of its own.
        UnsupportedModelError: a model that reads no images.
        EverytokenError: the hub cannot be reached, or has no such model.
    """
    check_loading(dtype, kwargs)
    name = resolve_vlm(model)
    unknown = UnsupportedModelError(
        f"{name!r} is no vision-language model that transformers knows.",
        "load_model reads language models without images.",
    )
    return read_pretrained("AutoModelForImageTextToText", name, dtype, device, trust_remote_code, kwargs, unknown)


def load_processor(
    model: str | os.PathLike[str] | None = None, trust_remote_code: bool = False, **kwargs: Any
) -> ProcessorMixin:
    """The processor of a vision-language model: ``processor(images=..., text=..., return_tensors="pt")``.

    Args:
        model, trust_remote_code: as for ``load_vlm``.
        kwargs: passed on to ``AutoProcessor.from_pretrained``.

    Raises:
        MissingExtraError: pillow is not installed.
        BadInputError: an unknown path, or a processor that needs code of its own.
        EverytokenError: the hub cannot be reached, or has no such model.
    """
    name = resolve_vlm(model)
    require("PIL", "vision", "Reading images")
    from transformers import AutoProcessor

    try:
        with quiet_transformers():
            return AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs)
    except (OSError, ValueError) as error:
        raise hub_error(name, error) from error


def with_image_token(processor: ProcessorMixin, prompt: str, images: int = 1) -> str:
    """A prompt with the processor's image token in front, once an image; a prompt that has them stays as it is.

    Raises:
        BadInputError: a processor without an image token, or a prompt with another number of them.
    """
    token = getattr(processor, "image_token", None)
    if token is None:
        raise BadInputError(f"{type(processor).__name__} names no image token.")
    found = prompt.count(token)
    if found not in (0, images):
        raise BadInputError(
            f"The prompt has {found} image tokens for {images} images.", f"Write {token} once an image."
        )
    return prompt if found else " ".join([*[token] * images, prompt])


def chat_prompt(processor: ProcessorMixin, prompt: str, images: int = 1) -> str:
    """A user's turn with images, as the processor's chat template has it; without one the prompt behind image tokens.

    Raises:
        BadInputError: see ``with_image_token``.
    """
    if not getattr(processor, "chat_template", None):
        return with_image_token(processor, prompt, images) if images else prompt
    content = [*[{"type": "image"}] * images, {"type": "text", "text": prompt}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
