"""Data columns in batches, whatever collator makes the batch: each value follows its response token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..core.errors import BadInputError

SIDES = ("chosen", "rejected")
Row = dict[str, Any]


@dataclass
class ColumnCollator:
    """Adds ``column/NAME``, ``[2B, T]`` float32 and 0 outside the responses, to another collator's batches.

    Columns are cut as the rows were: values go where ``completion_mask`` says, after a look at which tokens were kept.

    Args:
        collate: TRL's collator, a subclass of it, or any function of rows that returns ``input_ids`` and
            ``completion_mask``, ``[2B, T]``, chosen rows first.
        columns: names of the columns; those that the rows lack are left out.
    """

    collate: Callable[[list[Row]], Row]
    columns: tuple[str, ...]

    def __call__(self, examples: list[Row]) -> Row:
        """The other collator's batch, with the columns.

        Raises:
            BadInputError: the batch does not say where the responses are, or holds other tokens than the rows.
        """
        names = [name for name in self.columns if f"chosen_{name}" in examples[0]]
        batch = self.collate(examples)
        if not names:
            return batch
        ids, mask = batch.get("input_ids"), batch.get("completion_mask")
        if ids is None or mask is None or len(ids) != 2 * len(examples):
            raise BadInputError(
                f"The collator {type(self.collate).__name__} gives no input_ids and completion_mask of both responses, "
                f"so the columns {', '.join(names)} cannot follow their tokens.",
                "Derive it from trl's DataCollatorForPreference.",
            )
        mask = mask.bool()
        rows = [(side, item) for side in SIDES for item in examples]
        parts = [
            self._kept(ids[index][mask[index]].tolist(), item[f"{side}_ids"]) for index, (side, item) in enumerate(rows)
        ]
        for name in names:
            values = [
                value for (side, item), part in zip(rows, parts, strict=True) for value in item[f"{side}_{name}"][part]
            ]
            flat = torch.tensor(values, dtype=torch.float32, device=ids.device)
            batch[f"column/{name}"] = torch.zeros(ids.shape, device=ids.device).masked_scatter(mask, flat)
        return batch

    def _kept(self, tokens: list[int], response: list[int]) -> slice:
        """Which part of a response is in the batch."""
        count = len(tokens)
        start, end = slice(count), slice(len(response) - count, None)
        order = (end, start) if getattr(self.collate, "truncation_mode", "keep_start") == "keep_end" else (start, end)
        for part in order:
            if count <= len(response) and response[part] == tokens:
                return part
        raise BadInputError(
            f"The collator {type(self.collate).__name__} changed the tokens of a response, "
            f"so the columns {', '.join(self.columns)} no longer belong to them.",
            "Columns are values of the rows' own tokens: compute them for what the collator gives.",
        )
