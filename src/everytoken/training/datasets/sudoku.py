"""Sudokus of four by four: the smallest text whose order matters.

A grid is 16 digits, written row by row; an open cell is a full stop. There are 288 grids: 200 to learn from and 88 held
out. Whether an answer is right can be checked, whatever the order in which it was written.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np

from ...core.errors import BadInputError
from ...core.rng import numpy_generator

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

SIDE, CELLS, LEARNED = 4, 16, 200
TOKENS = ("_", ".", "1", "2", "3", "4")
"""The tokens by id: padding, an open cell, the digits."""
OPEN, FIRST = 1, 2
"""The id of an open cell, and that of the digit 1."""
_ROWS = np.repeat(np.arange(SIDE), SIDE)
_COLUMNS = np.tile(np.arange(SIDE), SIDE)
_UNITS = np.stack([_ROWS, _COLUMNS, _ROWS // 2 * 2 + _COLUMNS // 2])
"""``[3, 16]``: the row, column and box of every cell."""


@lru_cache(maxsize=1)
def all_grids() -> np.ndarray:
    """All 288 grids, ``[288, 16]`` digits 0 to 3, in a fixed order."""
    lines = np.array(list(permutations(range(SIDE))))
    found = []
    for first in lines:
        for second in lines[[not (set(line[:2]) & set(first[:2])) for line in lines]]:
            for third in lines[(lines != first).all(1) & (lines != second).all(1)]:
                fourth = 6 - first - second - third
                grid = np.concatenate([first, second, third, fourth])
                if is_solved(grid[None])[0]:
                    found.append(grid)
    order = np.random.default_rng(0).permutation(len(found))
    return np.array(found)[order]


def is_solved(grids: np.ndarray) -> np.ndarray:
    """``[B]`` bool, whether each row, column and box of grids ``[B, 16]`` of digits 0 to 3 holds every digit once."""
    grids = np.asarray(grids)
    good = ((grids >= 0) & (grids < SIDE)).all(1)
    for unit in _UNITS:
        seen = np.zeros((len(grids), SIDE), int)
        for cell in range(CELLS):
            seen[:, unit[cell]] |= 1 << np.clip(grids[:, cell], 0, SIDE - 1)
        good &= (seen == 2**SIDE - 1).all(1)
    return np.asarray(good)


def grids(held: bool) -> np.ndarray:
    """The grids to learn from, or those held out."""
    return all_grids()[LEARNED:] if held else all_grids()[:LEARNED]


def puzzles(count: int, seed: int, held: bool = True, holes: tuple[int, int] = (6, 10)) -> torch.Tensor:
    """``[count, 16]`` ids of puzzles, each a grid with some cells opened.

    Args:
        held: of the grids that are held out.
        holes: the least and greatest number of open cells.

    Raises:
        BadInputError: more holes than cells.
    """
    import torch

    if not 1 <= holes[0] <= holes[1] <= CELLS:
        raise BadInputError(f"A puzzle has 1 to {CELLS} open cells; got {holes}.")
    rng = numpy_generator(seed, "sudoku", held)
    base = grids(held)
    chosen = base[rng.integers(len(base), size=count)] + FIRST
    open_ = rng.random((count, CELLS)).argsort(1).argsort(1) < rng.integers(holes[0], holes[1] + 1, count)[:, None]
    return torch.from_numpy(np.where(open_, OPEN, chosen))


def solved(ids: torch.Tensor) -> list[float]:
    """1.0 for each row of ids ``[B, 16]`` that is a right grid, else 0.0."""
    found: list[float] = is_solved(ids.cpu().numpy() - FIRST).astype(float).tolist()
    return found


def sudoku_tokenizer() -> PreTrainedTokenizerFast:
    """One token a cell; spaces and line ends between them do not count."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({token: number for number, token in enumerate(TOKENS)}, unk_token="_"))
    core.normalizer = normalizers.Replace(Regex(r"[\s|]"), "")
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="_",
        mask_token=".",
        unk_token="_",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
