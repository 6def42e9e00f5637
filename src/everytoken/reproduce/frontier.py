"""Reward against divergence for losses on the sentiment test bed: one way to run an arm, shared by TDPO, TGDPO and T-REG.

All arms of a seed start from one model and see the same pairs in the same order for the same number of steps; every so often the policy
writes continuations of held-out openings, and their mean VADER score and KL(policy || reference) a response make a point of the curve.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core.plots import lines_svg
from ..core.rng import derive_seed
from ..training.datasets.sentiment import openings
from .base import Context
from .sentiment_bed import Bed, bed

WHY = (
    "The paper trains models of 7 B (TDPO: GPT-2 Large) on web-scale preferences; here a language model of 3M weights, taught by the "
    "embedded 135M model, learns from its own continuations of short openings, judged by a lexicon."
)
Curve = list[tuple[float, float]]


@dataclass
class Work:
    """What all arms of one seed share."""

    bed: Bed
    start: Any
    rows: list[dict[str, Any]]
    prompts: list[str]
    steps: int
    batch: int
    every: int
    lr: float = 3e-4


def make_work(context: Context) -> Work:
    """Pairs, prompts and settings of a seed; the DPO arm of every experiment that uses it is the same."""
    place = bed(context)
    steps, batch, pairs, samples, every = (6, 8, 24, 36, 3) if context.quick else (120, 16, 1280, 720, 20)
    start = place.model()
    torch.manual_seed(derive_seed(context.seed, "pairs"))
    context.progress(f"{pairs} pairs of the small model's own continuations")
    rows = place.pairs(start, pairs)
    return Work(place, start, rows, (openings("test") * (samples // 36 + 1))[:samples], steps, batch, every)


def measure(work: Work, model: Any, seed: int) -> tuple[float, float]:
    """``(KL, reward)`` of a model, with the same random numbers for every arm."""
    torch.manual_seed(derive_seed(seed, "measure"))
    reward, kl = work.bed.reward_and_kl(model, work.start, work.prompts)
    return kl, reward


def train_arm(
    context: Context, work: Work, name: str, loss: Any, annotators: Sequence[Any] = (), rows: Any = None
) -> tuple[Any, Curve]:
    """Trains a copy of the start; returns it and its curve (the start included)."""
    from transformers import TrainerCallback

    from ..preference.short_training import train_quietly

    curve = [measure(work, work.start, context.seed)]

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % work.every == 0:
                model = kwargs["model"].eval()
                curve.append(measure(work, model, context.seed))
                model.train()
                kl, reward = curve[-1]
                context.progress(f"{name} step {state.global_step} of {work.steps}: reward {reward:+.3f}, KL {kl:.2f}")

    trainer = train_quietly(
        work.bed.model(), work.start, loss, work.bed.tokenizer, work.rows if rows is None else rows, annotators, [Watch()],
        per_device_train_batch_size=work.batch, max_steps=work.steps, learning_rate=work.lr,
        lr_scheduler_type="constant_with_warmup", warmup_steps=5, seed=context.seed, data_seed=context.seed,
    )  # fmt: skip
    return trainer.model, curve


def reward_at(curve: Curve, kl: float) -> float:
    """Linear interpolation of reward over KL along a curve of ``(kl, reward)``."""
    points = sorted(curve)
    for (k0, r0), (k1, r1) in itertools.pairwise(points):
        if k0 <= kl <= k1:
            return r0 + (r1 - r0) * (kl - k0) / max(k1 - k0, 1e-12)
    return points[-1][1] if kl > points[-1][0] else points[0][1]


def figures(context: Context, curves: dict[str, Curve]) -> dict[str, dict[str, float]]:
    """The measurements of all arms; "equal KL" is the largest that every arm reached, and half of it."""
    context.artifacts["curves"] = {
        name: [[round(x, 5) for x in point] for point in curve] for name, curve in curves.items()
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


def frontier_svg(results: Sequence[dict[str, Any]], widest: float = 20.0) -> str:
    """All losses on one plot, from the result files of several experiments: means over seeds at equal steps.

    Args:
        results: results whose artifacts hold ``curves``; an arm that several of them ran (DPO) is drawn once.
        widest: points beyond this KL are left out (the caption says so).
    """
    lines: dict[str, list[list[tuple[float, float]]]] = {}
    for result in results:
        seeds = [artifact["curves"] for artifact in result["artifacts"].values()]
        for name in seeds[0]:
            points = zip(*(seed[name] for seed in seeds), strict=True)  # one step of every seed
            means = [tuple(sum(values) / len(values) for values in zip(*step, strict=True)) for step in points]
            lines.setdefault(name, [[(kl, reward) for kl, reward in means if kl <= widest]])
    return lines_svg(lines, f"KL to the start, nats a response (up to {widest:.0f}); mean VADER score", share=False)
