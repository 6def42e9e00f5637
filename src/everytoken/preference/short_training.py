"""Short trainings on pairs inside other work: a guide before a training, the arms of a trial or of an experiment.

``train_quietly`` is the one place that configures them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from trl import DPOConfig

from ..core.quiet import quiet_training
from ..training.column_makers import ColumnSources, TokenAnnotator
from ..training.quiet import ReportSteps, quiet_arguments, without_printer
from .base import PreferenceLoss
from .trainer import PreferenceTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@quiet_training()
def train_quietly(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    loss: PreferenceLoss | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset | list[dict[str, Any]],
    annotators: Sequence[TokenAnnotator] | Callable[[Dataset], Sequence[TokenAnnotator]] = (),
    callbacks: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> PreferenceTrainer:
    """A short training that logs, saves and prints nothing; returns the trainer, its model ready to be used.

    Args:
        loss: None is DPO.
        rows: preference rows, tokenized or not.
        annotators, callbacks: as for ``PreferenceTrainer``.
        arguments: of ``trl.DPOConfig``; float32, a constant learning rate and whole rows where they say nothing else.
    """
    from datasets import Dataset

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


def train_guide(sources: ColumnSources, steps: int, lr: float) -> Any:
    """A frozen copy of the initial model, trained with DPO on ``sources.rows``."""
    trainer = train_quietly(
        sources.load(),
        sources.initial_model(),
        None,
        sources.tokenizer,
        sources.rows,
        callbacks=[ReportSteps(sources.report, "training a guide with DPO")],
        per_device_train_batch_size=min(sources.batch_size, len(sources.rows)),
        max_steps=sources.steps(steps),
        learning_rate=lr,
        seed=sources.seed,
        bf16=sources.bf16,
    )
    return trainer.model.requires_grad_(False)
