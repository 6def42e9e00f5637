"""Orders of a grid are permutations whose inverses restore, and scans move as they say."""

from __future__ import annotations

import itertools

import pytest
import torch

from everytoken.architectures.grid import (
    MOVES,
    from_windows,
    inverse_order,
    moves_along,
    raster_order,
    scan_orders,
    snake_order,
    strided_order,
    to_windows,
    window_order,
)
from everytoken.core.errors import BadInputError

SIZES = list(itertools.product(range(1, 9), repeat=2))
STEPS = {"right": (0, 1), "left": (0, -1), "up": (-1, 0), "down": (1, 0)}


def test_the_example_of_three_rows_and_four_columns():
    orders, _, moves = scan_orders(3, 4)
    assert orders[0].tolist() == [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11]
    assert moves[0].tolist() == [0, 1, 1, 1, 4, 2, 2, 2, 4, 1, 1, 1]
    assert orders[2].tolist() == [0, 4, 8, 9, 5, 1, 2, 6, 10, 11, 7, 3]


def test_snakes_go_from_neighbour_to_neighbour_in_every_grid_up_to_eight():
    opposite = torch.tensor([0, 2, 1, 4, 3])
    for height, width in SIZES:
        orders, inverses, moves = scan_orders(height, width)
        for order, inverse, move in zip(orders, inverses, moves, strict=True):
            assert sorted(order.tolist()) == list(range(height * width))
            assert torch.equal(order[inverse], torch.arange(height * width))
            assert move[0] == 0
            places = [(int(token) // width, int(token) % width) for token in order]
            for (row, column), (next_row, next_column), step in zip(places, places[1:], move[1:], strict=False):
                assert (next_row - row, next_column - column) == STEPS[MOVES[step]]
        assert torch.equal(orders[1], orders[0].flip(0))
        assert torch.equal(orders[3], orders[2].flip(0))
        assert torch.equal(moves[1, 1:], opposite[moves[0, 1:].flip(0)])
        assert torch.equal(moves[3, 1:], opposite[moves[2, 1:].flip(0)])


def test_raster_scans_begin_anew_at_every_line():
    orders, inverses, moves = scan_orders(3, 4, "raster")
    assert orders[0].tolist() == list(range(12))
    assert moves[0].tolist() == [0, 1, 1, 1] * 3
    assert moves[1].tolist() == [0, 2, 2, 2] * 3
    assert moves[2].tolist() == [0, 4, 4] * 4
    assert torch.equal(orders.gather(1, inverses), torch.arange(12).expand(4, -1))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 6), (6, 1), (4, 6), (5, 3)])
def test_every_order_is_a_permutation_and_its_inverse_restores(height, width):
    x = torch.randn(height * width, 2)
    orders = [raster_order(height, width, True), snake_order(height, width, True)]
    orders += [strided_order(height, width, stride) for stride in (1, 2, 3, 7)]
    orders += [window_order(height, width, (height, 1)), window_order(height, width, (1, width))]
    for order in orders:
        assert sorted(order.tolist()) == list(range(height * width))
        assert torch.equal(x[order][inverse_order(order)], x)


def test_strided_and_window_orders_by_hand():
    assert strided_order(2, 4, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert strided_order(3, 3, 2).tolist() == [0, 2, 6, 8, 1, 7, 3, 5, 4]
    assert window_order(4, 4, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert window_order(2, 6, (2, 3)).tolist() == [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]


def test_a_move_that_is_no_step_is_a_beginning():
    order = torch.tensor([0, 4, 1, 3, 5])  # knights' moves and jumps in a grid of three columns
    assert moves_along(order, 3).tolist() == [0, 0, 3, 0, 0]


def test_windows_and_back_with_gradients():
    x = torch.randn(2, 24, 3, requires_grad=True)
    windows = to_windows(x, (4, 6), (2, 3))
    assert windows.shape == (2, 4, 6, 3)
    assert torch.equal(windows[0, 1], x[0, [3, 4, 5, 9, 10, 11]])
    back = from_windows(windows, (4, 6), (2, 3))
    assert torch.equal(back, x)
    weights = torch.randn_like(x)
    (back * weights).sum().backward()
    assert torch.equal(x.grad, weights)


@pytest.mark.parametrize(
    "call",
    [
        lambda: scan_orders(0, 3),
        lambda: scan_orders(3, 3, "spiral"),
        lambda: strided_order(3, 3, 0),
        lambda: window_order(4, 4, 3),
        lambda: to_windows(torch.zeros(1, 5, 1), (2, 3), 1),
        lambda: from_windows(torch.zeros(1, 4, 3, 1), (2, 6), (2, 3)),
    ],
)
def test_bad_grids_are_refused(call):
    with pytest.raises(BadInputError):
        call()
