"""``everytoken train`` for every preference loss: one way to train, with settings derived from the loss.

A loss needs nothing but its card for this (``training_for``). The configuration joins ``PairTraining``, the loss's own
settings, and those of the makers of its data columns. A training evaluates on held-out pairs and writes ``model/``,
``training.json`` and ``report.html`` (curves, texts before and after, credit token by token). Run it again with the
same folder and it goes on from the last checkpoint. Under ``accelerate launch`` the first process writes.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from ..core.errors import BadInputError
from ..core.quiet import quiet_training
from ..training.base import Training, TrainingContext, TrainingResult
from ..training.column_makers import ColumnSources, TokenAnnotator, make_annotators
from ..training.config import TrainConfig, derive_config
from ..training.datasets.make_dataset import pairs_or_example
from ..training.session import TrainingSession
from .base import PreferenceLoss, declared
from .columns import missing_columns

if TYPE_CHECKING:
    from datasets import Dataset

    from ..core.trace import TokenTrace

METRICS = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "", "kl/chosen": "KL"}
FIGURES = ("loss", "rewards/margins", "rewards/accuracies", "kl/chosen", "kl/rejected")


@dataclass
class PairTraining(TrainConfig):
    """Training on pairs.

    Args:
        precompute_reference: score the reference once, before training, and do not hold it (not with losses that need
            its distributions).
        monitor_kl: log the KL to the reference on the pairs.
        drop_identical: leave out pairs of identical responses and say how many there were; otherwise the first one is
            refused.
    """

    precompute_reference: bool = False
    monitor_kl: bool = True
    drop_identical: bool = False


def is_preference_loss(factory: object) -> TypeGuard[type[PreferenceLoss]]:
    """Whether something is the class of a loss: a dataclass whose objects are called with two arguments,
    ``(policy, reference)``.
    """
    if not isinstance(factory, type) or not dataclasses.is_dataclass(factory):
        return False
    call = next((vars(kind)["__call__"] for kind in factory.__mro__ if "__call__" in vars(kind)), None)
    return inspect.isfunction(call) and len(inspect.signature(call).parameters) == 3


def training_for(slug: str, factory: object) -> Training | None:
    """How ``everytoken train`` trains a card of this station that names no ``training``; None where its implementation
    is no loss.

    Args:
        slug: of the card.
        factory: its implementation.
    """
    if not is_preference_loss(factory):
        return None
    columns = declared(factory).data_columns
    makers = [maker for maker in columns.values() if maker is not None]
    config = derive_config(f"{factory.__name__}Training", PairTraining, factory, *dict.fromkeys(makers))

    @quiet_training()
    def run(config: PairTraining, context: TrainingContext) -> TrainingResult:
        return train_on_pairs(slug, config, factory, context)

    made = f", with the data columns {', '.join(sorted(columns))}" if columns else ""
    summary = f"a model on preference pairs with {slug}{made}"
    return Training(name=slug, summary=summary, config=config, run=run, extra=("train", "trl"))


def train_on_pairs(
    name: str, config: PairTraining, loss_class: type[PreferenceLoss], context: TrainingContext
) -> TrainingResult:
    """Trains, evaluates and reports.

    Args:
        config: of a class that ``derive_config`` made for the loss.

    Raises:
        BadInputError: bad data, or a precomputed reference for a loss that needs its distributions.
    """
    from trl import DPOConfig

    from .trainer import PreferenceTrainer

    loss = config.part(loss_class)
    inputs = declared(loss)
    if config.precompute_reference and (inputs.needs or config.monitor_kl):
        if inputs.needs:
            raise BadInputError(f"{name} needs the reference's distributions: precompute_reference cannot be used.")
        config = dataclasses.replace(config, monitor_kl=False)
    rows = pairs_or_example(context, config.drop_identical)
    session = TrainingSession(config, context, name, METRICS)
    train, held = session.split(rows)
    answered = session.sampled(held)
    before = session.write_texts(session.policy, answered)
    args = DPOConfig(
        **config.arguments(session.checkpoints),
        max_length=config.max_length,
        precompute_ref_log_probs=config.precompute_reference,
    )

    def annotators(tokenized: Dataset) -> list[TokenAnnotator]:
        missing = missing_columns(tokenized, sorted(inputs.data_columns))
        makers = {column: inputs.data_columns[column] for column in missing}
        sources = ColumnSources(
            session.load, session.reference, session.tokenizer, tokenized, config.batch_size, config.seed, config.bf16,
            report=context.report,
        )  # fmt: skip
        return make_annotators(
            {column: None if maker is None else config.part(maker) for column, maker in makers.items()}, sources
        )

    trainer = PreferenceTrainer(
        session.policy,
        ref_model=session.reference,
        loss=loss,
        annotators=annotators,
        args=args,
        train_dataset=train,
        eval_dataset=held,
        processing_class=session.tokenizer,
        peft_config=session.adapter,
        monitor_kl=config.monitor_kl,
        drop_identical=config.drop_identical,
        report=context.report,
    )
    if dropped := sum(trainer.dropped.values()):
        session.notes.append(f"Dropped {dropped} pairs of identical responses.")
    session.train(trainer)
    context.report("evaluating", 0, 0)
    measured = trainer.evaluate()
    figures = {name: float(measured[f"eval_{name}"]) for name in FIGURES if f"eval_{name}" in measured}
    traces = _pair_traces(session, trainer, loss, trainer.eval_dataset)
    return session.finish(trainer, figures, answered, before, traces, "implicit_reward")


def _pair_traces(session: TrainingSession, trainer: Any, loss: PreferenceLoss, rows: Dataset) -> list[TokenTrace]:
    """Credit of the first held-out pairs, chosen and rejected in turn."""
    if not session.reads:
        return []
    from .traces import pair_traces

    policy = trainer.accelerator.unwrap_model(trainer.model).eval()
    return [
        trace
        for index in range(min(session.config.samples, len(rows)))
        for trace in pair_traces(policy, session.reference, session.tokenizer, rows[index], loss)
    ]
