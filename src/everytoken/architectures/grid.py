"""Orders of the tokens of a 2-D grid, with their inverses, and windows.

A grid of H rows and W columns has L = H W tokens; token ``r W + c`` stands in row r and column c. An *order* is a
permutation ``[L]`` of raster indices: ``order[t]`` is the token that comes at position t. Its *inverse* holds the
position of every token, so that ``x[order][inverse] == x``.

====================  ==============================================================================
raster                row by row, each from the left
snake                 row by row, every second one from the right: consecutive tokens are neighbours
strided               all tokens whose row and column leave the same rest by the stride, rest by rest
window                window by window, each in raster order
====================  ==============================================================================

Nothing here is kept between calls: an order takes some microseconds and can be traced by ``torch.compile``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..core.errors import BadInputError

MOVES = ("begin", "right", "left", "up", "down")
"""How a scan reached a token. The first token, and one that is no neighbour of the one before it, is a beginning."""
SCANS = ("snake", "raster")
Grid = tuple[int, int]


class ScanOrders(NamedTuple):
    """The four scans of a grid.

    Attributes:
        orders: ``[4, L]``: rows from the top left, the same backwards, columns from the top left, the same backwards.
        inverses: ``[4, L]``.
        moves: ``[4, L]``, indices into ``MOVES`` by position.
    """

    orders: torch.Tensor
    inverses: torch.Tensor
    moves: torch.Tensor


def check_grid(height: int, width: int) -> None:
    """Raises BadInputError unless both sides are 1 or more."""
    if height < 1 or width < 1:
        raise BadInputError(f"A grid has one row and one column at least; got {height} x {width}.")


def raster_order(height: int, width: int, columns: bool = False, device: torch.device | None = None) -> torch.Tensor:
    """Line by line, each from its beginning: ``[L]``.

    Args:
        columns: lines are columns from the top, not rows from the left.

    Raises:
        BadInputError: an empty grid.
    """
    check_grid(height, width)
    grid = torch.arange(height * width, device=device).view(height, width)
    return (grid.T if columns else grid).reshape(-1)


def snake_order(height: int, width: int, columns: bool = False, device: torch.device | None = None) -> torch.Tensor:
    """Line by line, every second one backwards: ``[L]``; consecutive tokens are neighbours.

    Args:
        columns: lines are columns, the first one downwards.

    Raises:
        BadInputError: an empty grid.
    """
    check_grid(height, width)
    grid = torch.arange(height * width, device=device).view(height, width)
    lines = grid.T if columns else grid
    odd = torch.arange(lines.shape[0], device=device)[:, None] % 2 == 1
    return torch.where(odd, lines.flip(1), lines).reshape(-1)


def strided_order(height: int, width: int, stride: int, device: torch.device | None = None) -> torch.Tensor:
    """All tokens of rest (0, 0) by the stride in raster order, then of rest (0, 1) and so on: ``[L]``.

    Raises:
        BadInputError: an empty grid, or a stride below 1.
    """
    check_grid(height, width)
    if stride < 1:
        raise BadInputError(f"A stride is 1 or more; got {stride}.")
    grid = torch.arange(height * width, device=device).view(height, width)
    rests = [(row, column) for row in range(min(stride, height)) for column in range(min(stride, width))]
    return torch.cat([grid[row::stride, column::stride].reshape(-1) for row, column in rests])


def window_order(height: int, width: int, window: int | Grid, device: torch.device | None = None) -> torch.Tensor:
    """Window by window in raster order, each window in raster order: ``[L]``.

    Args:
        window: rows and columns of a window, or one number for both.

    Raises:
        BadInputError: an empty grid, or windows that do not tile it.
    """
    rows, columns = _window(height, width, window)
    grid = torch.arange(height * width, device=device)
    parts = grid.view(height // rows, rows, width // columns, columns)
    return parts.transpose(1, 2).reshape(-1)


def inverse_order(order: torch.Tensor) -> torch.Tensor:
    """Where every token stands in an order ``[..., L]``."""
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def moves_along(order: torch.Tensor, width: int) -> torch.Tensor:
    """How each position of an order ``[..., L]`` was reached from the one before it, as indices into ``MOVES``."""
    row, column = order // width, order % width
    down, right = row.diff(dim=-1), column.diff(dim=-1)
    found = (right == 1) * 1 + (right == -1) * 2
    found = torch.where(right == 0, (down == -1) * 3 + (down == 1) * 4, found * (down == 0))
    return torch.cat([torch.zeros_like(order[..., :1]), found], -1)


def scan_orders(height: int, width: int, kind: str = "snake", device: torch.device | None = None) -> ScanOrders:
    """Four scans of a grid: along rows, back, along columns, back.

    Args:
        kind: ``"snake"`` turns at the end of a line, ``"raster"`` begins anew.

    Raises:
        BadInputError: an empty grid, or an unknown kind.
    """
    if kind not in SCANS:
        raise BadInputError(f"A scan is {' or '.join(SCANS)}; got {kind!r}.")
    make = snake_order if kind == "snake" else raster_order
    rows, columns = make(height, width, False, device), make(height, width, True, device)
    orders = torch.stack([rows, rows.flip(0), columns, columns.flip(0)])
    return ScanOrders(orders, inverse_order(orders), moves_along(orders, width))


def to_windows(tokens: torch.Tensor, grid: Grid, window: int | Grid) -> torch.Tensor:
    """Tokens ``[B, L, ...]`` of a grid by windows: ``[B, windows, tokens of a window, ...]``.

    Raises:
        BadInputError: tokens that do not fill the grid, or windows that do not tile it.
    """
    rows, columns = _window(*grid, window)
    if tokens.shape[1] != grid[0] * grid[1]:
        raise BadInputError(f"{tokens.shape[1]} tokens do not fill a grid of {grid[0]} x {grid[1]}.")
    order = window_order(*grid, window, tokens.device)
    return tokens[:, order].unflatten(1, (-1, rows * columns))


def from_windows(windows: torch.Tensor, grid: Grid, window: int | Grid) -> torch.Tensor:
    """The inverse of ``to_windows``: ``[B, windows, tokens of a window, ...] -> [B, L, ...]``.

    Raises:
        BadInputError: windows that do not tile the grid.
    """
    rows, columns = _window(*grid, window)
    if windows.shape[1] * windows.shape[2] != grid[0] * grid[1] or windows.shape[2] != rows * columns:
        raise BadInputError(
            f"{windows.shape[1]} windows of {windows.shape[2]} tokens do not make a grid of {grid[0]} x {grid[1]} in "
            f"windows of {rows} x {columns}."
        )
    return windows.flatten(1, 2)[:, inverse_order(window_order(*grid, window, windows.device))]


def _window(height: int, width: int, window: int | Grid) -> Grid:
    """Rows and columns of windows that tile the grid."""
    check_grid(height, width)
    rows, columns = (window, window) if isinstance(window, int) else window
    if min(rows, columns) < 1 or height % rows or width % columns:
        raise BadInputError(
            f"Windows of {rows} x {columns} do not tile a grid of {height} x {width}.", "Take divisors of its sides."
        )
    return rows, columns
