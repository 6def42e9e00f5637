"""A weight matrix of 4 or 8 bits in groups of 32: made exactly from what was 4 or 8 bits before, by rounding otherwise.

A GGUF file of Q4_0, Q4_1 or Q8_0 keeps for each 32 neighbouring weights of a row a step (and a least value) of 16-bit
floats. Its float32 weights lie on those steps, so they lead back to the same integers, steps and least values, whatever
the file called them and however rows were reordered since. Other weights are rounded to the nearest of 16 or 256 steps
between the least and the largest of their group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..errors import UnsupportedModelError
from .vectors import GROUP, TILE

EXACT = 1e-6
"""A weight is reproduced exactly if it differs by no more than this part of its group's largest weight: the rounding of
float32, which a step times an integer and a sum have gone through once."""
LAYOUT = 1
"""Changes with the layout of packed weights: files of another one are not read."""
_ROWS = 4096


@dataclass
class GroupedWeight:
    """A packed weight matrix.

    Attributes:
        bits: 4 or 8.
        shape: ``(N, K)`` of the matrix.
        weights, scales: flat arrays, laid out as ``vectors`` says; rows are padded with zeros to a multiple of 8.
        exact: the share of the groups whose weights are reproduced exactly.
    """

    bits: int
    shape: tuple[int, int]
    weights: np.ndarray
    scales: np.ndarray
    exact: float

    @property
    def rows(self) -> int:
        """Rows with the padding."""
        return -(-self.shape[0] // TILE) * TILE

    def dequantised(self) -> torch.Tensor:
        """The float32 matrix ``[N, K]`` that the packed one stands for."""
        tiles, groups = self.rows // TILE, self.shape[1] // GROUP
        scales = self.scales.view(np.float16).astype(np.float32)
        if self.bits == 8:
            numbers = self.weights.view(np.int8).reshape(tiles, groups, 16, TILE, 2).transpose(0, 3, 1, 2, 4)
            steps = scales.reshape(tiles, groups, TILE).transpose(0, 2, 1)
            least = np.zeros_like(steps)
        else:
            lines = self.weights.view(np.uint16).reshape(tiles, groups, 4, TILE, 2)
            parts = np.stack([lines >> 4 * place & 15 for place in range(4)], 3)  # [tiles, groups, line, place, row, 2]
            numbers = parts.transpose(0, 4, 1, 2, 3, 5)
            steps, least = scales.reshape(tiles, groups, 2, TILE).transpose(2, 0, 3, 1)
        numbers = numbers.reshape(tiles, TILE, groups, GROUP).astype(np.float32)
        values = numbers * steps[..., None] + least[..., None]
        return torch.from_numpy(values.reshape(self.rows, self.shape[1])[: self.shape[0]].copy())


def group_weight(weight: torch.Tensor, bits: int = 4, searched: bool = True) -> GroupedWeight:
    """Packs a float matrix ``[N, K]``.

    Args:
        bits: 4 or 8.
        searched: whether weights of 4 bits are looked for the steps that they may lie on already; where not, all are
            rounded to 16 steps between the least and the largest of their group, which is quicker.

    Raises:
        UnsupportedModelError: rows whose length is no multiple of 32.
    """
    rows, columns = weight.shape
    if columns % GROUP:
        raise UnsupportedModelError(
            f"Weights of {bits} bits come in groups of {GROUP}; a layer here has {columns} inputs.",
            "Load this model with other weights ('as they come' or 'packed').",
        )
    padded = -(-rows // TILE) * TILE
    words, scales, exact = [], [], 0
    for first in range(0, padded, _ROWS):
        part = weight[first : first + _ROWS].detach().float().numpy()
        part = np.pad(part, ((0, -len(part) % TILE), (0, 0))).reshape(-1, columns // GROUP, GROUP)
        numbers, steps, least, same = _on_steps(part, searched) if bits == 4 else _on_bytes(part)
        exact += int(same.sum())
        tiles, groups = len(part) // TILE, columns // GROUP
        steps, least = steps.reshape(tiles, TILE, groups), least.reshape(tiles, TILE, groups)
        if bits == 8:
            packed = numbers.astype(np.int8).reshape(tiles, TILE, groups, 16, 2).transpose(0, 2, 3, 1, 4)
            words.append(np.ascontiguousarray(packed).reshape(-1))
            scales.append(np.ascontiguousarray(steps.transpose(0, 2, 1)).reshape(-1))
        else:
            parts = numbers.astype(np.uint16).reshape(tiles, TILE, groups, 4, 4, 2)
            lines = np.bitwise_or.reduce([parts[..., place, :] << np.uint16(4 * place) for place in range(4)])
            words.append(np.ascontiguousarray(lines.transpose(0, 2, 3, 1, 4)).reshape(-1))
            scales.append(np.ascontiguousarray(np.stack([steps, least]).transpose(1, 3, 0, 2)).reshape(-1))
    total = padded * columns // GROUP
    return GroupedWeight(
        bits,
        (rows, columns),
        np.concatenate(words),
        np.concatenate(scales).astype(np.float16).view(np.uint16),
        exact / total,
    )


def _half(values: np.ndarray) -> np.ndarray:
    """Rounded to 16-bit floats, as steps and least values are kept."""
    return values.astype(np.float16).astype(np.float32)


def _fit(values: np.ndarray, step: np.ndarray, least: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of 16 steps to each weight ``[..., 32]``, and how far the farthest of a group is from it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        numbers = np.where(step[..., None] != 0, (values - least[..., None]) / step[..., None], 0)
    numbers = np.clip(np.rint(numbers), 0, 15)
    return numbers, np.abs(numbers * step[..., None] + least[..., None] - values).max(-1)


def _on_steps(values: np.ndarray, searched: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Integers 0 to 15, steps, least values, and which groups ``[N, G, 32]`` they reproduce exactly.

    Tried are 16 steps from the least to the largest value (Q4_1, and how other weights are rounded); 8 steps from the
    value farthest from zero to zero (Q4_0); and, where neither is exact, fewer steps between least and largest: a group
    need not use them all.
    """
    low, high, size = values.min(-1), values.max(-1), np.abs(values).max(-1)
    least, step = _half(low), _half((high - low) / 15)
    numbers, error = _fit(values, step, least)
    farthest = np.where(-low >= high, low, high)
    tried = [(_half(farthest / -8), _half(farthest))]
    for index in range(1 + 13 if searched else 0):
        open_ = error > EXACT * size
        if not open_.any():
            break
        if index == 0:
            other_step, other_least = tried[0]
        else:
            other_step, other_least = _half((high - low) / (15 - index)), least
        places = np.nonzero(open_)
        more, worse = _fit(values[places], other_step[places], other_least[places])
        better = worse <= EXACT * size[places]
        chosen = tuple(axis[better] for axis in places)
        numbers[chosen], error[chosen] = more[better], worse[better]
        step[chosen], least[chosen] = other_step[places][better], other_least[places][better]
    return numbers, step, least, error <= EXACT * size


def _on_bytes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Integers -127 to 127 and steps, as Q8_0 makes them: from the value farthest from zero."""
    size = np.abs(values).max(-1)
    step = _half(size / 127)
    with np.errstate(divide="ignore", invalid="ignore"):
        numbers = np.where(step[..., None] != 0, np.rint(values / step[..., None]), 0)
    numbers = np.clip(numbers, -127, 127)
    error = np.abs(numbers * step[..., None] - values).max(-1)
    return numbers, step, np.zeros_like(step), error <= EXACT * size
