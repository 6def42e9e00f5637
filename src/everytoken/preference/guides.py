"""Guides made on the spot: what a loss with per-token columns needs, where the user brings no model for it.

TGDPO's guide is a copy trained with DPO on the same pairs; cDPO's p+ and p- are copies tuned on chosen and on rejected responses; T-REG
asks the model itself. ``annotators_for`` puts them together.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from ..core.errors import BadInputError
from ..core.loading import quiet_training
from ..training.distributed import frozen, in_shards, load_unplaced, on_cpu
from .base import TokenAnnotator
from .columns import ModelLogps

Report = Callable[[str, int, int], None]


class Progress(TrainerCallback):
    """Reports ``(stage, step, steps)`` after every optimiser step."""

    def __init__(self, report: Report, stage: str):
        self.report, self.stage = report, stage

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report(self.stage, state.global_step, state.max_steps)


@dataclass
class GuideSettings:
    """How guides are made or found.

    Args:
        guide: a DPO- or SimPO-trained copy (hub id or folder); None trains one with DPO first.
        positive, negative: cDPO's p+ and p-; None tunes them on chosen and rejected responses.
        contrast: cDPO's a (1).
        better, worse: T-REG's instructions; None for the module's own.
        steps: optimiser steps of a guide that is made here.
        lr: of DPO guides; ``tune_lr`` of p+ and p- (paper: 3e-4, LoRA).
        lora_r: rank of p+'s and p-'s adapters (8); 0 tunes all weights.
        batch_size: rows a step.
    """

    guide: str | None = None
    positive: str | None = None
    negative: str | None = None
    contrast: float = 1.0
    better: str | None = None
    worse: str | None = None
    steps: int = 50
    lr: float = 5e-6
    tune_lr: float = 3e-4
    lora_r: int = 8
    batch_size: int = 4
    seed: int = 0
    bf16: bool = False


def dpo_guide(
    load: Callable[[], Any], reference: Any, tokenizer: Any, rows: Any, settings: GuideSettings, report: Report
) -> Any:
    """A copy trained with DPO on ``rows``."""
    from .dpo import DPOLoss

    trainer = train_quietly(
        load(), reference, DPOLoss(), tokenizer, rows, callbacks=[Progress(report, "training a guide with DPO")],
        per_device_train_batch_size=min(settings.batch_size, len(rows)), max_steps=settings.steps, learning_rate=settings.lr,
        seed=settings.seed, bf16=settings.bf16,
    )  # fmt: skip
    return trainer.model.requires_grad_(False)


def quiet_arguments(folder: str, **arguments: Any) -> dict[str, Any]:
    """Arguments of any transformers trainer that logs, saves and prints nothing, in float32; ``arguments`` are added, and win."""
    quiet: dict[str, Any] = {
        "output_dir": folder, "report_to": [], "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True, "bf16": False,
        "gradient_checkpointing": False, "use_cpu": on_cpu(),
    }  # fmt: skip
    return quiet | arguments


def without_printer(trainer: Any) -> Any:
    """The trainer, which would print its logs where it has no progress bar."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


@quiet_training()
def train_quietly(
    policy: Any, reference: Any, loss: Any, tokenizer: Any, rows: Any, annotators: Any = (), callbacks: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> Any:  # fmt: skip
    """A short training with a preference loss that logs, saves and prints nothing; returns the trainer, its model ready to be used.

    Args:
        rows: a ``datasets.Dataset`` or a list of rows.
        annotators, callbacks: as for ``PreferenceTrainer``.
        arguments: of ``trl.DPOConfig``; float32, a constant learning rate and whole rows where they say nothing else.
    """
    from datasets import Dataset
    from trl import DPOConfig

    from .trainer import PreferenceTrainer

    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(**quiet_arguments(folder, **{"max_length": None, "lr_scheduler_type": "constant"} | arguments))
        trainer = PreferenceTrainer(
            policy, ref_model=reference, loss=loss, annotators=annotators, args=args,
            train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows, processing_class=tokenizer,
            callbacks=list(callbacks),
        )  # fmt: skip
        without_printer(trainer).train()
    trainer.model.eval()
    return trainer


@quiet_training()
def tuned_on(
    side: str, load: Callable[[], Any], tokenizer: Any, rows: Any, settings: GuideSettings, report: Report
) -> Any:
    """A copy tuned on the ``chosen`` or ``rejected`` responses of tokenized rows; prompts are read, not learnt."""
    from datasets import Dataset
    from trl import SFTConfig

    from .ift import IFTSettings, IFTTrainer

    traces = [
        {
            "input_ids": [*row["prompt_ids"], *row[f"{side}_ids"]],
            "labels": [-100] * len(row["prompt_ids"]) + list(row[f"{side}_ids"]),
        }
        for row in rows.select_columns(["prompt_ids", f"{side}_ids"])
    ]
    adapter = None
    if settings.lora_r:
        from peft import LoraConfig

        names = ["gate_proj", "up_proj", "down_proj"]
        model = load()
        present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        adapter = LoraConfig(
            r=settings.lora_r,
            lora_alpha=2 * settings.lora_r,
            target_modules=names if set(names) <= present else "all-linear",
        )
    else:
        model = load()
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(**quiet_arguments(
            folder, bf16=settings.bf16, per_device_train_batch_size=settings.batch_size, max_steps=settings.steps,
            learning_rate=settings.tune_lr, seed=settings.seed, max_length=None,
        ))  # fmt: skip
        trainer = IFTTrainer(
            model, ift=IFTSettings(residual=0.0, gamma=0.0), args=args, train_dataset=Dataset.from_list(traces),
            processing_class=tokenizer, peft_config=adapter, callbacks=[Progress(report, f"tuning on {side} responses")],
        )  # fmt: skip
        without_printer(trainer).train()
        # weights in shards stay beside their adapter
        merged = adapter is not None and not in_shards()
        made = trainer.model.merge_and_unload() if merged else trainer.model
    return made.requires_grad_(False).eval()


def annotators_for(
    columns: Sequence[str],
    load: Callable[[], Any],
    reference: Any,
    tokenizer: Any,
    rows: Any,
    settings: GuideSettings,
    report: Report = lambda _stage, _done, _total: None,
) -> list[TokenAnnotator]:
    """Annotators for the columns of a loss.

    Args:
        columns: as ``loss.columns``.
        load: loads a fresh copy of the initial model.
        reference: the initial model itself, or None.
        rows: a tokenized dataset (``prompt_ids``, ``chosen_ids``, ``rejected_ids``); columns that it has need no annotator.

    Raises:
        BadInputError: a column that nothing here makes.
    """

    def start() -> Any:  # its own copy where it will be sharded: the trainer shards the reference when it is ready to
        return load() if reference is None or in_shards() else reference

    found: list[TokenAnnotator] = []
    for column in columns:
        if f"chosen_{column}" in rows.column_names:
            continue
        if column == "guide_logps":
            guide = (
                frozen(load_unplaced(settings.guide)) if settings.guide is not None
                else dpo_guide(load, start(), tokenizer, rows, settings, report)
            )  # fmt: skip
            found.append(ModelLogps(guide))
        elif column == "contrast":
            from .cdpo import ContrastiveEstimator

            sides = {
                side: frozen(load_unplaced(path))
                if path is not None
                else tuned_on(side, load, tokenizer, rows, settings, report)
                for side, path in (("chosen", settings.positive), ("rejected", settings.negative))
            }
            found.append(ContrastiveEstimator(sides["chosen"], sides["rejected"], settings.contrast))
        elif column == "token_reward":
            from .t_reg import BETTER, WORSE, ContrastivePromptRewards

            texts = (settings.better or BETTER, settings.worse or WORSE)
            found.append(ContrastivePromptRewards(frozen(start()), tokenizer, *texts))
        else:
            raise BadInputError(
                f"Nothing here makes the column {column!r}.",
                "Add chosen_ and rejected_ columns of that name to the data.",
            )
    return found
