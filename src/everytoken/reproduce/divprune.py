"""DivPrune's claims on the tiny model of scenes: right answers with an eighth and with a quarter of the visual tokens.

Every arm answers the same held-out questions with the same model; only what it sees of an image differs: all 64 tokens,
DivPrune's choice, a random one, or what the question attends to behind the first decoder layer (FastV). The choices are
numbered anew (packed) and, in arms of their own, keep their places (original), as FastV does by its nature.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from .base import Arms, Claim, Context, Reproduction

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..reduction.base import Reducer

ALL, OURS, RANDOM, ATTENTION = "all tokens", "DivPrune", "random", "FastV behind layer 0"
PLACED, RANDOM_PLACED = "DivPrune, original positions", "random, original positions"
COUNTS = (16, 8)
TOTAL = 64
WHY = "64 tokens of a model of 0.7M weights, and answers of one word about coloured shapes on a clean ground"


def forward(
    model: PreTrainedModel, reducer: Reducer, positions: str | None, seed: int, inputs: dict[str, torch.Tensor]
) -> torch.Tensor:
    """``[B, V]`` logits behind the question, with fewer visual tokens."""
    import torch

    from ..reduction.seam import reduce_tokens

    generator = torch.Generator().manual_seed(seed)
    with reduce_tokens(model, reducer, positions, generator):
        return model(**inputs, logits_to_keep=1).logits[:, -1]


def run(context: Context) -> Arms:
    from ..core.vision import load_vlm
    from ..reduction.baselines import RandomTokens
    from ..reduction.divprune import DivPrune
    from ..reduction.fastv import FastV
    from ..training.vision import held_out, right_answers

    model = load_vlm(dtype="float32", device="cpu")
    scenes, questions = held_out(96 if context.quick else 1000, context.seed)

    def answers(reducer: Reducer | None, positions: str | None = None) -> list[float]:
        way = None if reducer is None else partial(forward, model, reducer, positions, context.seed)
        return right_answers(model, scenes, questions, way)

    whole = context.part(ALL, lambda: answers(None))
    arms: Arms = {ALL: {metric(count): whole for count in COUNTS}}
    for count in COUNTS:
        keep = count / TOTAL
        ways: dict[str, tuple[Reducer, str | None]] = {
            OURS: (DivPrune(keep=keep), None),
            PLACED: (DivPrune(keep=keep), "original"),
            RANDOM: (RandomTokens(keep), None),
            RANDOM_PLACED: (RandomTokens(keep), "original"),
            ATTENTION: (FastV(layer=1, remove=1 - keep), None),
        }
        for name, (reducer, positions) in ways.items():
            found = context.part(f"{name}, {count}", lambda way=reducer, places=positions: answers(way, places))
            arms.setdefault(name, {})[metric(count)] = found
    return arms


def metric(count: int) -> str:
    """The metric's name at so many tokens."""
    return f"right answers, {count} of {TOTAL} tokens"


REPRODUCTION = Reproduction(
    name="divprune",
    summary="one model with all visual tokens, DivPrune's, random ones and those that the question attends to",
    run=run,
    claims=[
        Claim(metric(8), OURS, RANDOM, "above random choice", "difference", why=WHY),
        Claim(metric(8), PLACED, RANDOM_PLACED, "above random choice", "difference", why=WHY),
        Claim(metric(8), PLACED, ATTENTION, "COCO CIDEr 0.96 against 0.06 of FastV", "difference", why=WHY),
        Claim(metric(8), PLACED, ALL, "within 5 points of all tokens", "difference", threshold=-0.05, why=WHY),
        Claim(metric(8), OURS, ALL, "within 5 points of all tokens", "difference", threshold=-0.05, why=WHY),
        Claim(metric(16), PLACED, ALL, "within 5 points of all tokens", "difference", threshold=-0.05, why=WHY),
    ],
    extra=("vision", "PIL"),
)
