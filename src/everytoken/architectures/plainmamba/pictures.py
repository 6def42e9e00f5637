"""Pictures for PlainMamba: what a text or a file shows, and the paths of scans over the grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ...core.charts import COLOURS as LINES
from ...core.charts import inline_image
from ...core.errors import BadInputError, require
from ...training.datasets.scenes import COLOURS, DEVIATION, MEAN, SHAPES, SceneMaker, pixel_values, shape_mask
from ..grid import Grid
from ..selective import Scans

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")


def shape_maker(size: int) -> SceneMaker:
    """One object of random place, colour and shape on a ground with strokes; images of ``size`` pixels a side."""
    return SceneMaker(size=size, side=max(6, round(0.38 * size)), least=1, most=1, clutter=size // 4)


def shape_batch(size: int, count: int, seed: int, *names: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``[B, 3, size, size]`` and the numbers of their shapes ``[B]``, for one named part of a run."""
    scenes = shape_maker(size).draw(count, seed, *names)
    return pixel_values(scenes), torch.tensor([SHAPES.index(scene.things[0].shape) for scene in scenes])


def picture_of(text: str, size: int) -> tuple[torch.Tensor, str | None]:
    """The image that a text names: a file, or a coloured shape, which is drawn on a ground with strokes.

    Args:
        text: a path that ends as images do, or words with a shape and perhaps a colour (``a red disc``).
        size: pixels a side.

    Returns:
        ``[1, 3, size, size]``, and the shape that was asked for or None.

    Raises:
        BadInputError: neither, or no such file.
        MissingExtraError: a file, and pillow is not installed.
    """
    if text.strip().lower().endswith(ENDINGS):
        return read_picture(Path(text.strip()).expanduser(), size), None
    words = text.lower().replace(",", " ").replace(".", " ").split()
    shapes, colours = [word for word in words if word in SHAPES], [word for word in words if word in COLOURS]
    if len(shapes) != 1 or len(colours) > 1:
        raise BadInputError(
            f"{text!r} names no picture.",
            f"Give an image file, or one shape ({', '.join(SHAPES)}) with a colour ({', '.join(COLOURS)}).",
        )
    # of many scenes the first with this shape, so that the picture is like those of the training
    scenes = shape_maker(size).draw(64, 0, "picture", text)
    scene = next((item for item in scenes if item.things[0].shape == shapes[0]), scenes[0])
    thing = scene.things[0]
    if colours:
        top, left, side = thing.top, thing.left, thing.side
        part = scene.pixels[top : top + side, left : left + side]
        part[shape_mask(shapes[0], side)] = COLOURS[colours[0]]
    return pixel_values([scene]), shapes[0]


def read_picture(path: Path, size: int) -> torch.Tensor:
    """An image file as ``[1, 3, size, size]``, normalised as scenes are.

    Raises:
        BadInputError: no such file, or no image.
        MissingExtraError: pillow is not installed.
    """
    require("PIL", "vision", "Reading images")
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise BadInputError(f"There is no image {path}.")
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    except (UnidentifiedImageError, OSError) as error:
        raise BadInputError(f"{path} is no image that can be read: {error}") from error
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()
    return ((pixels / 255 - MEAN) / DEVIATION)[None]


def scan_picture(scans: Scans, grid: Grid, numbers: list[int]) -> str:
    """The paths of scans over the grid, one beside the other, each from a dot to an arrow's end."""
    cell, gap = 18, 24
    height, width = grid[0] * cell, grid[1] * cell
    parts = []
    for place, (order, number) in enumerate(zip(scans.orders.tolist(), numbers, strict=True)):
        left, colour = place * (width + gap), LINES[number % len(LINES)]
        points = [(left + (t % grid[1]) * cell + cell / 2, (t // grid[1]) * cell + cell / 2 + 18) for t in order]
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        parts.append(f'<text x="{left}" y="12" font-size="12" font-family="sans-serif">scan {number + 1}</text>')
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<circle cx="{points[0][0]:g}" cy="{points[0][1]:g}" r="5" fill="{colour}"/>')
        x, y = points[-1]
        parts.append(f'<rect x="{x - 4:g}" y="{y - 4:g}" width="8" height="8" fill="{colour}"/>')
    whole = len(numbers) * (width + gap)
    size = f'width="{whole}" height="{height + 24}" viewBox="0 0 {whole} {height + 24}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><rect width="100%" height="100%" fill="#fcfcfd"/>'
    return inline_image(f"{svg}{''.join(parts)}</svg>", "The scans over the grid, each from its disc to its square.")
