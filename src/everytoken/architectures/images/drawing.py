"""The part of the station's contract that all methods share that draw images of a class.

A method inherits ``ImageMethod``, says how it draws, and has the rest: ``everytoken try NAME --set label=7`` shows the
image as it grows in the terminal, ``--trace FILE.html`` has a slider over its steps, and ``--set picture=FILE.png``
writes it::

    @dataclass
    class MyMethod(ImageMethod):
        declares = Network(MyConfig, MyModel, columns=("entity",), auto="AutoModel", lacks=NO_TEXT)

        def draw(self, model, labels, seed) -> Drawing: ...
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from transformers import PreTrainedModel

from ...core.errors import BadInputError
from ...core.trace import TokenTrace
from ..base import Architecture, Observation
from .data import CLASSES
from .metrics import features_of
from .pictures import beside, half_blocks, image_html, shaded, slider, tiled, write_png

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_IMAGES = "it draws images"
NO_TEXT: dict[str, str] = {
    "generate": "it draws images by a generate of its own",
    "cache": "its cache is of its own generate, whose tests compare both ways",
    "padding": "images of one size have no padding",
    "inputs_embeds": _IMAGES,
    "sft": _IMAGES,
}
"""What networks that read and draw images lack of the battery's features."""
SHOWN = 6
"""Pictures of the growing image beside each other in the terminal, at most."""


@dataclass
class Drawing:
    """What a method drew.

    Attributes:
        images: ``[B, channels, height, width]`` from -1 to 1.
        frames: the first image ``[channels, height, width]`` after each step.
        steps: what each frame is, in words.
        trace: of the first image, with the columns that the method declares.
        figures: name with unit -> value.
        notes: sentences worth saying.
    """

    images: torch.Tensor
    frames: list[torch.Tensor]
    steps: list[str]
    trace: TokenTrace
    figures: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class ImageMethod(Architecture):
    """Draws images of a class.

    Args:
        label: the class.
        count: how many images; the first one is shown as it grows.
        seed: of the noise.
        picture: a PNG file to write, or None.

    Raises:
        BadInputError: a count below 1, a negative label or seed, or a picture that is no PNG.
    """

    label: int = 7
    count: int = 4
    seed: int = 0
    picture: str | None = None
    classes: ClassVar[int] = CLASSES
    example: ClassVar[str] = ""
    headline: ClassVar[str] = "images per second"

    def __post_init__(self) -> None:
        if self.count < 1 or self.seed < 0:
            raise BadInputError(f"count is 1 or more and seed 0 or more; got {self.count} and {self.seed}.")
        if not 0 <= self.label < self.classes:
            raise BadInputError(f"label lies from 0 to {self.classes - 1}; got {self.label}.")
        if self.picture is not None and not self.picture.lower().endswith(".png"):
            raise BadInputError(f"A picture is written as PNG; got {self.picture}.", "Give a name that ends in .png.")

    def draw(self, model: PreTrainedModel, labels: torch.Tensor, seed: int) -> Drawing:
        """Images of labels ``[B]``."""
        raise NotImplementedError(f"{type(self).__name__} draws nothing.")

    def labels_of(self, text: str) -> torch.Tensor:
        """The labels of a trial: those of the settings, or the class that the text is.

        Raises:
            BadInputError: a text that is no class.
        """
        if not text.strip():
            return torch.full((self.count,), self.label)
        if not (text.strip().isdecimal() and int(text) < self.classes):
            raise BadInputError(
                f"{text!r} names no class.", f"Give a number from 0 to {self.classes - 1}, or --set label=7."
            )
        return torch.full((self.count,), int(text))

    def observe(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, text: str, new_tokens: int = 0
    ) -> Observation:
        labels = self.labels_of(text)
        began = time.perf_counter()
        drawn = self.draw(model, labels, self.seed)
        seconds = time.perf_counter() - began
        figures = {"images per second": len(drawn.images) / seconds, **drawn.figures}
        if drawn.images.shape[1] == 1 and self.classes == CLASSES and bool(drawn.images.isfinite().all()):
            right = features_of(drawn.images)[1].argmax(-1) == labels.cpu()
            figures["right digits"] = float(right.float().mean())
        pictures = [slider(drawn.frames, drawn.steps, f"step by step, label {int(labels[0])}")]
        if len(drawn.images) > 1:
            pictures.append(image_html(tiled(drawn.images), f"{len(drawn.images)} images"))
        if self.picture is not None:
            write_png(tiled(drawn.images), Path(self.picture), 8)
        return Observation(
            [drawn.trace], figures, pictures=pictures, notes=drawn.notes, drawing=growing(drawn.frames, drawn.steps)
        )


def growing(frames: list[torch.Tensor], steps: list[str], colour: bool | None = None) -> str:
    """Some frames, the last one among them, beside each other with a line of words above: text for a terminal.

    Args:
        colour: half-blocks in true colours in place of shades; None asks the terminal.
    """
    last = len(frames) - 1
    side = frames[0].shape[-1]
    room = shutil.get_terminal_size((100, 24)).columns // (2 * side + 3)
    count = min(SHOWN, len(frames), max(2, room))
    chosen = sorted({round(number * last / max(1, count - 1)) for number in range(count)}) if count > 1 else [last]
    if colour is None:
        colour = sys.stdout.isatty() and os.environ.get("COLORTERM") in ("truecolor", "24bit")
        colour = colour and "NO_COLOR" not in os.environ
    if colour:
        words = " ".join(f"{steps[number][:side]:<{side}}" for number in chosen)
        return f"{words}\n{half_blocks(tiled(torch.stack([frames[number] for number in chosen]), len(chosen)))}"
    width = 2 * side
    return beside([f"{steps[number][:width]:<{width}}\n{shaded(frames[number])}" for number in chosen])
