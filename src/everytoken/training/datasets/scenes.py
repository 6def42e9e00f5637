"""Scenes of coloured shapes with questions: made anew for every batch, so that nothing can be learnt by heart.

A scene is a square image of dark noise with a few objects that do not overlap. Each has one of six colours and one of
six shapes, and no colour or shape comes twice. A question has two words and its answer one::

    shape? red      ->  disc          (which shape the red object has)
    colour? disc    ->  red
    exists? red     ->  yes | no      (half of them no)
    where? red      ->  top-left | top-right | bottom-left | bottom-right
    number? red     ->  seven         (only in scenes whose objects carry digits)

``where?`` asks only for objects that lie clearly in one quarter. A text is the image's placeholders, then questions
with answers, each followed by the end token.

Everything follows from the seed, the same on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.errors import BadInputError
from ...core.rng import derive_seed

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerFast

COLOURS = {
    "red": (225, 45, 45),
    "green": (40, 190, 60),
    "blue": (60, 90, 240),
    "yellow": (235, 215, 50),
    "magenta": (215, 60, 215),
    "cyan": (50, 210, 220),
}
"""Colours by name, as red, green and blue from 0 to 255."""
SHAPES = ("square", "disc", "triangle", "cross", "ring", "bar")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
KINDS = ("shape?", "colour?", "exists?", "where?")
"""What is asked of every scene; scenes with digits are asked ``number?`` too."""
NUMBER, WHAT = "number?", "what?"
PAD, START, END, IMAGE = "<pad>", "<s>", "</s>", "<image>"
PROMPT, PROMPTS_BEGIN, PROMPTS_END = "<prompt>", "<prompts>", "</prompts>"
WORDS = (PAD, START, END, IMAGE, *COLOURS, *SHAPES, *KINDS, "yes", "no", *PLACES, *DIGITS, NUMBER, WHAT,
         PROMPT, PROMPTS_BEGIN, PROMPTS_END)  # fmt: skip
"""The vocabulary; a word's id is its place."""
IDS = {word: index for index, word in enumerate(WORDS)}
CLEAR = 4
"""An object lies clearly in a quarter if its centre is so many pixels from both middle lines (of 64; in proportion)."""
MEAN, DEVIATION = 0.25, 0.25
"""Pixels from 0 to 1 are made alike by these, as the shipped processor does."""
# digits of seven strokes, as on a calculator: top, top left, top right, middle, bottom left, bottom right, bottom
_STROKES = (
    "1110111",
    "0010010",
    "1011101",
    "1011011",
    "0111010",
    "1101011",
    "1101111",
    "1010010",
    "1111111",
    "1111011",
)
Mask = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Labels = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True)
class Thing:
    """One object: a colour, a shape, the pixels of its box, and the digit on it or None."""

    colour: str
    shape: str
    top: int
    left: int
    side: int
    digit: str | None = None

    @property
    def box(self) -> tuple[int, int, int, int]:
        """``(x0, y0, x1, y1)`` in pixels; the last row and column do not belong to it."""
        return self.left, self.top, self.left + self.side, self.top + self.side

    @property
    def centre(self) -> tuple[float, float]:
        """``(x, y)`` in pixels."""
        return self.left + self.side / 2, self.top + self.side / 2


@dataclass(frozen=True)
class Question:
    """Two words and the answer's one."""

    kind: str
    about: str
    answer: str

    @property
    def text(self) -> str:
        """The question as the shipped processor takes it, with the image's place before it."""
        return f"{IMAGE} {self.kind} {self.about}"

    @property
    def ids(self) -> list[int]:
        """Question, answer, end."""
        return [IDS[self.kind], IDS[self.about], IDS[self.answer], IDS[END]]


@dataclass(frozen=True)
class Scene:
    """Pixels ``[size, size, 3]`` and what is in them."""

    pixels: Pixels = field(repr=False)
    things: tuple[Thing, ...]

    @property
    def size(self) -> int:
        return int(self.pixels.shape[0])

    def image(self) -> Image:
        """The scene for PIL."""
        from PIL import Image as image

        return image.fromarray(self.pixels, "RGB")

    def place(self, thing: Thing) -> str | None:
        """The quarter in which a thing lies; None where that is not clear."""
        x, y = thing.centre
        middle, clear = self.size / 2, CLEAR * self.size / 64
        if abs(x - middle) < clear or abs(y - middle) < clear:
            return None
        return PLACES[2 * (y > middle) + (x > middle)]

    def ask(self, rng: random.Random, kind: str | None = None) -> Question:
        """A question about this scene.

        Args:
            kind: of ``KINDS``, or ``number?`` for scenes with digits; None draws one.

        Raises:
            BadInputError: no such kind, or a number of a scene without digits.
        """
        numbered = self.things[0].digit is not None
        known = (*KINDS, NUMBER) if numbered else KINDS
        if kind is not None and kind not in known:
            raise BadInputError(f"This scene has no question {kind!r}.", f"It has: {', '.join(known)}.")
        chosen = kind or rng.choice(known)
        thing = rng.choice(self.things)
        if chosen == "where?":
            clear = [item for item in self.things if self.place(item) is not None]
            if clear:
                thing = rng.choice(clear)
                return Question(chosen, thing.colour, str(self.place(thing)))
            chosen = "shape?"  # nothing lies clearly in one quarter: ask for what is there
        if chosen == "exists?":
            there = [item.colour for item in self.things]
            absent = [colour for colour in COLOURS if colour not in there]
            if absent and rng.random() < 0.5:
                return Question(chosen, rng.choice(absent), "no")
            return Question(chosen, thing.colour, "yes")
        if chosen == "colour?":
            return Question(chosen, thing.shape, thing.colour)
        if chosen == NUMBER:
            return Question(chosen, thing.colour, str(thing.digit))
        return Question(chosen, thing.colour, thing.shape)


@dataclass(frozen=True)
class SceneMaker:
    """How scenes look.

    Args:
        size: pixels a side of the image.
        side: pixels a side of an object.
        least, most: how many objects.
        digits: every object carries a digit of strokes of two pixels.
        clutter: short grey strokes on the ground.

    Raises:
        BadInputError: objects that do not fit, or more than there are colours.
    """

    size: int = 64
    side: int = 14
    least: int = 3
    most: int = 5
    digits: bool = False
    clutter: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most <= len(SHAPES):
            raise BadInputError(
                f"A scene has from 1 to {len(SHAPES)} objects; got {self.least} to {self.most}.",
                "No colour and no shape comes twice.",
            )
        if self.side < 6 or self.most * (2 * self.side) ** 2 > 1.3 * self.size**2:
            raise BadInputError(
                f"{self.most} objects of {self.side} pixels do not fit into {self.size} x {self.size}.",
                "Take fewer or smaller ones (6 pixels at least), or a larger image.",
            )
        if self.digits and self.side < 20:
            raise BadInputError(f"A digit needs an object of 20 pixels; got {self.side}.", "Take a larger side.")
        if self.clutter < 0:
            raise BadInputError(f"clutter must not be negative; got {self.clutter}.")

    def draw(self, count: int, seed: int, *names: object) -> list[Scene]:
        """Scenes of one named part of a run.

        Args:
            count: how many.
            seed, names: as for ``core.rng.derive_seed``.
        """
        number = derive_seed(seed, "scenes", *names)
        rng, noise = random.Random(number), np.random.default_rng(number)
        grounds = noise.integers(0, 48, (count, self.size, self.size, 3), dtype=np.uint8)
        return [self._scene(ground, rng, noise) for ground in grounds]

    def _scene(self, pixels: Pixels, rng: random.Random, noise: np.random.Generator) -> Scene:
        count = rng.randint(self.least, self.most)
        for _ in range(self.clutter):
            row, column, length = rng.randrange(self.size), rng.randrange(self.size), rng.randint(3, 9)
            grey = rng.randint(70, 130)
            if rng.random() < 0.5:
                pixels[row, column : column + length] = grey
            else:
                pixels[row : row + length, column] = grey
        things = []
        for (top, left), colour, shape in zip(
            self._places(count, rng), rng.sample(list(COLOURS), count), rng.sample(SHAPES, count), strict=True
        ):
            mask = shape_mask(shape, self.side)
            part = pixels[top : top + self.side, left : left + self.side]
            part[mask] = np.array(COLOURS[colour]) + noise.integers(-15, 16, (int(mask.sum()), 3))
            digit = None
            if self.digits:
                number = rng.randrange(10)
                plate, stroke = digit_masks(number)
                row, column = (self.side - plate.shape[0]) // 2, (self.side - plate.shape[1]) // 2
                inside = part[row : row + plate.shape[0], column : column + plate.shape[1]]
                inside[plate], inside[stroke] = 12, 245
                digit = DIGITS[number]
            things.append(Thing(colour, shape, top, left, self.side, digit))
        return Scene(pixels, tuple(things))

    def _places(self, count: int, rng: random.Random) -> list[tuple[int, int]]:
        """Corners of boxes that do not overlap."""
        while True:
            found: list[tuple[int, int]] = []
            for _ in range(60):
                top, left = rng.randint(0, self.size - self.side), rng.randint(0, self.size - self.side)
                if all(abs(top - t) >= self.side or abs(left - lef) >= self.side for t, lef in found):
                    found.append((top, left))
                    if len(found) == count:
                        return found


@lru_cache(maxsize=64)
def shape_mask(shape: str, side: int) -> Mask:
    """The pixels ``[side, side]`` of a shape in its box."""
    centre = (side - 1) / 2
    rows, columns = np.mgrid[:side, :side] - centre
    radius, third = side / 2, side / 6
    distance = np.hypot(rows, columns)
    masks: dict[str, Mask] = {
        "square": np.ones((side, side), bool),
        "disc": distance <= radius,
        "triangle": np.abs(columns) <= (rows + radius) / 2,
        "cross": (np.abs(rows) <= third) | (np.abs(columns) <= third),
        "ring": (distance <= radius) & (distance >= 0.55 * radius),
        "bar": np.abs(rows) <= third,
    }
    mask = masks[shape]
    mask.setflags(write=False)
    return mask


@lru_cache(maxsize=10)
def digit_masks(digit: int) -> tuple[Mask, Mask]:
    """A plate ``[14, 10]`` and, inside it, the digit's strokes of two pixels."""
    plate, strokes = np.ones((14, 10), bool), np.zeros((14, 10), bool)
    boxes = ((2, 4, 2, 8), (2, 7, 2, 4), (2, 7, 6, 8), (6, 8, 2, 8), (7, 12, 2, 4), (7, 12, 6, 8), (10, 12, 2, 8))
    for on, (top, bottom, left, right) in zip(_STROKES[digit], boxes, strict=True):
        strokes[top:bottom, left:right] |= on == "1"
    for mask in (plate, strokes):
        mask.setflags(write=False)
    return plate, strokes


# -- tensors ----------------------------------------------------------------------------------------------------------
def pixel_values(scenes: Sequence[Scene]) -> torch.Tensor:
    """The scenes as an encoder reads them: ``[B, 3, size, size]``, what the shipped processor makes of their images."""
    import torch

    stacked = torch.from_numpy(np.stack([scene.pixels for scene in scenes]))
    return (stacked.permute(0, 3, 1, 2).float() / 255 - MEAN) / DEVIATION


def patch_labels(scenes: Sequence[Scene], patch: int, least: int = 8) -> tuple[Labels, Labels, Labels]:
    """What lies in every patch: colour, shape and quarter ``[B, patches]``, by their order in ``COLOURS``, ``SHAPES``
    and ``PLACES``.

    Args:
        patch: pixels a side.
        least: pixels of an object that a patch must have more of; others get -1, and so does the quarter of an object
            that lies clearly in none.
    """
    side = scenes[0].size // patch
    colours, shapes, quarters = np.full((3, len(scenes), side * side), -1)
    order = list(COLOURS)
    for row, scene in enumerate(scenes):
        most = np.full(side * side, least)
        for thing in scene.things:
            whole = np.zeros((scene.size, scene.size), bool)
            left, top, right, bottom = thing.box
            whole[top:bottom, left:right] = shape_mask(thing.shape, thing.side)
            counts = whole.reshape(side, patch, side, patch).sum((1, 3)).reshape(-1)
            here = counts > most
            most[here] = counts[here]
            colours[row, here], shapes[row, here] = order.index(thing.colour), SHAPES.index(thing.shape)
            place = scene.place(thing)
            quarters[row, here] = -1 if place is None else PLACES.index(place)
    return colours, shapes, quarters


def question_batch(
    scenes: Sequence[Scene], questions: Sequence[Sequence[Question]], image_tokens: int
) -> dict[str, torch.Tensor]:
    """Rows that a vision-language model learns from, by the names of its arguments.

    Args:
        questions: of every scene, as many of each.
        image_tokens: placeholders of an image.

    Returns:
        ``pixel_values [B, 3, size, size]``, ``input_ids [B, T]``, ``attention_mask [B, T]`` and ``labels [B, T]``,
        which are -100 but at answers and end tokens.
    """
    import torch

    rows = torch.tensor([[token for item in asked for token in item.ids] for asked in questions])
    images = torch.full((len(scenes), image_tokens), IDS[IMAGE])
    ids = torch.cat([images, rows], 1)
    answered = torch.tensor([False, False, True, True]).repeat(rows.shape[1] // 4)
    labels = torch.cat([torch.full_like(images, -100), rows.masked_fill(~answered, -100)], 1)
    return {
        "pixel_values": pixel_values(scenes),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
    }


def scene_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of scenes: one token a word of ``WORDS``, words divided by white space."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(dict(IDS), unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options: dict[str, Any] = {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=PAD,
        bos_token=START,
        eos_token=END,
        additional_special_tokens=[IMAGE, PROMPT, PROMPTS_BEGIN, PROMPTS_END],
        **options,
    )
