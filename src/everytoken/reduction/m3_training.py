"""Training a model on nested scales, ``everytoken train m3`` (arXiv 2405.17430): its own weights learn, none are added.

Without ``--data`` the shipped tiny model learns from scenes; the model named by ``--model`` (a LLaVA) learns from the
questions of ``--data`` (see ``training.datasets.image_questions``). For a model of billions of weights the paper's rate
is 2e-5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..core.errors import BadInputError
from ..core.progress import Report, silent
from ..training.base import Training, TrainingContext, TrainingResult
from ..training.stepwise import Stage, fingerprint, fit
from ..training.vlm_files import save_vlm
from .m3 import MatryoshkaPool, block_side, matryoshka_loss
from .vision_training import (
    Questions,
    VisionSettings,
    keep_record,
    on_device,
    reads_scenes,
    reduced_forward,
    share_right,
    start,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class M3Training(VisionSettings):
    """Settings of ``everytoken train m3``.

    Args:
        steps: how many.
        lr: the level of the learning rate.
        scales: numbers of tokens, divided by commas; empty takes all from the full grid to one token, each side a
            divisor of the one before (576, 144, 36, 9, 1 or 64, 16, 4, 1).
        train_encoder: whether the image encoder learns too, as in the paper.

    Raises:
        BadInputError: a value out of range.
    """

    batch: int = 16
    steps: int = 300
    lr: float = 1e-3
    scales: str = ""
    train_encoder: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise BadInputError(f"Training takes one step at least; got {self.steps}.")
        self.chosen(24)

    def chosen(self, side: int) -> list[int]:
        """The scales for a grid of ``side`` x ``side``."""
        if not self.scales:
            return nested_scales(side)
        try:
            return [int(part) for part in self.scales.split(",")]
        except ValueError as error:
            raise BadInputError(f"scales are numbers divided by commas; got {self.scales!r}.") from error


def nested_scales(side: int) -> list[int]:
    """Numbers of tokens from ``side^2`` to 1, each side divided by its smallest factor."""
    found = [side * side]
    while side > 1:
        factor = next(k for k in range(2, side + 1) if side % k == 0)
        side //= factor
        found.append(side * side)
    return found


def run(config: M3Training, context: TrainingContext) -> TrainingResult:
    """Trains, measures the answers at every scale (of scenes), and writes the model's folder.

    Raises:
        BadInputError: a scale that the model's grid has not; before any step.
        UnsupportedModelError: see ``projected`` and ``start``.
    """
    model, questions, processor = start(context, config)
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    scales = config.chosen(side)
    for s in scales:
        block_side(s, (side, side))
    curve = train_scales(model, questions, scales, config, context.out, context.report)
    figures = {"loss": curve[-1][1]}
    if reads_scenes(model) and context.data is None:
        figures |= {f"right answers with {s} tokens": share for s, share in by_scale(model, scales).items()}
    folder = context.out / "model"
    save_vlm(model, folder, processor)
    keep_record(folder, "m3", figures, config, {"loss": curve})
    note = "Choose the number of tokens at every call: with reduce_tokens(load_vlm(folder), MatryoshkaPool(16)): ..."
    return TrainingResult(figures, [folder], [note])


def train_scales(
    model: PreTrainedModel,
    questions: Questions,
    scales: Sequence[int],
    config: M3Training,
    folder: Path | None = None,
    report: Report = silent,
) -> list[tuple[int, float]]:
    """Trains a model on nested scales; the loss's curve.

    Args:
        questions: where batches come from.
        scales: one or more; one alone is ordinary training with so many tokens.
        config: rates and steps.
        folder, report: as for ``training.stepwise.fit``.
    """
    learned = list(model.parameters())
    if not config.train_encoder:
        frozen = {id(weight) for weight in model.base_model.vision_tower.parameters()}
        learned = [weight for weight in learned if id(weight) not in frozen]

    def loss_of(part: int) -> Callable[[int], torch.Tensor]:
        def loss(step: int) -> torch.Tensor:
            batch = questions.batch(config.batch // config.parts, "m3", step, part)
            return matryoshka_loss(model, on_device(batch, model), scales)[0]

        return loss

    stage = Stage("m3", config.steps, config.lr, warmup=0.03, hold=0.5)
    losses = [loss_of(part) for part in range(config.parts)]
    identity = fingerprint(config, scales, questions.batch(config.batch // config.parts, "m3", 0, 0))
    return fit(model, losses, stage, folder, report, learned, config.save_every, identity)


def by_scale(model: PreTrainedModel, scales: list[int], count: int = 256) -> dict[int, float]:
    """Share of right answers to held-out questions about scenes, by number of tokens."""
    return {s: share_right(model, reduced_forward(model, MatryoshkaPool(s)), count) for s in scales}


TRAINING = Training(
    name="m3",
    summary="a vision-language model on nested sets of pooled visual tokens",
    config=M3Training,
    run=run,
    extra=("vision", "PIL"),
)
