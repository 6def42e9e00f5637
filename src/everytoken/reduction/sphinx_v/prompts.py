"""Points, boxes, strokes and free-form regions on an image, and their coordinates as the prompt encoder reads them.

The image is thought of as padded to a square of side s = max(H, W), content in the middle. A point in pixels becomes::

    ((x + pad_x) / s, (y + pad_y) / s),      pad_x = floor((s - W) / 2),  pad_y = floor((s - H) / 2)

and a box becomes its two corners. A stroke is drawn freely and stands for its bounding box, or for points on it; a
free-form region (a mask) for its box (``Box.around``), or for points on its edge (``contour_points``).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...core.errors import BadInputError

POINT, BOX = 0, 1
"""Kinds of prompts, as the encoder takes them."""


@dataclass(frozen=True)
class Point:
    """A point, in pixels of the image from its top left corner."""

    x: float
    y: float


@dataclass(frozen=True)
class Box:
    """A box from its top left corner ``(x0, y0)`` to its bottom right one, in pixels of the image."""

    x0: float
    y0: float
    x1: float
    y1: float

    @classmethod
    def around(cls, mask: Mask) -> Box:
        """The smallest box around a free-form region.

        Args:
            mask: ``[H, W]`` bool, True inside the region.

        Raises:
            BadInputError: an empty mask, or one of another shape or type.
        """
        rows, columns = _places(mask)
        return cls(int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)


@dataclass(frozen=True)
class Stroke:
    """A line drawn freely: the points that it passes, in pixels of the image."""

    points: tuple[tuple[float, float], ...]

    def box(self) -> Box:
        """The smallest box around it."""
        xs, ys = zip(*self.points, strict=True)
        return Box(min(xs), min(ys), max(xs), max(ys))

    def along(self, count: int) -> list[Point]:
        """So many points at equal distances along it, its ends included.

        Raises:
            BadInputError: fewer than one point, or a stroke without points.
        """
        if count < 1 or not self.points:
            raise BadInputError(f"A stroke of {len(self.points)} points cannot give {count}.", "Ask for one at least.")
        lengths = [math.dist(a, b) for a, b in zip(self.points, self.points[1:], strict=False)]
        total, found = sum(lengths), []
        for number in range(count):
            rest = total / 2 if count == 1 else total * number / (count - 1)
            place = self.points[-1]
            for (x0, y0), (x1, y1), length in zip(self.points, self.points[1:], lengths, strict=False):
                if rest <= length and length > 0:
                    place = (x0 + (x1 - x0) * rest / length, y0 + (y1 - y0) * rest / length)
                    break
                rest -= length
            found.append(Point(*place))
        return found


VisualPrompt = Point | Box | Stroke
Mask = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


def contour_points(mask: Mask, count: int) -> list[Point]:
    """Points on the edge of a free-form region, at equal angles around its middle.

    Args:
        mask: ``[H, W]`` bool, True inside the region.
        count: how many; a small region may give the same pixel twice, and then fewer.

    Returns:
        Middles of pixels of the edge, those without repetition.

    Raises:
        BadInputError: an empty mask, one of another shape or type, or no point to give.
    """
    if count < 1:
        raise BadInputError(f"A contour has one point at least; got {count}.")
    rows, columns = _places(mask)
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    middle = rows.mean(), columns.mean()
    rows, columns = np.nonzero(mask & ~inside)
    angles = np.arctan2(rows - middle[0], columns - middle[1])
    wanted = -np.pi + 2 * np.pi * np.arange(count) / count
    apart = np.abs((angles[None] - wanted[:, None] + np.pi) % (2 * np.pi) - np.pi)
    chosen = dict.fromkeys(apart.argmin(-1).tolist())
    return [Point(float(columns[place]) + 0.5, float(rows[place]) + 0.5) for place in chosen]


def _places(mask: Mask) -> tuple[np.ndarray[Any, np.dtype[np.intp]], np.ndarray[Any, np.dtype[np.intp]]]:
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise BadInputError(f"A mask is [H, W] of bool; got {mask.dtype} {mask.shape}.")
    rows, columns = np.nonzero(mask)
    if not len(rows):
        raise BadInputError("This mask is empty: it points at nothing.")
    return rows, columns


@dataclass(frozen=True)
class Prompts:
    """The prompts of a batch of images, in P slots each.

    Attributes:
        coordinates: ``[B, P, 4]`` from 0 to 1; a point's last two are 0.
        kinds: ``[B, P]``, ``POINT`` or ``BOX``.
        valid: ``[B, P]``, whether a slot holds a prompt.
    """

    coordinates: torch.Tensor
    kinds: torch.Tensor
    valid: torch.Tensor


def encode_prompts(
    prompts: Sequence[Sequence[VisualPrompt]],
    sizes: Sequence[tuple[int, int]],
    slots: int = 10,
    decimals: int | None = 3,
    empty: int = POINT,
) -> Prompts:
    """The prompts of several images as coordinates; strokes count as their boxes.

    Args:
        prompts: of every image.
        sizes: ``(height, width)`` of every image in pixels, before any resizing.
        slots: P.
        decimals: coordinates are rounded so; None rounds nothing.
        empty: the kind of slots without a prompt, where an image has none; else that of its last prompt.

    Raises:
        BadInputError: more prompts than slots, a box without area or with its corners exchanged, or coordinates that
            are no numbers or lie outside the image. The error names the prompt.
    """
    if len(prompts) != len(sizes):
        raise BadInputError(f"There are prompts of {len(prompts)} images and sizes of {len(sizes)}.")
    shape = (len(prompts), slots)
    coordinates, valid = torch.zeros(*shape, 4), torch.zeros(shape, dtype=torch.bool)
    kinds = torch.full(shape, empty)
    for row, (some, (height, width)) in enumerate(zip(prompts, sizes, strict=True)):
        if len(some) > slots:
            raise BadInputError(f"Image {row} has {len(some)} prompts for {slots} slots.", "Raise max_prompts.")
        if some:  # one kind an image, as in the paper, also where it says nothing
            kinds[row] = POINT if isinstance(some[-1], Point) else BOX
        for slot, prompt in enumerate(some):
            values = _normalised(prompt, height, width)
            kinds[row, slot] = POINT if len(values) == 2 else BOX
            coordinates[row, slot, : len(values)] = torch.tensor(values)
            valid[row, slot] = True
    if decimals is not None:
        coordinates = coordinates.double().round(decimals=decimals).float()
    return Prompts(coordinates, kinds, valid)


def _normalised(prompt: VisualPrompt, height: int, width: int) -> list[float]:
    if isinstance(prompt, Stroke):
        if not prompt.points:
            raise BadInputError("A stroke without points says nothing.")
        prompt = prompt.box()
    pairs = [(prompt.x, prompt.y)] if isinstance(prompt, Point) else [(prompt.x0, prompt.y0), (prompt.x1, prompt.y1)]
    side = max(height, width)
    pad_x, pad_y = (side - width) // 2, (side - height) // 2
    for x, y in pairs:
        if not (math.isfinite(x) and math.isfinite(y)) or not (0 <= x <= width and 0 <= y <= height):
            raise BadInputError(f"{prompt} does not lie in an image of {width} x {height} pixels.")
    if isinstance(prompt, Box) and (prompt.x1 <= prompt.x0 or prompt.y1 <= prompt.y0):
        raise BadInputError(f"{prompt} has no area, or its corners are exchanged.", "Take a Point, or order them.")
    return [value for x, y in pairs for value in ((x + pad_x) / side, (y + pad_y) / side)]


def shaken(box: Box, rng: random.Random, shift: float = 1 / 8, scale: float = 0.15) -> Box:
    """A box as a hasty hand draws it: moved by whole pixels and made larger or smaller.

    Args:
        shift: of the box's sides, at most.
        scale: each side is multiplied by 1 - scale to 1 + scale.

    Raises:
        BadInputError: a shift or scale below 0, or a scale of 1 or more.
    """
    if shift < 0 or not 0 <= scale < 1:
        raise BadInputError(f"shift is 0 or more and scale from 0 to below 1; got {shift} and {scale}.")
    width, height = box.x1 - box.x0, box.y1 - box.y0
    across, down = int(width * shift), int(height * shift)
    x, y = box.x0 + rng.randint(-across, across), box.y0 + rng.randint(-down, down)
    return Box(x, y, x + width * rng.uniform(1 - scale, 1 + scale), y + height * rng.uniform(1 - scale, 1 + scale))
