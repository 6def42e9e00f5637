"""Slicing of large images: the grid by a plain search, the cells by hand, the order of the tokens by the formula."""

from __future__ import annotations

import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.reduction.tokenpacker.tiles import grids, pack_tiles, select_grid, tile_sequence


def test_all_grids_in_order():
    assert grids(4) == ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (2, 2), (4, 1))
    assert len(grids(9)) == sum(9 // rows for rows in range(1, 10))


@pytest.mark.parametrize(
    ("size", "expected"),
    [((336, 336), (1, 1)), ((336, 672), (1, 2)), ((672, 336), (2, 1)), ((1008, 1008), (3, 3)), ((100, 900), (1, 9))],
)
def test_an_image_gets_the_grid_of_its_form(size, expected):
    assert select_grid(*size) == expected


def test_the_chosen_grid_has_the_best_score():
    """Scores by the definition, with areas counted pixel by pixel."""

    def score(height, width, rows, columns, r):
        ratio = min(rows * r / height, columns * r / width)
        covered = round(height * ratio) * round(width * ratio) / (rows * r * columns * r)
        a, b = torch.zeros(2, 200, 200, dtype=torch.bool)
        a[: rows * r, : columns * r] = True
        b[:height, :width] = True
        return covered + 0.1 * float((a & b).sum() / (a | b).sum())

    for height, width in ((40, 70), (33, 33), (90, 31), (120, 150)):
        scores = {grid: score(height, width, *grid, 32) for grid in grids(6)}
        assert scores[select_grid(height, width, 6, 32)] == pytest.approx(max(scores.values()), abs=1e-6)


def test_cells_put_together_are_the_image():
    image = torch.rand(3, 8, 12)
    tiles = pack_tiles(image, max_cells=6, cell=4)
    assert (tiles.rows, tiles.columns, tiles.thumbnail) == (2, 3, True) and tiles.cells.shape == (7, 3, 4, 4)
    rows = [torch.cat(list(tiles.cells[3 * row : 3 * row + 3]), -1) for row in range(2)]
    assert torch.allclose(torch.cat(rows, -2), image, atol=1e-6)
    thumbnail = tiles.cells[-1]
    assert thumbnail[:, :3].abs().sum() > 0 and not thumbnail[:, 3:].any()  # 8 x 12 becomes 3 x 4 and a row of zeros


def test_one_cell_has_no_thumbnail_and_is_padded():
    tiles = pack_tiles(torch.ones(1, 2, 4), max_cells=1, cell=8)
    assert tiles.cells.shape == (1, 1, 8, 8) and not tiles.thumbnail
    assert (tiles.cells[0, 0, :4] == 1).all() and not tiles.cells[0, 0, 4:].any()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_the_number_of_tokens(rows, columns):
    more, tokens = rows * columns > 1, 5
    cells = [[f"{cell}.{i}" for i in range(tokens)] for cell in range(rows * columns + more)]
    sequence = tile_sequence(cells, rows, columns, ",", "\n")
    assert len(sequence) == rows * columns * tokens + rows * (columns - 1) + rows + more * (tokens + 1)
    assert [item for item in sequence if item not in ",\n"] == [item for cell in cells for item in cell]
    assert sequence.count("\n") == rows + more and sequence[-1] == "\n"


def test_what_is_refused():
    for call, words in (
        (lambda: grids(0), "one cell"),
        (lambda: select_grid(0, 5), "one pixel"),
        (lambda: pack_tiles(torch.zeros(3, 4, 4, dtype=torch.uint8)), "float tensor"),
        (lambda: tile_sequence([[1]], 1, 2, 0, 9), "3 cells"),
    ):
        with pytest.raises(BadInputError, match=words):
            call()
