"""A tiny vision-language model of transformers' own classes, trained on scenes in minutes on two cores.

Everything that methods of vision-language models hook into is real: a CLIP encoder with its class token, LLaVA's
projector, a Llama. Only the sizes are small. It learns in stages.

1. *Alignment*: every patch's projected feature, multiplied by the word embeddings, must name the colour and the shape
   that lie there; patches of the ground must be told from the others by the image word.
2. *Questions*: eight questions with answers an image, loss on the answers. First scenes of one object, then of two,
   then of more. The language model's key projections start as copies of its query projections, so that equal content
   attends to equal content from the first step.

Without the first stage, the copies and the easy scenes it guesses by the kind of question for a long time. More
questions at a smaller rate may follow.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from ..core.errors import BadInputError
from ..core.progress import Report, silent
from ..core.rng import derive_seed, seed_everything
from .datasets.scenes import (
    COLOURS,
    END,
    IDS,
    IMAGE,
    PAD,
    PLACES,
    SHAPES,
    START,
    WORDS,
    Labels,
    Question,
    Scene,
    SceneMaker,
    patch_labels,
    pixel_values,
    question_batch,
)
from .stepwise import Stage, fit

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

ANSWERED = 8
"""Questions an image in training."""


@dataclass(frozen=True)
class VLMTraining:
    """How the tiny model is made.

    Args:
        align_steps, align_batch: of the first stage.
        steps, batch: of the second.
        more: steps behind these, from half the rate down to zero, on the hardest scenes.
        parts: equal parts of every batch, each computed by a thread of its own.
        lr: the level of both.
        size, side, most, digits, clutter: of the scenes, see ``SceneMaker``.
        patch: pixels a side of the encoder's patches.
        seed: of everything.

    Raises:
        BadInputError: a value out of range.
    """

    align_steps: int = 370
    align_batch: int = 64
    steps: int = 1700
    batch: int = 48
    more: int = 0
    parts: int = 2
    lr: float = 2e-3
    size: int = 64
    side: int = 14
    most: int = 5
    digits: bool = False
    clutter: int = 0
    patch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.align_steps, self.steps) < 1 or self.more < 0 or min(self.align_batch, self.batch) < 1:
            raise BadInputError("Steps and batches are 1 or more.")
        if self.parts < 1 or self.batch % self.parts or self.align_batch % self.parts:
            raise BadInputError(f"Batches of {self.align_batch} and {self.batch} have no {self.parts} equal parts.")
        if self.patch < 1 or self.size % self.patch:
            raise BadInputError(f"Patches of {self.patch} pixels do not tile {self.size}.", "Take a divisor.")
        self.maker(3, self.most)

    def maker(self, least: int, most: int) -> SceneMaker:
        """Scenes with so many objects."""
        most = min(most, self.most)
        return SceneMaker(self.size, self.side, min(least, most), most, self.digits, self.clutter)

    def curriculum(self, share: float) -> SceneMaker:
        """The scenes of a step of the second stage, by the share of its steps that are done."""
        if share < 0.03:
            return self.maker(1, 1)
        if share < 0.30:
            return self.maker(2, 2)
        if share < 0.45:
            return self.maker(2, 4)
        return self.maker(3, self.most)


def vlm_config(size: int = 64, patch: int = 8, hidden: int = 96) -> LlavaConfig:
    """The tiny model's configuration: 0.7 million weights at a width of 96."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=size,
        patch_size=patch,
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        pad_token_id=IDS[PAD],
        bos_token_id=IDS[START],
        eos_token_id=IDS[END],
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IDS[IMAGE],
        image_seq_length=(size // patch) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        # where generate() looks for them
        pad_token_id=IDS[PAD],
        bos_token_id=IDS[START],
        eos_token_id=IDS[END],
    )


def new_vlm(config: LlavaConfig, seed: int = 0) -> LlavaForConditionalGeneration:
    """The model before training, with keys that copy queries."""
    from transformers import LlavaForConditionalGeneration

    seed_everything(seed)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    return model


def train_vlm(
    config: VLMTraining, folder: Path | None = None, report: Report = silent
) -> tuple[LlavaForConditionalGeneration, dict[str, list[tuple[int, float]]]]:
    """Both stages; the model in evaluation mode and the curves of the losses.

    Args:
        config: sizes and steps.
        folder: where checkpoints lie; a run that was cut goes on from there.
        report: called with ``(stage, done, total)``.
    """
    model = new_vlm(vlm_config(config.size, config.patch), config.seed)
    curves = {}
    aligned = Stage("alignment", config.align_steps, config.lr)
    learned = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    learned += [*model.get_input_embeddings().parameters()]
    parts = range(config.parts)
    losses = [alignment_loss(model, config, part) for part in parts]
    curves["alignment"] = fit(model, losses, aligned, folder, report, learned)
    asked = [question_loss(model, config, part) for part in parts]
    curves["questions"] = fit(model, asked, Stage("questions", config.steps, config.lr), folder, report)
    if config.more:
        later = [question_loss(model, config, part, config.steps) for part in parts]
        stage = Stage("more questions", config.more, config.lr / 2, warmup=0.02, hold=0.3)
        curves["more questions"] = fit(model, later, stage, folder, report)
    return model.eval(), curves


def alignment_loss(
    model: LlavaForConditionalGeneration, config: VLMTraining, part: int = 0
) -> Callable[[int], torch.Tensor]:
    """The first stage's loss of one part of a step."""

    def loss(step: int) -> torch.Tensor:
        maker, count = config.maker(3, config.most), config.align_batch // config.parts
        scenes = maker.draw(count, config.seed, "alignment", step, part)
        features = image_features(model, pixel_values(scenes))
        return naming_loss(model, features, patch_labels(scenes, config.patch))

    return loss


def naming_loss(
    model: LlavaForConditionalGeneration, features: torch.Tensor, labels: Sequence[Labels], quarters: bool = False
) -> torch.Tensor:
    """How badly features name what lies at their places.

    Args:
        features: ``[B, N, d]``, projected.
        labels: colours, shapes and quarters ``[B, N]``, from ``patch_labels``.
        quarters: they must name the quarter of the image too.
    """
    colours, shapes, places = (torch.from_numpy(item).to(features.device) for item in labels)
    table = model.get_input_embeddings().weight
    there = colours >= 0
    named = F.cross_entropy(features[there] @ table[[IDS[word] for word in COLOURS]].T, colours[there])
    named = named + F.cross_entropy(features[there] @ table[[IDS[word] for word in SHAPES]].T, shapes[there])
    if quarters:
        clear = places >= 0
        named = named + F.cross_entropy(features[clear] @ table[[IDS[word] for word in PLACES]].T, places[clear])
    ground = features @ table[IDS[IMAGE]]
    return named + F.binary_cross_entropy_with_logits(ground, (~there).float())


def question_loss(
    model: LlavaForConditionalGeneration, config: VLMTraining, part: int = 0, behind: int = 0
) -> Callable[[int], torch.Tensor]:
    """The second stage's loss of one part of a step.

    Args:
        behind: steps that were made before the first.
    """
    tokens = (config.size // config.patch) ** 2

    def loss(step: int) -> torch.Tensor:
        step += behind
        maker, count = config.curriculum(step / config.steps), config.batch // config.parts
        scenes = maker.draw(count, config.seed, "questions", step, part)
        questions = ask_all(scenes, config.seed, "questions", step, part, count=ANSWERED)
        result: torch.Tensor = model(**question_batch(scenes, questions, tokens)).loss
        return result

    return loss


def ask_all(
    scenes: Sequence[Scene], seed: int, *names: object, count: int = 1, kind: str | None = None
) -> list[list[Question]]:
    """So many questions of every scene, from one named part of a run."""
    rng = random.Random(derive_seed(seed, "asked", *names))
    return [[scene.ask(rng, kind) for _ in range(count)] for scene in scenes]


def image_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Projected features ``[B, N, d]`` of images that all have N tokens."""
    return torch.stack(list(model.get_image_features(pixels, return_dict=True).pooler_output))


# -- measuring --------------------------------------------------------------------------------------------------------
def held_out(count: int, seed: int = 0, maker: SceneMaker | None = None) -> tuple[list[Scene], list[Question]]:
    """Scenes that no training draws, and one question of each."""
    scenes = (maker or SceneMaker()).draw(count, seed, "held out")
    return scenes, [asked[0] for asked in ask_all(scenes, seed, "held out")]


def by_kind(right: Sequence[float], questions: Sequence[Question]) -> dict[str, float]:
    """Share of right answers of every kind of question that was asked."""
    found: dict[str, list[float]] = {}
    for value, asked in zip(right, questions, strict=True):
        found.setdefault(asked.kind, []).append(value)
    return {kind: sum(values) / len(values) for kind, values in sorted(found.items())}


@torch.no_grad()
def right_answers(
    model: LlavaForConditionalGeneration,
    scenes: Sequence[Scene],
    questions: Sequence[Question],
    forward: Callable[[dict[str, torch.Tensor]], torch.Tensor] | None = None,
    image_tokens: int | None = None,
    batch: int = 128,
) -> list[float]:
    """1.0 for every question whose answer is the likeliest next token, else 0.0.

    Args:
        forward: ``inputs -> logits [B, V]`` of the token after the question; None is the model's own forward.
        image_tokens: placeholders of an image; None is the model's own number.
    """
    tokens = image_tokens or model.config.image_seq_length
    plain = forward or (lambda inputs: model(**inputs, logits_to_keep=1).logits[:, -1])
    right: list[float] = []
    for first in range(0, len(scenes), batch):
        some, asked = scenes[first : first + batch], questions[first : first + batch]
        inputs = question_batch(some, [[item] for item in asked], tokens)
        del inputs["labels"]
        cut = {name: inputs[name][:, :-2] for name in ("input_ids", "attention_mask")}  # answer and end
        found = plain({"pixel_values": inputs["pixel_values"], **cut}).argmax(-1)
        wanted = torch.tensor([IDS[item.answer] for item in asked], device=found.device)
        right += (found == wanted).float().tolist()
    return right
