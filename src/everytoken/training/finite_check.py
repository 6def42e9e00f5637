"""A loss that is not a number stops training, and the batch that gave it is saved for the user to look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import EverytokenError

if TYPE_CHECKING:
    from transformers import Trainer


class NonFiniteLossError(EverytokenError, FloatingPointError):
    """Training stopped at a loss that is not a number; the batch that gave it is saved."""


def save_batch(trainer: Trainer, rows: list[dict[str, Any]], **facts: Any) -> Path:
    """Writes ``output_dir/bad_batch.json`` (``bad_batch.1.json`` for the second process).

    Args:
        rows: the batch, readable: texts, ids, and what is known of each.
        facts: what is known of the batch.
    """
    rank, step = trainer.accelerator.process_index, trainer.state.global_step
    path = Path(trainer.args.output_dir) / (f"bad_batch.{rank}.json" if rank else "bad_batch.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"step": step, **facts, "rows": rows}, indent=1), encoding="utf-8")
    return path


def stopped(trainer: Trainer, loss: float, rows: list[dict[str, Any]]) -> NonFiniteLossError:
    """Saves the batch and returns the error to raise; arguments as for ``save_batch``."""
    path = save_batch(trainer, rows, loss=loss)
    return NonFiniteLossError(
        f"The loss is {loss} at step {trainer.state.global_step}; the batch is saved in {path}.",
        "Lower the learning rate, or look at its rows; checkpoints before this step are untouched.",
    )
