"""M3's claims on the tiny model of scenes: one model for every number of tokens.

All arms go on from the shipped model for equally many steps: M3 on 64, 16, 4 and 1 tokens at once; one model on all 64
tokens, whose tokens are pooled at test time only; and one model for each smaller scale.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from .base import Arms, Claim, Context, Reproduction

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..core.results import Values

SCALES = (64, 16, 4, 1)
M3, PLAIN = "M3", "all tokens, pooled at test time"
WHY = "64 tokens of a model of 0.7M weights, and answers of one word about coloured shapes"


def own(scale: int) -> str:
    """The arm that is trained for one scale."""
    return f"trained for {scale} tokens"


def measured_at(model: PreTrainedModel, tokens: int, count: int, seed: int) -> list[float]:
    """1.0 for every question that is answered right with so many pooled tokens an image, else 0.0."""
    from ..reduction.m3 import MatryoshkaPool
    from ..reduction.vision_training import reduced_forward, scene_maker
    from ..training.vision import held_out, right_answers

    scenes, questions = held_out(count, seed, scene_maker(model))
    return right_answers(model, scenes, questions, reduced_forward(model, MatryoshkaPool(tokens)))  # type: ignore[arg-type]


def run(context: Context) -> Arms:
    from ..core.vision import load_vlm
    from ..reduction.m3 import GranularityReport
    from ..reduction.m3_training import M3Training, train_scales
    from ..reduction.vision_training import SceneQuestions, scene_maker

    steps, count = (4, 128) if context.quick else (300, 1000)
    config = M3Training(steps=steps, batch=4 if context.quick else 16, seed=context.seed)

    def arm(trained: tuple[int, ...], measured: tuple[int, ...]) -> dict[str, Values]:
        model = load_vlm(dtype="float32", device="cpu")
        questions = SceneQuestions(model.config.image_seq_length, scene_maker(model), context.seed)
        train_scales(model, questions, trained, config, report=context.report)
        return {f"right answers, {scale} tokens": measured_at(model, scale, count, context.seed) for scale in measured}

    arms: Arms = {
        M3: context.part(M3, partial(arm, SCALES, SCALES)),
        PLAIN: context.part(PLAIN, partial(arm, (64,), SCALES)),
    }
    for scale in SCALES[1:3]:
        arms[own(scale)] = context.part(own(scale), partial(arm, (scale,), (scale,)))
    for name in (M3, PLAIN):
        right = {scale: [value > 0 for value in arms[name][f"right answers, {scale} tokens"]] for scale in SCALES}  # type: ignore[union-attr]
        share, tokens = GranularityReport(right).oracle()
        context.artifacts[f"oracle of {name}"] = {"right answers": share, "mean tokens": tokens}
    return arms


REPRODUCTION = Reproduction(
    name="m3",
    summary="one model trained on nested scales, one on all tokens, and one for each scale, by right answers",
    run=run,
    claims=[
        Claim("right answers, 16 tokens", M3, PLAIN, "69.5 against 61.7 at a quarter", "difference", why=WHY),
        Claim("right answers, 4 tokens", M3, PLAIN, "68.6 against 50.8 at a sixteenth", "difference", why=WHY),
        Claim("right answers, 64 tokens", M3, PLAIN, "68.0 against 67.2", "difference", threshold=-0.02, why=WHY),
        Claim("right answers, 16 tokens", M3, own(16), "within 2 points", "difference", threshold=-0.02, why=WHY),
    ],
    extra=("vision", "PIL"),
)
