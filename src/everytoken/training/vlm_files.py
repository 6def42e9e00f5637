"""The tiny model of scenes as a folder that transformers reads: model, tokenizer and image processor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..core.quiet import quiet_transformers
from .datasets.scenes import DEVIATION, IMAGE, MEAN, scene_tokenizer

if TYPE_CHECKING:
    from transformers import LlavaProcessor, PreTrainedModel, ProcessorMixin


def scene_processor(size: int = 64, patch: int = 8) -> LlavaProcessor:
    """Images and texts as LLaVA's processor makes them: images of any size become ``size`` pixels a side.

    Args:
        size: pixels a side.
        patch: pixels a side of a patch; an image has ``(size / patch)^2`` placeholders.
    """
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[MEAN] * 3,
        image_std=[DEVIATION] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=scene_tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,  # the class token, which the strategy "default" takes off again
    )


def save_vlm(model: PreTrainedModel, folder: Path, processor: ProcessorMixin | None = None) -> None:
    """Model and processor into one folder.

    Args:
        model: of ``training.vision``, or any with its processor.
        folder: made where it is missing.
        processor: None makes that of scenes.
    """
    vision = model.config.vision_config
    with quiet_transformers():
        model.save_pretrained(folder)
    (processor or scene_processor(vision.image_size, vision.patch_size)).save_pretrained(folder)
