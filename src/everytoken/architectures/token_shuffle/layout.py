"""Which tokens of a row share a position of the backbone: text tokens have one each, a window of an image has one.

A row holds text and any number of images, each behind its ``<boi>`` and in raster order::

    seven , thick <boi> 3 1 4 1 5 9 2 6 .. <eoi>        tokens
    seven , thick <boi> (3 1 5 9) (4 1 2 6) .. <eoi>    positions

Everything is computed for a whole batch, without a loop over rows or tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.errors import BadInputError
from ..grid import Grid, window_order

Grids = Grid | list[int] | torch.Tensor
"""Rows and columns of all images, or ``[images, 2]`` of each image, row of the batch by row and from left to right."""


@dataclass
class FusedLayout:
    """Tokens ``[B, L]`` and positions ``[B, U]``.

    Attributes:
        image: ``[B, L]``, True for image tokens.
        position: ``[B, L]`` the position of every token.
        piece: ``[B, L]`` its place in its window; 0 for text.
        window: ``[B, L]`` the window's number in its image; -1 for text.
        tokens: ``[B, U, w]`` the tokens of every position; a text token is piece 0, and what follows means nothing.
        fused: ``[B, U]``, True for positions that hold a window.
        mask: ``[B, U]``, True for positions that are no padding.
    """

    image: torch.Tensor
    position: torch.Tensor
    piece: torch.Tensor
    window: torch.Tensor
    tokens: torch.Tensor
    fused: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(
        cls, ids: torch.Tensor, mask: torch.Tensor | None, image: torch.Tensor, grid: Grids, window: Grid, boi: int
    ) -> FusedLayout:
        """The layout of a batch.

        Args:
            ids: ``[B, L]``.
            mask: ``[B, L]``, 0 for padding.
            image: ``[B, L]``, True for image ids.
            grid: of the images.
            window: rows and columns of a window.
            boi: the id before every image.

        Raises:
            BadInputError: an image that does not fill its grid or is not behind ``<boi>``, a grid that windows do not
                tile, or another number of grids than of images.
        """
        real = torch.ones_like(image) if mask is None else mask.bool()
        image = image & real
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        before = torch.nn.functional.pad(image[:, :-1], (1, 0))
        starts = image & ~before
        sides = cls._sides(grid, int(starts.sum()), window, ids.device)
        number = (starts.flatten().cumsum(0).view_as(ids) - 1).clamp_min(0)  # of the image, over the batch
        cls._check(ids, real, image, starts, number, sides, boi)
        start = torch.where(starts, places, -1).cummax(1).values
        rows, columns = window
        width = sides[number, 1] if len(sides) else torch.ones_like(ids)
        offset = torch.where(image, places - start, 0)
        row, column = offset // width, offset % width
        found = (row // rows) * (width // columns) + column // columns
        piece = torch.where(image, (row % rows) * columns + column % columns, 0)
        begun = ((piece == 0) | ~image).cumsum(1) - 1  # positions that began before this token, and its own
        at_start = begun.gather(1, start.clamp_min(0))
        position = torch.where(image, at_start + found, begun)
        length, size = int(position.max()) + 1, rows * columns
        shape = (len(ids), length)
        tokens = position.new_zeros(len(ids), length * size).scatter_(1, position * size + piece, places)
        fused = torch.zeros(shape, dtype=torch.bool, device=ids.device).scatter_(1, position, image)
        there = torch.zeros(shape, dtype=torch.bool, device=ids.device).scatter_(1, position, real)
        return cls(
            image, position, piece, torch.where(image, found, -1), tokens.unflatten(1, (length, size)), fused, there
        )

    @staticmethod
    def _sides(grid: Grids, images: int, window: Grid, device: torch.device) -> torch.Tensor:
        """Rows and columns ``[images, 2]`` of every image."""
        sides = torch.as_tensor(grid, device=device)
        if sides.is_floating_point() or sides.shape not in ((2,), (images, 2)):
            raise BadInputError(
                f"grid is rows and columns, or a pair for each of the {images} images; got {[*sides.shape]}."
            )
        for height, width in sides.view(-1, 2).unique(dim=0).tolist():
            window_order(height, width, window)  # refuses windows that do not tile it
        return sides.expand(images, 2)

    @staticmethod
    def _check(
        ids: torch.Tensor,
        real: torch.Tensor,
        image: torch.Tensor,
        starts: torch.Tensor,
        number: torch.Tensor,
        sides: torch.Tensor,
        boi: int,
    ) -> None:
        if not len(sides):
            return
        counts = torch.bincount(number[image], minlength=len(sides))
        wanted = sides.prod(1)
        if not torch.equal(counts, wanted):
            at = int((counts != wanted).nonzero()[0])
            raise BadInputError(
                f"Image {at} has {int(counts[at])} tokens; its grid of {int(sides[at, 0])} x {int(sides[at, 1])} has "
                f"{int(wanted[at])}."
            )
        marked = torch.nn.functional.pad((ids == boi)[:, :-1] & real[:, :-1], (1, 0))
        if not bool(marked[starts].all()):
            raise BadInputError(f"An image stands directly behind <boi> (id {boi}).")

    @property
    def position_ids(self) -> torch.Tensor:
        """``[B, U]``, counted from a row's first position that is no padding."""
        return (self.mask.cumsum(1) - 1).clamp_min(0)
