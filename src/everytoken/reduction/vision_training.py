"""What trainings of this station share: questions of scenes or of the user's file, and held-out answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..core.errors import BadInputError, UnsupportedModelError
from ..core.files import write_text_whole
from ..core.rng import seed_everything
from ..core.vision import load_processor, load_vlm
from ..training.base import TrainingContext
from ..training.datasets.image_questions import ImageQuestions, read_image_questions
from ..training.datasets.scenes import WORDS, SceneMaker, question_batch
from ..training.vision import ANSWERED, ask_all, held_out, right_answers
from .base import Reducer
from .inputs import reduce_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Forward = Callable[[dict[str, torch.Tensor]], torch.Tensor]
"""``inputs -> logits [B, V]`` behind the question."""


@dataclass(frozen=True)
class VisionSettings:
    """Settings of every training of this station.

    Args:
        batch: images a step.
        parts: equal parts of every batch, each computed by a thread of its own.
        seed: of everything.
        save_every: a checkpoint after so many steps, from which the same command goes on.

    Raises:
        BadInputError: a value out of range.
    """

    batch: int = 32
    parts: int = 2
    seed: int = 0
    save_every: int = 200

    def __post_init__(self) -> None:
        if min(self.batch, self.parts, self.save_every) < 1 or self.batch % self.parts:
            raise BadInputError(f"A batch has equal parts; got {self.batch} images in {self.parts}.")


class Questions(Protocol):
    """Where batches come from."""

    def batch(self, size: int, *names: object) -> dict[str, torch.Tensor]:
        """A batch of one named part of a run, with ``labels``."""
        ...


@dataclass(frozen=True)
class SceneQuestions:
    """Scenes with eight questions each.

    Attributes:
        image_tokens: placeholders of an image.
        maker: how scenes look.
        seed: of the draws.
    """

    image_tokens: int
    maker: SceneMaker
    seed: int = 0

    def batch(self, size: int, *names: object) -> dict[str, torch.Tensor]:
        scenes = self.maker.draw(size, self.seed, *names)
        return question_batch(scenes, ask_all(scenes, self.seed, *names, count=ANSWERED), self.image_tokens)


def reads_scenes(model: PreTrainedModel) -> bool:
    """Whether a model has the vocabulary of scenes."""
    text = model.config.get_text_config()
    return text.vocab_size == len(WORDS) and model.config.vision_config.image_size in (64, 128)


def scene_maker(model: PreTrainedModel) -> SceneMaker:
    """Scenes of the size that a model reads.

    Raises:
        UnsupportedModelError: a model that was not made for scenes.
    """
    if not reads_scenes(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} of {model.config.get_text_config().vocab_size:,} words does not know scenes.",
            "Leave --model out for the shipped one, or give --data with questions about your images.",
        )
    size = model.config.vision_config.image_size
    return SceneMaker() if size == 64 else SceneMaker(size=size, side=28)


def start(context: TrainingContext, settings: VisionSettings) -> tuple[PreTrainedModel, Questions, Any]:
    """The model that learns, in float32, where its questions come from, and its processor (None for scenes).

    Raises:
        UnsupportedModelError: no data for a model that does not know scenes.
        BadInputError: a file of questions that cannot be read; before the model is loaded.
    """
    rows = None if context.data is None else read_image_questions(context.data)
    context.report("loading the model", 0, 0)
    model = load_vlm(context.model, dtype="float32")
    seed_everything(settings.seed)
    if rows is not None:
        processor = load_processor(context.model)
        return model, ImageQuestions(processor, rows, settings.seed), processor
    maker = scene_maker(model)
    return model, SceneQuestions(model.config.image_seq_length, maker, settings.seed), None


def share_right(model: PreTrainedModel, forward: Forward | None = None, count: int = 256) -> float:
    """Share of right answers to held-out questions about scenes.

    Args:
        forward: as for ``training.vision.right_answers``.
    """
    scenes, asked = held_out(count, 1, scene_maker(model))
    return sum(right_answers(model, scenes, asked, forward)) / count  # type: ignore[arg-type]


def keep_record(
    folder: Path, method: str, figures: dict[str, float], settings: VisionSettings, curves: dict[str, Any]
) -> None:
    """Writes ``training.json``: what was trained how, and how good it is."""
    record = {"method": method, "figures": figures, "settings": dataclasses.asdict(settings), "curves": curves}  # type: ignore[call-overload]
    write_text_whole(folder / "training.json", json.dumps(record, indent=1) + "\n")


def on_device(batch: dict[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A batch where the model is."""
    return {name: value.to(model.device) for name, value in batch.items()}


def reduced_forward(
    model: PreTrainedModel,
    reducer: Reducer,
    positions: str | None = None,
    counted: Callable[[int], object] = lambda _tokens: None,
) -> Forward:
    """A forward with a reducer at the language model's input.

    Args:
        counted: gets the number of visual tokens that every batch kept.
    """

    def forward(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        reduced = reduce_inputs(model, reducer, inputs, positions)
        counted(reduced.tokens_after)
        logits: torch.Tensor = model(**reduced.arguments, logits_to_keep=1).logits[:, -1]
        return logits

    return forward
