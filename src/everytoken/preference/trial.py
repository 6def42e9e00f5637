"""Trials of preference losses: each trains a copy of the model for a few steps, beside DPO, on the same rows.

Any loss can be tried: its data columns are made by its own makers, in the trial's few steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..core.errors import require
from ..core.quiet import quiet_training
from ..decoding.trial import Trial, TrialRequest, TrialResult

if TYPE_CHECKING:
    from datasets import Dataset

    from ..training.column_makers import TokenAnnotator
    from ..training.trial import TrialWork
    from .base import PreferenceLoss


def trial(request: TrialRequest) -> TrialResult:
    """What a few steps of every loss do beside DPO.

    Raises:
        BadInputError: bad rows.
        MissingExtraError: TRL is not installed.
    """
    require("trl", "train", "Trying a preference method")
    from ..training.trial import TrialWork

    with quiet_training():
        return _pairs(TrialWork(request))


def trace_columns(item: Trial) -> tuple[str, ...]:
    """The columns of a loss's traces, before anything is loaded: those of all losses, and the loss's own."""
    from .traces import column_names

    return column_names(item.factory(**item.settings))


def _pairs(work: TrialWork) -> TrialResult:
    """Margins, divergence and time after a few steps."""
    from ..core.rng import seed_everything
    from ..training.quiet import ReportSteps
    from .dpo import DPOLoss
    from .short_training import train_quietly
    from .traces import pair_traces

    result = TrialResult({}, "reward margin", column="implicit_reward")
    baseline = "DPO"
    for name, loss in work.arms(baseline, DPOLoss, {}).items():
        stage = f"{name}: {work.steps} steps on {len(work.pairs)} pairs"
        work.report(stage, 0, work.steps)
        seed_everything(work.seed)
        trainer = train_quietly(
            work.load(),
            work.reference,
            loss,
            work.tokenizer,
            work.pairs,
            _annotators(work, loss),
            [ReportSteps(work.report, stage)],
            per_device_train_batch_size=work.batch_size,
            max_steps=work.steps,
            learning_rate=work.lr,
            seed=work.seed,
        )
        policy, known = trainer.model, trainer.train_dataset
        margins, kls = [], {"chosen": 0.0, "rejected": 0.0}
        for index in range(min(8, len(known))):
            pair = pair_traces(policy, work.reference, work.tokenizer, known[index], loss)
            sums = [sum(trace.columns["implicit_reward"]) for trace in pair]  # type: ignore[arg-type]
            margins.append(sums[0] - sums[1])
            for side, trace in zip(kls, pair, strict=True):
                kls[side] += sum(trace.columns["forward_kl"])  # type: ignore[arg-type]
                trace.title = f"{name}, {trace.title}"
            if index < 2 and name != baseline:
                result.traces += pair
        result.rows[name] = {
            "reward margin": sum(margins) / len(margins),
            "KL chosen": kls["chosen"] / len(margins),
            "KL rejected": kls["rejected"] / len(margins),
            "seconds": trainer.state.log_history[-1]["train_runtime"],
        }
    return result


def _annotators(work: TrialWork, loss: PreferenceLoss) -> Callable[[Dataset], list[TokenAnnotator]]:
    """Makes what the loss's columns need, once its rows are tokenized."""
    from ..training.column_makers import ColumnSources, make_annotators
    from .base import declared
    from .columns import missing_columns

    def make(rows: Dataset) -> list[TokenAnnotator]:
        columns = declared(loss).data_columns
        sources = ColumnSources(
            work.load,
            work.reference,
            work.tokenizer,
            rows,
            work.batch_size,
            work.seed,
            max_steps=work.steps,
            report=work.report,
        )
        missing = {name: columns[name] for name in missing_columns(rows, sorted(columns))}
        return make_annotators({name: None if maker is None else maker() for name, maker in missing.items()}, sources)

    return make
