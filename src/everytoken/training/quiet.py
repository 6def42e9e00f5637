"""Short trainings inside other work (guides, trials, experiments): they log, save and print nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..core.progress import Report
from .distributed import on_cpu

if TYPE_CHECKING:
    from transformers import Trainer


class ReportSteps(TrainerCallback):
    """Reports ``(stage, step, steps)`` after every optimiser step."""

    def __init__(self, report: Report, stage: str):
        self.report, self.stage = report, stage

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.report(self.stage, state.global_step, state.max_steps)


def quiet_arguments(folder: str, **arguments: Any) -> dict[str, Any]:
    """Arguments of any transformers trainer that logs, saves and prints nothing, in float32.

    Args:
        folder: for what it writes all the same.
        arguments: further ones; they win.
    """
    quiet: dict[str, Any] = {
        "output_dir": folder,
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": on_cpu(),
    }
    return quiet | arguments


def without_printer(trainer: Trainer) -> Any:
    """The trainer, which would print its logs where it has no progress bar."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer
