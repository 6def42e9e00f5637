"""How many positions a step fixes, and in which blocks: plans for texts of any length.

A schedule by name splits each block of the text by a curve; ``even`` is LLaDA's split, the others fix
``floor(n m(s/S)) - floor(n m((s+1)/S))`` positions at step s, where m is the share that is still open:
linear ``1 - r``, cosine ``cos(pi r / 2)``, pow2 ``1 - r^2``, exp ``1 - n^(r - 1)``, log ``-log r / log n``.
An object with ``plan(length, steps, blocks)`` takes the place of a name where it also chooses blocks and steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch

from ...core.errors import BadInputError, UnknownNameError

CURVES = ("even", "linear", "cosine", "pow2", "pow3", "exp", "log")
Plan = list[list[int]]
"""Blocks from left to right, each a list of how many positions its steps fix."""


@runtime_checkable
class Schedule(Protocol):
    """Chooses blocks and steps itself."""

    def plan(self, length: int, steps: int | None, blocks: int) -> Plan:
        """The blocks of a text of ``length`` open positions; their counts sum to it.

        Args:
            steps: as the user gave them, or None.
            blocks: how many the user asked for.
        """
        ...


def step_counts(count: int, steps: int, curve: str = "even") -> list[int]:
    """How many of ``count`` positions each of ``steps`` steps fixes; sums to ``count``.

    Raises:
        UnknownNameError: an unknown curve.
        BadInputError: no step.
    """
    if curve not in CURVES:
        raise UnknownNameError("schedule", curve, CURVES)
    if steps < 1 or count < 0:
        raise BadInputError(f"{count} positions cannot be fixed in {steps} steps.")
    if curve == "even":
        least, more = divmod(count, steps)
        return [least + (step < more) for step in range(steps)]
    octaves = math.log2(count) if count > 1 else 0.0

    def open_after(step: int) -> int:
        share = step / steps
        if share == 0:
            return count
        left = {
            "linear": 1 - share,
            "cosine": math.cos(math.pi / 2 * share),
            "pow2": 1 - share**2,
            "pow3": 1 - share**3,
            "exp": 1 - 2 ** (-(1 - share) * octaves),
            "log": -math.log2(share) / octaves if octaves else 1 - share,
        }[curve]
        return math.floor(count * min(max(left, 1e-6), 1.0) + 1e-9)

    left = [open_after(step) for step in range(steps)] + [0]
    return [before - after for before, after in pairwise(left)]


def make_plan(schedule: str | Schedule, length: int, steps: int | None, block_length: int | None) -> Plan:
    """The plan of one row.

    Args:
        length: its open positions.
        steps: of the whole text; None takes one a position.
        block_length: None is one block.

    Raises:
        BadInputError: blocks that do not divide the text, steps that do not divide into the blocks, more steps than
            positions, or a plan whose counts do not sum to the text.
    """
    if steps is not None and steps < 1:
        raise BadInputError(f"steps must be at least 1; got {steps}.")
    size = length if block_length is None else block_length
    if size < 1 or length % size:
        raise BadInputError(
            f"Blocks of {size} do not divide a text of {length} positions.", "Change block_length or gen_length."
        )
    blocks = length // size
    if not isinstance(schedule, str):
        found = schedule.plan(length, steps, blocks)
        if sum(map(sum, found)) != length or any(count < 0 for block in found for count in block):
            raise BadInputError(f"{type(schedule).__name__} plans {found} for {length} positions.")
        return found
    steps = length if steps is None else steps
    if steps > length:
        raise BadInputError(f"{steps} steps are more than the {length} positions to write.", "Lower steps.")
    if steps % blocks:
        raise BadInputError(
            f"{steps} steps do not divide into {blocks} blocks.", "Give a multiple, or another block_length."
        )
    return [step_counts(size, steps // blocks, schedule) for _ in range(blocks)]


@dataclass
class Timetable:
    """The plans of a batch as tensors; rows that end early have zeros behind.

    Attributes:
        counts: ``[B, S]``, positions that a step fixes.
        remaining: ``[B, S]``, positions of the step's block that are open after it.
        first, limit: ``[B, S]``, the block's first open position and the one behind its last, counted from the left.
        block_step, block_steps: ``[B, S]``, the step's number in its block, and how many the block has.
        steps: ``[B]``, how many steps each row has.
    """

    counts: torch.Tensor
    remaining: torch.Tensor
    first: torch.Tensor
    limit: torch.Tensor
    block_step: torch.Tensor
    block_steps: torch.Tensor
    steps: torch.Tensor

    @classmethod
    def of(cls, plans: Sequence[Plan], device: torch.device) -> Timetable:
        rows = []
        for plan in plans:
            table, first = [], 0
            for block in plan:
                left = size = sum(block)
                for number, count in enumerate(block):
                    left -= count
                    table.append((count, left, first, first + size, number, len(block)))
                first += size
            rows.append(table)
        steps = torch.tensor([len(table) for table in rows])
        whole = torch.zeros(len(rows), int(steps.max()), 6, dtype=torch.long)
        for row, table in enumerate(rows):
            whole[row, : len(table)] = torch.tensor(table)
            whole[row, len(table) :, 2:4] = table[-1][3]
        whole[..., 5].clamp_(min=1)
        counts, remaining, begin, limit, block_step, block_steps = whole.to(device).unbind(-1)
        return cls(counts, remaining, begin, limit, block_step, block_steps, steps.to(device))
