"""Large images as a grid of cells and a thumbnail, as TokenPacker slices them (arXiv 2407.02392, section 3.3).

An image of H x W pixels is cut into ``rows x columns`` cells of r pixels a side. Of all grids with ``max_cells`` cells
at most, the one is taken that covers most of its area and keeps the image's form::

    a = min(rows r / H, columns r / W)
    S = round(H a) round(W a) / (rows columns r^2)  +  0.1 IoU(grid, image)

with the boxes of grid and image laid on one corner. The image is resized by a, padded with zeros at the bottom or
right, and cut row by row. If there is more than one cell, a thumbnail of the whole image follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch.nn import functional as F

from ...core.errors import BadInputError

OVERLAP = 0.1
"""The weight of the second term."""
Token = TypeVar("Token")


@lru_cache(maxsize=16)
def grids(max_cells: int) -> tuple[tuple[int, int], ...]:
    """All ``(rows, columns)`` with ``max_cells`` cells at most: by number of cells, then by rows.

    Raises:
        BadInputError: fewer than one cell.
    """
    if max_cells < 1:
        raise BadInputError(f"An image has one cell at least; got {max_cells}.")
    found = [(rows, columns) for rows in range(1, max_cells + 1) for columns in range(1, max_cells // rows + 1)]
    return tuple(sorted(found, key=lambda grid: (grid[0] * grid[1], grid[0])))


def select_grid(height: int, width: int, max_cells: int = 9, cell: int = 336) -> tuple[int, int]:
    """The ``(rows, columns)`` of an image; the first of equals.

    Args:
        height, width: of the image, in pixels.
        max_cells: cells at most.
        cell: r, pixels a side of a cell.

    Raises:
        BadInputError: a size below one pixel.
    """
    if min(height, width, cell) < 1:
        raise BadInputError(f"An image has one pixel at least a side; got {height} x {width}, cells of {cell}.")
    return max(grids(max_cells), key=lambda grid: _score((height, width), grid, cell))


def _score(size: tuple[int, int], grid: tuple[int, int], cell: int) -> float:
    (height, width), tall, wide = size, grid[0] * cell, grid[1] * cell
    ratio = min(tall / height, wide / width)
    covered = round(height * ratio) * round(width * ratio) / (tall * wide)
    common = min(tall, height) * min(wide, width)
    return covered + OVERLAP * common / (tall * wide + height * width - common)


@dataclass(frozen=True)
class Tiles:
    """A sliced image.

    Attributes:
        cells: ``[rows columns (+ 1), C, r, r]``, row by row; the thumbnail, where there is one, last.
        rows, columns: of the grid.
    """

    cells: torch.Tensor
    rows: int
    columns: int

    @property
    def thumbnail(self) -> bool:
        """Whether the last cell is the whole image."""
        return self.rows * self.columns > 1


def pack_tiles(image: torch.Tensor, max_cells: int = 9, cell: int = 336) -> Tiles:
    """Slices an image.

    Args:
        image: ``[C, H, W]``, floats.
        max_cells, cell: as for ``select_grid``.

    Raises:
        BadInputError: not such a tensor.
    """
    if image.dim() != 3 or not image.is_floating_point():
        raise BadInputError(f"An image is a float tensor [C, H, W]; got {image.dtype} {tuple(image.shape)}.")
    rows, columns = select_grid(image.shape[1], image.shape[2], max_cells, cell)
    canvas = _fitted(image, rows * cell, columns * cell)
    channels = len(image)
    cells = canvas.reshape(channels, rows, cell, columns, cell).permute(1, 3, 0, 2, 4)
    cells = cells.reshape(rows * columns, channels, cell, cell)
    if rows * columns > 1:
        cells = torch.cat([cells, _fitted(image, cell, cell)[None]])
    return Tiles(cells, rows, columns)


def _fitted(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The image at the top left of a canvas of zeros, as large as its form allows."""
    ratio = min(height / image.shape[1], width / image.shape[2])
    size = (
        min(height, max(1, round(image.shape[1] * ratio))),
        min(width, max(1, round(image.shape[2] * ratio))),
    )
    scaled = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
    return F.pad(scaled, (0, width - size[1], 0, height - size[0]))


def tile_sequence(
    cells: Sequence[Sequence[Token]], rows: int, columns: int, comma: Token, newline: Token
) -> list[Token]:
    """The order in which a sliced image's tokens are read.

    Cells of a row are divided by ``comma``, each row ends with ``newline``; a thumbnail follows with a ``newline``.

    Args:
        cells: the tokens (or embeddings) of each cell, as ``Tiles.cells`` orders them.
        comma, newline: what stands for the text tokens ``,`` and the line's end.

    Raises:
        BadInputError: not as many cells as the grid and its thumbnail have.
    """
    thumbnail = rows * columns > 1
    if len(cells) != rows * columns + thumbnail:
        raise BadInputError(
            f"A grid of {rows} x {columns} has {rows * columns + thumbnail} cells with its thumbnail; got {len(cells)}."
        )
    sequence: list[Token] = []
    for row in range(rows):
        for column in range(columns):
            sequence += [comma] * (column > 0)
            sequence += cells[row * columns + column]
        sequence.append(newline)
    if thumbnail:
        sequence += [*cells[-1], newline]
    return sequence
