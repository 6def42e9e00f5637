"""What fewer tokens change besides speed (arXiv 2505.18227), on the tiny model of scenes.

All tokens, 16 of 64 by DivPrune, by FastV and by chance, and as many as the shipped policy finds worth their cost,
answer the same questions: with few objects and many, with clutter, about what is absent, and behind many other
questions. Two arms also train the model for a few steps with all tokens and with 16, for the stability of the loss.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from .base import Arms, Claim, Context, Reproduction
from .beds.scenes import cost, reduced

if TYPE_CHECKING:
    from ..core.results import Values
    from ..reduction.base import Reducer

ALL, POLICY, DIVERSE, FASTV, RANDOM = "all tokens", "policy", "DivPrune", "FastV", "random"
KEEP = 0.25
SPREAD, TRAINED = "jumps of the loss", "right answers after training"
CROWDED = "5 objects and clutter"
WHY = "64 tokens of a model of 0.7M weights and answers of one word; the paper measures nothing, its claims are others'"


def reducers() -> dict[str, Reducer | None]:
    """Arm -> its reducer; all in original positions."""
    from ..reduction.baselines import RandomTokens
    from ..reduction.divprune import DivPrune
    from ..reduction.fastv import FastV
    from ..reduction.policy_reducer import PolicyReducer

    return {
        ALL: None,
        POLICY: PolicyReducer(),
        DIVERSE: DivPrune(keep=KEEP),
        FASTV: FastV(layer=1, remove=1 - KEEP),
        RANDOM: RandomTokens(keep=KEEP),
    }


def run(context: Context) -> Arms:
    from ..core.vision import load_vlm
    from ..reduction.beyond import beyond_efficiency

    count = 64 if context.quick else 250
    model = load_vlm(dtype="float32", device="cpu")

    def arm(name: str, reducer: Reducer | None) -> dict[str, Values]:
        context.report(f"answering with {name}", 0, 0)
        with reduced(model, reducer, "original", context.seed):
            found: dict[str, Values] = dict(beyond_efficiency(model, count, context.seed).values)  # type: ignore[arg-type]
        return found | (stability(reducer, context) if name in (ALL, DIVERSE) else {})

    arms: Arms = {name: context.part(name, partial(arm, name, reducer)) for name, reducer in reducers().items()}
    context.artifacts["cost"] = {name: cost(model, reducer, "original") for name, reducer in reducers().items()}
    context.artifacts["share of kept tokens by row, from the top"] = context.part("rows", partial(rows, context))
    return arms


def stability(reducer: Reducer | None, context: Context) -> dict[str, Values]:
    """Training the shipped model a little further, with a reducer or without: how its loss jumps, and its answers."""
    from ..core.vision import load_vlm
    from ..reduction.beyond import loss_spread
    from ..reduction.vision_training import SceneQuestions, scene_maker, share_right
    from ..training.stepwise import Stage, fit

    model = load_vlm(dtype="float32", device="cpu")
    questions = SceneQuestions(model.config.image_seq_length, scene_maker(model), context.seed)
    stage = Stage("further", 8 if context.quick else 48, 1e-3, warmup=0.1, hold=0.5)
    with reduced(model, reducer, "original", context.seed):
        curve = fit(model, lambda step: model(**questions.batch(8, "further", step)).loss, stage, report=context.report)
        return {SPREAD: loss_spread(curve), TRAINED: share_right(model, count=64 if context.quick else 256)}


def rows(context: Context) -> dict[str, list[float]]:
    """Where in the image the tokens lie that each arm keeps before the decoder."""
    from ..core.vision import load_vlm
    from ..reduction.beyond import kept_rows
    from ..training.datasets.scenes import question_batch
    from ..training.vision import held_out

    model = load_vlm(dtype="float32", device="cpu")
    scenes, asked = held_out(64, context.seed)
    batch = question_batch(scenes, [[item] for item in asked], model.config.image_seq_length)
    del batch["labels"]
    found = {}
    for name, reducer in reducers().items():
        with reduced(model, reducer, "original", context.seed) as run:
            model(**batch)
        if run is not None and run.last.reductions:
            found[name] = kept_rows(run.last.reductions, (8, 8))
    return found


REPRODUCTION = Reproduction(
    name="token-reduction",
    summary="false answers, distractors, long inputs and training with all visual tokens and with a quarter of them",
    run=run,
    claims=[
        Claim(f"right answers, {CROWDED}", POLICY, ALL, "choosing helps beyond speed", "difference", why=WHY),
        Claim(f"right answers, {CROWDED}", POLICY, RANDOM, "a learned choice", "difference", why=WHY),
        Claim("right answers, 5 objects", POLICY, ALL, "no loss", "difference", threshold=-0.05, why=WHY),
        Claim(f"right answers, {CROWDED}", DIVERSE, ALL, "choosing helps beyond speed", "difference", why=WHY),
        Claim(
            f"false yes, {CROWDED}", POLICY, ALL, "less hallucination", "difference", higher_is_better=False, why=WHY
        ),
        Claim("right answers behind 31 questions", POLICY, ALL, "coherence of long inputs", "difference", why=WHY),
        Claim(SPREAD, DIVERSE, ALL, "stable training", "ratio", higher_is_better=False, why=WHY),
    ],
    extra=("vision", "PIL"),
)
