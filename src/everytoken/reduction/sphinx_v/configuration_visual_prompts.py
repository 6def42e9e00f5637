"""The shape of a visual prompt encoder."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ...core.errors import BadInputError


class VisualPromptConfig(PreTrainedConfig):
    """The shape of a visual prompt encoder.

    Args:
        hidden_size: d, the language model's width.
        width: c, of the encoder; even, and tokens have 2c before the projection.
        max_prompts: P, slots an image.
        fourier_scale: deviation of the random frequencies.
        coordinate_shift: added to all coordinates. The released weights were trained with 0.5.
        drop_empty: leave slots without a prompt out instead of filling them with vectors that say so.

    Raises:
        BadInputError: a value out of range.
    """

    model_type = "visual_prompt_encoder"

    def __init__(
        self,
        hidden_size: int = 4096,
        width: int = 256,
        max_prompts: int = 10,
        fourier_scale: float = 1.0,
        coordinate_shift: float = 0.0,
        drop_empty: bool = False,
        **kwargs: Any,
    ):
        if hidden_size < 1 or width < 2 or width % 2 or max_prompts < 1 or fourier_scale <= 0:
            raise BadInputError(
                "A visual prompt encoder has an even width, one slot at least and a positive fourier_scale; got "
                f"{width}, {max_prompts} and {fourier_scale}."
            )
        self.hidden_size, self.width, self.max_prompts = hidden_size, width, max_prompts
        self.fourier_scale, self.coordinate_shift, self.drop_empty = fourier_scale, coordinate_shift, drop_empty
        super().__init__(**kwargs)
