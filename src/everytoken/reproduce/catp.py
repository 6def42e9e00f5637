"""CATP's claim on few-shot prompts: most image tokens can go, where other reducers lose the answer.

A prompt holds four images with answers and a fifth without. ``what?`` asks for the colour of the one object in all
five, or for its shape in all five: which of both it is must be read from the demonstrations, and the answer from the
last image. The shipped model of scenes learns such prompts first (it knows single images only), with all tokens. Then
it answers with 50, 67, 78 and 90% of the image tokens removed.

The model has three decoder layers. So CATP cuts the demonstrations behind the second of them, and there is no layer
left behind a cut of the query's image, which its first step alone shortens: it attends to more tokens than the others
at the same share, and the result file says to how many.
"""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING

from .base import Arms, Claim, Context, Reproduction
from .beds.scenes import reduced

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..reduction.base import Reducer
    from ..training.datasets.scenes import SceneMaker

SHOTS = 4
REMOVED = {"50%": 0.5, "67%": 2 / 3, "78%": 7 / 9, "90%": 0.9}
ALL, CATP_ARM, DIVERSE, FASTV, RANDOM = "all tokens", "CATP", "DivPrune", "FastV", "random"
WHY = (
    "five images of 64 tokens, one attribute to read, and three decoder layers, so that the query's image is cut once; "
    "the paper's models have 32 layers and answer open questions"
)


def metric(removed: str) -> str:
    """The name of a measurement."""
    return f"right answers, {removed} removed"


def maker() -> SceneMaker:
    """One object an image, on a cluttered ground."""
    from ..training.datasets.scenes import SceneMaker

    return SceneMaker(least=1, most=1, clutter=8)


def few_shot(count: int, image_tokens: int, seed: int, *names: object) -> dict[str, torch.Tensor]:
    """Few-shot prompts with their answers: ``pixel_values [count (SHOTS + 1), 3, 64, 64]``, ``input_ids [count, T]``.

    Labels are -100 but at answers and end tokens; the first demonstration's answer, which nothing tells, has none.
    """
    import torch

    from ..core.rng import derive_seed
    from ..training.datasets.scenes import END, IDS, IMAGE, WHAT, pixel_values

    scenes = maker().draw(count * (SHOTS + 1), seed, "few-shot", *names)
    rng = random.Random(derive_seed(seed, "rules", *names))
    rows, labels = [], []
    for start in range(0, len(scenes), SHOTS + 1):
        by_colour = rng.random() < 0.5
        row, label = [], []
        for number, scene in enumerate(scenes[start : start + SHOTS + 1]):
            (thing,) = scene.things
            said = [IDS[thing.colour if by_colour else thing.shape], IDS[END]]
            row += [IDS[IMAGE]] * image_tokens + [IDS[WHAT], *said]
            label += [-100] * (image_tokens + 1) + (said if number else [-100, -100])
        rows.append(row)
        labels.append(label)
    ids = torch.tensor(rows)
    return {
        "pixel_values": pixel_values(scenes),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.tensor(labels),
    }


def learned(context: Context) -> PreTrainedModel:
    """The shipped model after training on few-shot prompts with all tokens."""
    from ..core.vision import load_vlm
    from ..training.stepwise import Stage, fit

    model = load_vlm(dtype="float32", device="cpu")
    tokens, batch = model.config.image_seq_length, 2 if context.quick else 8
    stage = Stage("few-shot", 6 if context.quick else 240, 1e-3, warmup=0.05, hold=0.6)

    def loss(step: int) -> torch.Tensor:
        found: torch.Tensor = model(**few_shot(batch, tokens, context.seed, "training", step)).loss
        return found

    fit(model, loss, stage, context.folder, context.report)
    return model


def answers(model: PreTrainedModel, count: int, seed: int, batch: int = 20) -> list[float]:
    """1.0 for every prompt whose last answer is the likeliest next token, else 0.0."""
    import torch

    right: list[float] = []
    for first in range(0, count, batch):
        some = few_shot(min(batch, count - first), model.config.image_seq_length, seed, "held out", first)
        cut = {name: some[name][:, :-2] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits = model(**cut, pixel_values=some["pixel_values"], logits_to_keep=1).logits[:, -1]
        right += (logits.argmax(-1) == some["input_ids"][:, -2]).float().tolist()
    return right


def reducer_of(arm: str, share: float) -> Reducer:
    """An arm's reducer for a share of the image tokens to remove."""
    from ..reduction.baselines import RandomTokens
    from ..reduction.catp import CATP
    from ..reduction.divprune import DivPrune
    from ..reduction.fastv import FastV

    made: dict[str, Reducer] = {
        CATP_ARM: CATP(remove=share, layer=1, query_stage=False),
        DIVERSE: DivPrune(keep=1 - share),
        FASTV: FastV(layer=1, remove=share),
        RANDOM: RandomTokens(keep=1 - share),
    }
    return made[arm]


def attended(model: PreTrainedModel, reducer: Reducer | None, seed: int) -> float:
    """Image tokens that a prompt's decoder layers see, all layers together."""
    tokens = model.config.image_seq_length
    batch = few_shot(4, tokens, seed, "cost")
    del batch["labels"]
    layers, text = model.config.get_text_config().num_hidden_layers, batch["input_ids"].shape[1] - tokens * (SHOTS + 1)
    with reduced(model, reducer, "original", seed) as run:
        model(**batch, logits_to_keep=1)
    if run is None:
        return float(layers * tokens * (SHOTS + 1))
    if run.lengths:
        return sum(sum(seen) / 4 - text for seen in run.lengths.values())
    return layers * run.last.tokens_after / 4


def run(context: Context) -> Arms:
    count = 16 if context.quick else 300
    model = learned(context)
    # CATP's two halves number differently: packed before the decoder, as in the paper; all others keep every number
    positions = {CATP_ARM: "packed"}

    def full() -> dict[str, list[float]]:
        right = answers(model, count, context.seed)
        return {metric(name): right for name in REMOVED}

    def shortened(arm: str) -> dict[str, list[float]]:
        found = {}
        for name, share in REMOVED.items():
            context.report(f"{arm}, {name} removed", 0, 0)
            with reduced(model, reducer_of(arm, share), positions.get(arm, "original"), context.seed):
                found[metric(name)] = answers(model, count, context.seed)
        return found

    arms: Arms = {ALL: dict(context.part(ALL, full))}
    for arm in (CATP_ARM, DIVERSE, FASTV, RANDOM):
        arms[arm] = dict(context.part(arm, partial(shortened, arm)))
    context.artifacts["image tokens attended, all layers"] = {ALL: attended(model, None, context.seed)} | {
        f"{arm}, {name} removed": attended(model, reducer_of(arm, share), context.seed)
        for arm in (CATP_ARM, DIVERSE, FASTV, RANDOM)
        for name, share in REMOVED.items()
    }
    return arms


REPRODUCTION = Reproduction(
    name="catp",
    summary="few-shot prompts of five images with all tokens and with 50 to 90% of them removed, by right answers",
    run=run,
    claims=[
        Claim(metric("78%"), CATP_ARM, ALL, "100.1% of all tokens", "difference", threshold=-0.02, why=WHY),
        Claim(metric("78%"), CATP_ARM, DIVERSE, "100.1 against 86.3%", "difference", why=WHY),
        Claim(metric("78%"), CATP_ARM, FASTV, "100.1 against 82.4%", "difference", why=WHY),
        Claim(metric("78%"), CATP_ARM, RANDOM, "100.1 against 85.4%", "difference", why=WHY),
        Claim(metric("67%"), CATP_ARM, ALL, "100.7% of all tokens", "difference", threshold=-0.02, why=WHY),
        Claim(metric("90%"), CATP_ARM, ALL, "98.6% of all tokens", "difference", threshold=-0.05, why=WHY),
    ],
    extra=("vision", "PIL"),
)
