"""Training a projector, ``everytoken train tokenpacker`` (arXiv 2407.02392): two stages, the encoder learns in neither.

1. The projector alone. On scenes every token must name colour, shape and quarter in its region; on ``--data`` it learns
   from the answers.
2. The projector and the language model, from the answers.

Without ``--data`` the shipped tiny model learns from scenes. For a model of billions of weights the paper's rates are
1e-3 and 2e-5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...core.errors import BadInputError
from ...core.progress import Report, silent
from ...training.base import Training, TrainingContext, TrainingResult
from ...training.datasets.image_questions import ImageQuestions
from ...training.datasets.scenes import patch_labels, pixel_values
from ...training.stepwise import Stage, fingerprint, fit
from ...training.vision import image_features, naming_loss
from ..vision_training import Questions, SceneQuestions, VisionSettings, keep_record, on_device, share_right, start
from .configuration_tokenpacker import check_query_pool
from .packing import new_projector, packed, packed_processor, save_packer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COVERED = 24
"""Pixels of an object that a region must hold to be named by it."""


@dataclass(frozen=True)
class TokenPackerTraining(VisionSettings):
    """Settings of ``everytoken train tokenpacker``.

    Args:
        scale: s, a token stands for s x s features.
        query_pool: ``"bilinear"`` or ``"mean"``.
        align_steps, align_lr: of the first stage.
        steps, lr: of the second.

    Raises:
        BadInputError: a value out of range.
    """

    scale: int = 2
    query_pool: str = "bilinear"
    align_steps: int = 150
    align_lr: float = 2e-3
    steps: int = 300
    lr: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale < 1 or min(self.align_steps, self.steps) < 0:
            raise BadInputError("scale is 1 or more, and steps are 0 or more.")
        check_query_pool(self.query_pool)


def run(config: TokenPackerTraining, context: TrainingContext) -> TrainingResult:
    """Trains, measures the answers (of scenes), and writes projector and language model.

    Raises:
        UnsupportedModelError: not a LLaVA; or no data for a model that does not know scenes.
        BadInputError: a scale that the model's grid has not.
    """
    model, questions, processor = start(context, config)
    projector = new_projector(model, config.scale, query_pool=config.query_pool)
    if isinstance(questions, ImageQuestions):
        questions = ImageQuestions(packed_processor(processor, projector), questions.rows, config.seed)
    figures: dict[str, float] = {}
    with packed(model, projector):
        trained, curves = train_projector(model, projector, questions, config, context.out, context.report)
        if context.data is None:
            figures["right answers"] = share_right(model)
    figures["tokens an image"] = float(projector.config.num_tokens)
    folder = context.out / "packer"
    save_packer(projector, folder, trained)
    keep_record(folder, "tokenpacker", figures, config, curves)
    note = f"Use it: with packed(model, TokenPacker({config.scale}, weights={str(folder)!r})): ..."
    return TrainingResult(figures, [folder], [note])


def train_projector(
    model: PreTrainedModel,
    projector: nn.Module,
    questions: Questions,
    config: TokenPackerTraining,
    folder: Path | None = None,
    report: Report = silent,
) -> tuple[dict[str, torch.Tensor], dict[str, list[tuple[int, float]]]]:
    """Both stages, for the projector that a model has at the moment.

    Args:
        model: with the projector in its place; its encoder does not learn.
        projector: what learns first.
        questions: where batches come from.
        config: rates and steps.
        folder, report: as for ``training.stepwise.fit``.

    Returns:
        The language model's weights by name, and the curves of both losses.
    """
    if isinstance(questions, SceneQuestions):
        questions = dataclasses.replace(questions, image_tokens=model.config.image_seq_length)
    model.requires_grad_(False)
    learned, parts = [*projector.requires_grad_(True).parameters()], range(config.parts)
    first = [alignment(model, questions, config, part) for part in parts]
    stage = Stage("projector", config.align_steps, config.align_lr, warmup=0.03, hold=0.5)
    identity = fingerprint(config, questions.batch(config.batch // config.parts, "packed answers", 0, 0))
    curves = {"projector": fit(model, first, stage, folder, report, learned, config.save_every, identity)}
    language = [*model.base_model.language_model.requires_grad_(True).parameters()]
    second = [answers(model, questions, config, part) for part in parts]
    stage = Stage("projector and language model", config.steps, config.lr, warmup=0.03, hold=0.5)
    curves["both"] = fit(model, second, stage, folder, report, [*learned, *language], config.save_every, identity)
    own = {id(weight) for weight in language}
    return {name: weight for name, weight in model.named_parameters() if id(weight) in own}, curves


def alignment(
    model: PreTrainedModel, questions: Questions, config: TokenPackerTraining, part: int
) -> Callable[[int], torch.Tensor]:
    """The first stage's loss of one part of a step."""
    if not isinstance(questions, SceneQuestions):
        return answers(model, questions, config, part)
    maker, patch = questions.maker, config.scale * model.config.vision_config.patch_size

    def loss(step: int) -> torch.Tensor:
        scenes = maker.draw(config.batch // config.parts, config.seed, "packed alignment", step, part)
        features = image_features(model, pixel_values(scenes).to(model.device))  # type: ignore[arg-type]
        return naming_loss(model, features, patch_labels(scenes, patch, COVERED), quarters=True)  # type: ignore[arg-type]

    return loss


def answers(
    model: PreTrainedModel, questions: Questions, config: TokenPackerTraining, part: int
) -> Callable[[int], torch.Tensor]:
    """The loss of answers, of one part of a step."""

    def loss(step: int) -> torch.Tensor:
        batch = questions.batch(config.batch // config.parts, "packed answers", step, part)
        result: torch.Tensor = model(**on_device(batch, model)).loss
        return result

    return loss


TRAINING = Training(
    name="tokenpacker",
    summary="a projector of fewer tokens, then the language model with it",
    config=TokenPackerTraining,
    run=run,
    extra=("vision", "PIL"),
)
