"""Which visual tokens are left, drawn over the image: what was dropped fades, merged patches share a colour, and the
scores make a heat map.
"""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from ..core.colours import category, shade
from ..core.errors import BadInputError, require

if TYPE_CHECKING:
    import torch

    from .base import Reduction

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
FADED = 0.2
"""How much of a dropped patch shows."""
TINT = 0.45
SIDE = 256
"""Pictures are enlarged to about so many pixels a side."""


def image_of(pixel_values: torch.Tensor) -> Pixels:
    """What the encoder saw, ``[3, H, W]`` however normalised, as ``[H, W, 3]`` bytes stretched to the full range."""
    values = pixel_values.detach().float().cpu()
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low if high > low else 1.0)
    return (scaled.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def _enlarged(pixels: Pixels) -> Pixels:
    factor = max(1, SIDE // max(pixels.shape[:2]))
    return pixels.repeat(factor, 0).repeat(factor, 1)


def _cells(pixels: Pixels, grid: tuple[int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.intp]]:
    """``[H, W]``: the number of the patch that a pixel belongs to."""
    rows = np.arange(pixels.shape[0]) * grid[0] // pixels.shape[0]
    columns = np.arange(pixels.shape[1]) * grid[1] // pixels.shape[1]
    return rows[:, None] * grid[1] + columns[None]


def _rgb(colour: str | None) -> tuple[int, int, int]:
    text = colour or "#ffffff"
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def kept_picture(pixels: Pixels, grid: tuple[int, int], reduction: Reduction) -> Pixels:
    """The image with dropped patches faded to white, and each group of merged patches tinted in its colour.

    Args:
        pixels: ``[H, W, 3]``.
        grid: rows and columns of the features.
        reduction: of ``rows * columns`` tokens.

    Raises:
        BadInputError: a grid that does not fit the reduction.
    """
    if grid[0] * grid[1] != reduction.total:
        raise BadInputError(f"A grid of {grid[0]} x {grid[1]} has no place for {reduction.total} tokens.")
    large = _enlarged(pixels)
    cells = _cells(large, grid)
    groups = reduction.groups().cpu().numpy()
    weights = np.where(groups < 0, FADED, 1.0)[cells][..., None]
    drawn = weights * large + (1 - weights) * 255
    members = np.bincount(groups[groups >= 0], minlength=len(reduction.features))
    colours = np.array([_rgb(category(index)) for index in range(len(members))])
    merged = (groups >= 0) & (members[groups] > 1)
    tint = np.where(merged, TINT, 0.0)[cells][..., None]
    return ((1 - tint) * drawn + tint * colours[groups][cells]).round().astype(np.uint8)


def score_picture(pixels: Pixels, grid: tuple[int, int], reduction: Reduction) -> Pixels:
    """The image below a heat map of the scores.

    Raises:
        BadInputError: a grid that does not fit, or a reduction without scores.
    """
    if reduction.scores is None or grid[0] * grid[1] != reduction.total:
        raise BadInputError("A heat map needs a score for every patch of the grid.")
    scores = reduction.scores.detach().float().cpu().tolist()
    colours = np.array([_rgb(shade(score, min(scores), max(scores))) for score in scores])
    large = _enlarged(pixels)
    return (0.35 * large + 0.65 * colours[_cells(large, grid)]).round().astype(np.uint8)


def picture_html(pixels: Pixels, caption: str) -> str:
    """One picture as a figure for a page; nothing is loaded from anywhere.

    Raises:
        MissingExtraError: pillow is not installed.
    """
    require("PIL", "vision", "Drawing images")
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    text = escape(caption)
    return (
        f'<figure style="display:inline-block;margin:0 1em 1em 0"><img alt="{text}" '
        f'src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
    )


def reduction_html(pixels: Pixels, grid: tuple[int, int], name: str, reduction: Reduction) -> str:
    """The pictures of one reduction: what is left, and the scores where there are any."""
    kept = f"{name}: {len(reduction.features)} of {reduction.total} tokens"
    parts = [picture_html(kept_picture(pixels, grid, reduction), kept)]
    if reduction.scores is not None:
        parts.append(picture_html(score_picture(pixels, grid, reduction), f"{name}: scores"))
    return "".join(parts)
