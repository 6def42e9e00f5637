"""Token-Shuffle's claims: many fewer positions for images, at little cost.

Networks with windows of 1 x 1 (the plain language model), 2 x 2 and 4 x 4 pixels learn the same handwritten digits for
equally many steps, so that all see equally many images. A pixel's grey level is a token. Time is processor time on one
thread, of whole batches. What independence inside a window costs is also computed exactly, from the digits themselves.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from .base import Arms, Claim, Context, Reproduction

if TYPE_CHECKING:
    import torch

    from ..architectures.token_shuffle.modeling_token_shuffle import TokenShuffleForConditionalGeneration
    from ..core.results import Values

ARMS = {"window 1": 1, "window 2": 2, "window 4": 4}
ONE, TWO, FOUR = ARMS
NATS, RIGHT = "nats per token", "class accuracy"
DRAWING, LEARNING = "seconds per image, drawing", "seconds per image, learning"
FRECHET, STROKES = "Frechet distance", "strokes as asked for"
WHY = "networks of 0.2M weights, digits of 8 x 8 pixels; the paper has 2.7B weights and images of up to 2,048 pixels"
WHY_TIME = "on a processor, 64 image tokens; the paper states 4 times fewer positions"
GUIDANCE = 2.0


def run(context: Context) -> Arms:
    return {name: context.part(name, partial(measured, context, name)) for name in ARMS}


def measured(context: Context, name: str) -> dict[str, Values]:
    """Trains a network of one window, and measures time, nats and drawn images."""
    from ..architectures.images.metrics import image_scores
    from ..architectures.token_shuffle.digits import STROKES as WORDS
    from ..architectures.token_shuffle.digits import (
        codes_of,
        held_rows,
        image_codes,
        learned_rows,
        strokes_of,
        words_for,
    )
    from ..architectures.token_shuffle.training import TokenShuffleTraining, image_nats, learn

    steps, batch, count = (4, 8, 10) if context.quick else (400, 32, 200)
    width, layers = (32, 4) if context.quick else (64, 4)
    config = TokenShuffleTraining(
        window=ARMS[name], steps=steps, batch=batch, lr=4e-3, width=width, layers=layers, heads=4, seed=context.seed
    )
    codes = image_codes("levels")
    model = config.begin(codes)
    context.artifacts[f"weights, {name}"] = sum(weight.numel() for weight in model.parameters())
    model(**learned_rows(codes, batch, context.seed, 0)).loss.backward()  # digits and kernels are loaded at first use
    model.zero_grad()
    began = time.process_time()
    learn(model, codes, config, None, context.report, name)
    learning = (time.process_time() - began) / (steps * batch)
    held = held_rows(codes, count if context.quick else None)
    labels, strokes = held_labels(count)
    images, drawing = drawn(model, words_for(labels, strokes), context.seed)
    found: dict[str, Values] = {
        NATS: image_nats(model, held).tolist(),
        DRAWING: drawing,
        LEARNING: learning,
    }
    scores = image_scores(images, labels)
    found |= {RIGHT: scores.right, FRECHET: scores.frechet}
    found[STROKES] = (strokes_of(images, labels) == strokes).float().tolist()
    context.artifacts[f"Frechet interval, {name}"] = [scores.low, scores.high, scores.floor]
    context.artifacts[f"first images, {name}"] = codes_of(model.config).encode(images[:10]).flatten(1).tolist()
    context.artifacts["strokes"] = list(WORDS)
    return found


def held_labels(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits and strokes to draw ``[count]``: all pairs in turn."""
    import torch

    number = torch.arange(count)
    return number % 10, number // 10 % 3


def drawn(model: TokenShuffleForConditionalGeneration, texts: list[str], seed: int) -> tuple[torch.Tensor, float]:
    """An image for each text, and the processor seconds that one took. Few are drawn first: kernels are loaded then."""
    from ..architectures.token_shuffle.digits import codes_of, text_ids, text_tokenizer
    from ..core.rng import derive_seed

    ids, mask = text_ids(text_tokenizer(), texts)
    seeds = [derive_seed(seed, "image", number) for number in range(len(texts))]
    model.generate(ids[:2], mask[:2], seeds=seeds[:2], guidance=GUIDANCE)
    began = time.process_time()
    found = model.generate(ids, mask, seeds=seeds, guidance=GUIDANCE)
    seconds = (time.process_time() - began) / len(texts)
    return codes_of(model.config).decode(found.codes), seconds


REPRODUCTION = Reproduction(
    name="token-shuffle",
    summary="digits drawn pixel by pixel, and by windows of 2 x 2 and 4 x 4 pixels",
    run=run,
    claims=[
        Claim(DRAWING, TWO, ONE, "4 times fewer positions", "ratio", False, 1 / 3, WHY_TIME),
        Claim(LEARNING, TWO, ONE, "4 times fewer positions", "ratio", False, 1 / 2, WHY_TIME),
        Claim(DRAWING, FOUR, TWO, "4 times fewer positions again", "ratio", False, 1 / 2, WHY_TIME),
        Claim(RIGHT, TWO, ONE, "nearly free in quality", "difference", True, -0.05, WHY),
        Claim(NATS, TWO, ONE, "nearly free in quality", "difference", False, 0.15, WHY),
        Claim(RIGHT, FOUR, TWO, "4 x 4 is visibly worse", "difference", False, why=WHY),
        Claim(NATS, FOUR, TWO, "4 x 4 is visibly worse", "difference", why=WHY),
    ],
    extra=("search", "sklearn"),
)
