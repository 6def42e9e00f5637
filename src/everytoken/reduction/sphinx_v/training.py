"""Training a prompt encoder on scenes, ``everytoken train sphinx-v`` (arXiv 2403.20271): two stages.

1. *Alignment*: encoder, image projector and word embeddings learn; the decoder's layers do not. A prompt's token must
   resemble the image's feature at the place that it points to, and features must still name what lies there. (The
   paper learns from captions of regions here; scenes say directly where and what.)
2. *Instructions*: the language model, the encoder's projection and its marks learn from answers; the rest of the encoder
   does not.

Boxes are shaken as the paper shakes them, points lie anywhere near the object's middle. The image encoder never learns.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from ...core.errors import BadInputError
from ...core.files import write_text_whole
from ...core.progress import Report, silent
from ...core.rng import derive_seed
from ...training.base import Training, TrainingContext, TrainingResult
from ...training.datasets.scenes import PROMPT, Question, Scene, Thing, patch_labels, pixel_values, question_batch
from ...training.stepwise import Stage, fit
from ...training.vision import held_out, image_features, naming_loss, right_answers
from ..changed_weights import save_changed
from ..vision_training import SceneQuestions, VisionSettings, on_device, start
from .configuration_visual_prompts import VisualPromptConfig
from .modeling_visual_prompts import VisualPromptEncoder
from .prompting import check_llava, with_prompts
from .prompts import BOX, Box, Point, Prompts, VisualPrompt, encode_prompts, shaken

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ASKED = ("shape?", "colour?")
Asked = tuple[list[Scene], list[Thing], Prompts]
"""Scenes, the thing that is pointed at in each, and the prompts."""


@dataclass(frozen=True)
class SphinxVTraining(VisionSettings):
    """Settings of ``everytoken train sphinx-v``.

    Args:
        width: c, of the encoder.
        max_prompts: P, slots an image.
        align_steps, align_lr: of the first stage.
        steps, lr: of the second.

    Raises:
        BadInputError: a value out of range.
    """

    width: int = 64
    max_prompts: int = 10
    align_steps: int = 200
    align_lr: float = 2e-3
    steps: int = 400
    lr: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.align_steps, self.steps) < 0:
            raise BadInputError("steps are 0 or more.")
        VisualPromptConfig(width=self.width, max_prompts=self.max_prompts)


def run(config: SphinxVTraining, context: TrainingContext) -> TrainingResult:
    """Trains, measures the answers about pointed-at objects, and writes encoder and changed weights.

    Raises:
        UnsupportedModelError: a model that does not know scenes.
        BadInputError: data of the user's: it is scenes that say where things are.
    """
    if context.data is not None:
        raise BadInputError("This training draws scenes, which say where things are.", "Leave --data out.")
    model, questions, _ = start(context, config)
    assert isinstance(questions, SceneQuestions)
    encoder = new_encoder(model, config)
    changed, curves = train_encoder(model, encoder, questions, config, context.out, context.report)
    figures = {}
    scenes, _ = held_out(256, 1, questions.maker)
    for shape in ("point", "box"):
        figures[f"right answers, {shape}"] = sum(answered(model, encoder, scenes, shape, 1)) / 256
    folder = context.out / "encoder"
    encoder.save_pretrained(folder)
    save_changed(folder, changed)
    record = {"method": "sphinx-v", "figures": figures, "settings": dataclasses.asdict(config), "curves": curves}
    write_text_whole(folder / "training.json", json.dumps(record, indent=1) + "\n")
    note = f"Use it: with prompting(model, VisualPrompting(weights={str(folder)!r})) as encoder: ..."
    return TrainingResult(figures, [folder], [note])


def new_encoder(model: PreTrainedModel, config: SphinxVTraining) -> VisualPromptEncoder:
    """An untrained encoder of a model's width."""
    check_llava(model)
    text = model.config.get_text_config()
    return VisualPromptEncoder(VisualPromptConfig(text.hidden_size, config.width, config.max_prompts)).to(model.device)


def train_encoder(
    model: PreTrainedModel,
    encoder: VisualPromptEncoder,
    questions: SceneQuestions,
    config: SphinxVTraining,
    folder: Path | None = None,
    report: Report = silent,
) -> tuple[dict[str, torch.Tensor], dict[str, list[tuple[int, float]]]]:
    """Both stages.

    Returns:
        The model's weights that learned, by name, and the curves of both losses.
    """
    both, parts, base = nn.ModuleList([model, encoder]), range(config.parts), model.base_model
    both.requires_grad_(False)
    first = [
        *encoder.parameters(),
        *base.multi_modal_projector.parameters(),
        *model.get_input_embeddings().parameters(),
    ]
    for weight in first:
        weight.requires_grad_(True)
    stage = Stage("prompts", config.align_steps, config.align_lr, warmup=0.03, hold=0.5)
    losses = [alignment(model, encoder, questions, config, part) for part in parts]
    curves = {"prompts": fit(both, losses, stage, folder, report, first, config.save_every)}
    both.requires_grad_(False)
    second = [*encoder.project.parameters(), *encoder.norm.parameters(), *encoder.ends.parameters()]
    second += [*base.language_model.parameters()]
    for weight in second:
        weight.requires_grad_(True)
    stage = Stage("prompts and language model", config.steps, config.lr, warmup=0.03, hold=0.5)
    losses = [instructions(model, encoder, questions, config, part) for part in parts]
    curves["both"] = fit(both, losses, stage, folder, report, second, config.save_every)
    own = {id(weight) for weight in (*base.language_model.parameters(), *base.multi_modal_projector.parameters())}
    return {name: weight for name, weight in model.named_parameters() if id(weight) in own}, curves


def alignment(
    model: PreTrainedModel,
    encoder: VisualPromptEncoder,
    questions: SceneQuestions,
    config: SphinxVTraining,
    part: int,
) -> Callable[[int], torch.Tensor]:
    """The first stage's loss of one part of a step."""
    patch = model.config.vision_config.patch_size

    def loss(step: int) -> torch.Tensor:
        scenes, things, prompts = pointed(questions, config, "prompts", step, part)
        features = image_features(model, pixel_values(scenes).to(model.device))  # type: ignore[arg-type]
        tokens = encoder(prompts.coordinates, prompts.kinds, prompts.valid)[:, 0]
        scores = (features @ tokens[..., None])[..., 0] / features.shape[-1] ** 0.5
        side = scenes[0].size // patch
        middles = [thing.centre for thing in things]
        wanted = torch.tensor([int(y // patch) * side + int(x // patch) for x, y in middles], device=scores.device)
        named = naming_loss(model, features, patch_labels(scenes, patch))  # type: ignore[arg-type]
        return F.cross_entropy(scores, wanted) + named

    return loss


def instructions(
    model: PreTrainedModel,
    encoder: VisualPromptEncoder,
    questions: SceneQuestions,
    config: SphinxVTraining,
    part: int,
) -> Callable[[int], torch.Tensor]:
    """The second stage's loss of one part of a step."""

    def loss(step: int) -> torch.Tensor:
        scenes, things, prompts = pointed(questions, config, "instructions", step, part)
        asked = [[question(thing, kind) for kind in ASKED] for thing in things]
        batch = on_device(question_batch(scenes, asked, questions.image_tokens), model)
        result: torch.Tensor = model(**with_prompts(model, encoder, batch, prompts)).loss
        return result

    return loss


def question(thing: Thing, kind: str) -> Question:
    """What is asked of a thing that is pointed at."""
    return Question(kind, PROMPT, thing.shape if kind == "shape?" else thing.colour)


def pointed(questions: SceneQuestions, config: SphinxVTraining, *names: object) -> Asked:
    """Scenes, the thing that is pointed at in each, and points or boxes on them."""
    scenes = questions.maker.draw(config.batch // config.parts, config.seed, *names)
    rng = random.Random(derive_seed(config.seed, "pointed", *names))
    things = [rng.choice(scene.things) for scene in scenes]
    prompts: list[Sequence[VisualPrompt]] = [
        [prompt_on(thing, rng.choice(("point", "box")), scene.size, rng)]
        for scene, thing in zip(scenes, things, strict=True)
    ]
    sizes = [(scene.size, scene.size) for scene in scenes]
    return scenes, things, encode_prompts(prompts, sizes, config.max_prompts)


def prompt_on(thing: Thing, shape: str, size: int, rng: random.Random) -> VisualPrompt:
    """A point near a thing's middle, or a hasty box around it, inside the image."""
    if shape == "point":
        x, y = thing.centre
        reach = thing.side // 6
        return Point(x + rng.randint(-reach, reach), y + rng.randint(-reach, reach))
    box = shaken(Box(*thing.box), rng)
    return Box(max(box.x0, 0), max(box.y0, 0), min(box.x1, size), min(box.y1, size))


def answered(
    model: PreTrainedModel, encoder: VisualPromptEncoder, scenes: Sequence[Scene], shape: str | None, seed: int
) -> list[float]:
    """1.0 for every right answer about the thing that is pointed at, else 0.0; a question a scene.

    Args:
        shape: ``"point"``, ``"box"``, or None for empty slots.
        seed: of what is pointed at and asked.
    """
    rng = random.Random(derive_seed(seed, "answered"))
    things = [rng.choice(scene.things) for scene in scenes]
    asked = [question(thing, rng.choice(ASKED)) for thing in things]
    size, slots = scenes[0].size, encoder.config.max_prompts
    prompts: list[Sequence[VisualPrompt]] = [
        [] if shape is None else [prompt_on(thing, shape, size, rng)] for thing in things
    ]
    encoded = encode_prompts(prompts, [(size, size)] * len(scenes), slots, empty=BOX)
    place = [0]

    def forward(inputs: dict[str, Any]) -> torch.Tensor:
        rows = slice(place[0], place[0] + len(inputs["input_ids"]))
        place[0] = rows.stop  # batches come in order
        some = Prompts(encoded.coordinates[rows], encoded.kinds[rows], encoded.valid[rows])
        logits: torch.Tensor = model(**with_prompts(model, encoder, inputs, some), logits_to_keep=1).logits[:, -1]
        return logits

    return right_answers(model, scenes, asked, forward)  # type: ignore[arg-type]


TRAINING = Training(
    name="sphinx-v",
    summary="an encoder of points and boxes, then the language model with it",
    config=SphinxVTraining,
    run=run,
    extra=("vision", "PIL"),
)
