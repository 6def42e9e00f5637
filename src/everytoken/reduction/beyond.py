"""What fewer tokens change besides speed (the claim of the position paper, arXiv 2505.18227), measured on scenes.

- *False yes*: how often a model says that something absent is there.
- *Distractors*: right answers where more objects, or strokes of clutter, lie about that nobody asks for.
- *Long input*: right answers about an image that lies behind so many other questions with their answers.
- *Place*: where in the image the kept tokens lie; a choice by rotary attention is known to prefer the lower rows.

The model may be inside a ``reduce_tokens`` block: then the same questions are answered with fewer tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..core.errors import BadInputError
from ..core.rng import derive_seed
from ..training.datasets.scenes import COLOURS, IDS, Question, Scene, SceneMaker, question_batch
from ..training.vision import ask_all, held_out, right_answers

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    from .base import Reduction

FEW, MANY, CLUTTER = 2, 5, 24
"""Objects of scenes without distractors and with them, and strokes of clutter."""
FILLERS = (7, 31)
"""Questions with answers between the image and the question."""


@dataclass(frozen=True)
class Beyond:
    """One figure a question for each metric; see the module.

    Attributes:
        values: metric -> 1.0 or 0.0 a question.
    """

    values: dict[str, list[float]]

    def means(self) -> dict[str, float]:
        """Metric -> share."""
        return {name: sum(found) / len(found) for name, found in self.values.items()}


def beyond_efficiency(model: LlavaForConditionalGeneration, count: int = 256, seed: int = 0) -> Beyond:
    """All metrics of a model of scenes, as it is at the moment.

    Args:
        model: with the vocabulary of scenes; inside ``reduce_tokens`` or not.
        count: questions for each metric.
        seed: of scenes and questions; the same for all arms.

    Raises:
        BadInputError: no questions.
    """
    if count < 1:
        raise BadInputError(f"There must be one question at least; got {count}.")
    beds = {
        f"{FEW} objects": SceneMaker(least=FEW, most=FEW),
        f"{MANY} objects": SceneMaker(least=MANY, most=MANY),
        f"{MANY} objects and clutter": SceneMaker(least=MANY, most=MANY, clutter=CLUTTER),
    }
    values: dict[str, list[float]] = {}
    for name, maker in beds.items():
        scenes, asked = held_out(count, seed, maker)
        values[f"right answers, {name}"] = right_answers(model, scenes, asked)
        no = right_answers(model, scenes, [absent(scene, seed, place) for place, scene in enumerate(scenes)])
        values[f"false yes, {name}"] = [1 - right for right in no]
    scenes, asked = held_out(count, seed, SceneMaker())
    for fillers in FILLERS:
        values[f"right answers behind {fillers} questions"] = answers_behind(model, scenes, asked, fillers, seed)
    return Beyond(values)


def absent(scene: Scene, seed: int, place: int) -> Question:
    """Whether something is there that is not; the answer is no.

    Raises:
        BadInputError: a scene with every colour.
    """
    colours = [colour for colour in COLOURS if colour not in {thing.colour for thing in scene.things}]
    if not colours:
        raise BadInputError("This scene has every colour: nothing is absent.", "Draw fewer objects.")
    return Question("exists?", random.Random(derive_seed(seed, "absent", place)).choice(colours), "no")


@torch.no_grad()
def answers_behind(
    model: LlavaForConditionalGeneration,
    scenes: Sequence[Scene],
    questions: Sequence[Question],
    fillers: int,
    seed: int = 0,
    batch: int = 64,
) -> list[float]:
    """1.0 for every question that is answered right behind so many others about the same image, which have their
    answers.
    """
    others = ask_all(scenes, seed, "fillers", count=fillers) if fillers else [[] for _ in scenes]
    right: list[float] = []
    for first in range(0, len(scenes), batch):
        rows = slice(first, first + batch)
        asked = [[*before, question] for before, question in zip(others[rows], questions[rows], strict=True)]
        inputs = question_batch(scenes[rows], asked, model.config.image_seq_length)
        cut = {name: inputs[name][:, :-2] for name in ("input_ids", "attention_mask")}  # answer and end
        found = model(pixel_values=inputs["pixel_values"], **cut, logits_to_keep=1).logits[:, -1].argmax(-1)
        wanted = torch.tensor([IDS[item.answer] for item in questions[rows]], device=found.device)
        right += (found == wanted).float().tolist()
    return right


def kept_rows(reductions: Sequence[Reduction], grid: tuple[int, int]) -> list[float]:
    """The share of all kept tokens that lies in each row of the image, from the top; the shares sum to 1.

    Args:
        reductions: of images with this grid.
        grid: rows and columns.

    Raises:
        BadInputError: no reduction, or one of another number of tokens.
    """
    if not reductions or any(item.total != grid[0] * grid[1] for item in reductions):
        raise BadInputError(f"Give reductions of {grid[0]} x {grid[1]} tokens.")
    places = torch.cat([(item.groups() >= 0).nonzero()[:, 0] // grid[1] for item in reductions])
    counts = torch.bincount(places, minlength=grid[0]).double()
    return (counts / counts.sum()).tolist()


def loss_spread(curve: Sequence[tuple[int, float]]) -> float:
    """How much a loss jumps: the deviation of its steps from one point to the next, over the curve's second half.

    Raises:
        BadInputError: a curve of fewer than six points.
    """
    if len(curve) < 6:
        raise BadInputError(f"A curve of {len(curve)} points has no spread to speak of.", "Train for longer.")
    values = torch.tensor([value for _, value in curve[len(curve) // 2 :]], dtype=torch.float64)
    return float((values[1:] - values[:-1]).std())
