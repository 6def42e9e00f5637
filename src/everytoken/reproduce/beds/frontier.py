"""Reward against divergence for losses on the sentiment bed: one way to run an arm, shared by TDPO, TGDPO, T-REG and
RTO.

All arms of a seed start from one model and see the same pairs in the same order for the same number of steps; every so
often the policy writes continuations of held-out openings, and their mean VADER score and KL(policy || reference) a
response make a point of the curve.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from ...core.charts import lines_svg
from ...core.results import Arms, Values, mean
from ...core.rng import derive_seed
from ..base import Context, Result
from .sentiment import Pair, SentimentBed, Sizes, SmallWriter, held_out, sizes, small_writer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

    from ...preference.base import PreferenceLoss
    from ...training.column_makers import TokenAnnotator

WHY = (
    "The paper trains models of 7 B (TDPO: GPT-2 Large) on web-scale preferences; here a language model of 3M weights, "
    "taught by the embedded 135M model, learns from its own continuations of short openings, judged by a lexicon."
)
Curve = list[tuple[float, Values]]
"""Mean KL and the reward of every held-out opening, from the start on."""


@dataclass
class Work:
    """What all arms of one seed share."""

    writer: SmallWriter
    start: PreTrainedModel
    rows: list[Pair]
    prompts: list[str]
    size: Sizes
    lr: float = 3e-4


def make_work(context: Context) -> Work:
    """Pairs, prompts and settings of a seed; the DPO arm of every experiment that uses it is the same."""
    writer = small_writer(context)
    rows = SentimentBed().rows(context)
    return Work(writer, writer.model(), rows, held_out(context), sizes(context))


def measure(work: Work, model: PreTrainedModel, seed: int) -> tuple[float, list[float]]:
    """Mean KL and the rewards of a model, with the same random numbers for every arm."""
    torch.manual_seed(derive_seed(seed, "measure"))
    rewards, kl = work.writer.rewards_and_kl(model, work.start, work.prompts)
    return mean(kl), [round(reward, 5) for reward in rewards]


def train_arm(
    context: Context, work: Work, name: str, loss: PreferenceLoss, annotators: Sequence[TokenAnnotator] = ()
) -> tuple[PreTrainedModel, Curve]:
    """Trains a copy of the start; returns it and its curve (the start included). An interrupted run keeps finished
    arms.
    """
    from transformers import TrainerCallback

    from ...preference.short_training import train_quietly

    curve: Curve = []

    class Watch(TrainerCallback):
        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: PreTrainedModel
        ) -> None:
            if state.global_step % work.size.every == 0:
                model = kwargs["model"].eval()
                curve.append(measure(work, model, context.seed))
                model.train()
                kl, reward = curve[-1]
                stage = f"{name}, reward {mean(reward):+.3f}, KL {kl:.2f}"
                context.report(stage, state.global_step, work.size.steps)

    def train() -> tuple[PreTrainedModel, Curve]:
        curve.append(measure(work, work.start, context.seed))
        trainer = train_quietly(
            work.writer.model(),
            work.start,
            loss,
            work.writer.tokenizer,
            work.rows,
            annotators,
            [Watch()],
            per_device_train_batch_size=work.size.batch,
            max_steps=work.size.steps,
            learning_rate=work.lr,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            seed=context.seed,
            data_seed=context.seed,
        )
        return trainer.model, curve

    model, found = context.model_part(f"training {name}", train)
    return model, [(kl, reward) for kl, reward in found]


def compare_losses(context: Context, losses: Mapping[str, PreferenceLoss]) -> Arms:
    """One arm a loss, all from one start on the same pairs for equal steps: the whole of an experiment."""
    work = make_work(context)
    return figures(context, {name: train_arm(context, work, name, loss)[1] for name, loss in losses.items()})


def reward_at(curve: Sequence[tuple[float, Values]], kl: float) -> Values:
    """Linear interpolation of reward over KL along a curve, of every question where the curve holds them."""
    points = sorted(curve, key=lambda point: point[0])
    for (k0, r0), (k1, r1) in itertools.pairwise(points):
        if k0 <= kl <= k1:
            share = (kl - k0) / max(k1 - k0, 1e-12)
            found = (1 - share) * np.asarray(r0, dtype=np.float64) + share * np.asarray(r1, dtype=np.float64)
            return cast("Values", found.tolist())
    return points[-1][1] if kl > points[-1][0] else points[0][1]


def figures(context: Context, curves: dict[str, Curve]) -> Arms:
    """The measurements of all arms; "equal KL" is the largest that every arm reached, and half of it."""
    context.artifacts["curves"] = {
        name: [[round(kl, 5), round(mean(reward), 5)] for kl, reward in curve] for name, curve in curves.items()
    }
    shared = min(max(kl for kl, _ in curve) for curve in curves.values())
    return {
        name: {
            "reward at the end": curve[-1][1],
            "KL at the end": curve[-1][0],
            "reward at equal KL": reward_at(curve, shared),
            "reward at half that KL": reward_at(curve, shared / 2),
        }
        for name, curve in curves.items()
    }


def frontier_svg(results: Sequence[Result], widest: float = 20.0) -> str:
    """All losses on one plot, from the result files of several experiments: means over seeds at equal steps.

    Args:
        results: results whose artifacts hold ``curves``; an arm that several of them ran (DPO) is drawn once.
        widest: points beyond this KL are left out (the axis says so).
    """
    lines: dict[str, list[list[tuple[float, float]]]] = {}
    for result in results:
        seeds = [artifact["curves"] for artifact in result["artifacts"].values()]
        for name in seeds[0]:
            steps = np.mean([seed[name] for seed in seeds], axis=0)  # one step of every seed
            lines.setdefault(name, [[(kl, reward) for kl, reward in steps.tolist() if kl <= widest]])
    x_label = f"KL to the start, nats a response (up to {widest:.0f})"
    return lines_svg(lines, x_label, "mean VADER score of the response")
