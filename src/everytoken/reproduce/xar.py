"""xAR's claims: cells of patches are the best entity, a noisy context beats a clean one, and few calls draw an image.

All networks have the same size and learn the same handwritten digits, as 4 x 4 latents of 8 channels, for equally many
images. Clean context takes a pass of twice as many tokens, so its steps cost more. Then all draw digits with the same
steps an entity and the same guidance. Time is processor time of drawing alone, without the tokenizer.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from .base import Arms, Claim, Context, Reproduction

if TYPE_CHECKING:
    from ..core.results import Values

CELL, PATCH, ROW, IMAGE = "cell", "patch", "row", "whole image"
CLEAN, CLEAN_ROW = "cell, clean context", "row, clean context"
ARMS: dict[str, dict[str, Any]] = {
    CELL: {},
    PATCH: {"entity": "patch"},
    ROW: {"entity": "row"},
    IMAGE: {"entity": "image"},
    CLEAN: {"noisy_context": False},
    CLEAN_ROW: {"entity": "row", "noisy_context": False},
}
FRECHET, RIGHT, SECONDS, CALLS = "Frechet distance", "right digits", "seconds per image", "calls of the network"
WHY = "networks of 0.3M weights, 16 tokens, 1,297 digits; the paper has 172M and more on ImageNet at 256 pixels"
WHY_IMAGE = "one flow over the whole image is a strong baseline at 16 tokens"


def run(context: Context) -> Arms:
    steps, samples = (30, 20) if context.quick else (500, 200)
    names = (CELL, CLEAN) if context.quick else tuple(ARMS)
    return {name: context.part(name, partial(one, context, name, steps, samples)) for name in names}


def one(context: Context, name: str, steps: int, samples: int) -> dict[str, Values]:
    """Trains an arm's network, draws digits, and measures them."""
    from ..architectures.images.metrics import image_scores
    from ..architectures.xar.training import XARTraining, drawn, learn, prepared

    small: dict[str, Any] = {"width": 32, "layers": 2, "draw_steps": 5} if context.quick else {"width": 64, "layers": 4}
    config = XARTraining(steps=steps, batch=32, seed=context.seed, guidance=GUIDANCE, **small, **ARMS[name])
    made, data = prepared(config)
    context.report(f"{name}: learning", 0, 0)
    model, curve = learn(config, made, data, report=context.report)
    context.report(f"{name}: drawing", 0, 0)
    images, labels = drawn(model, samples, context.seed, config.draw_steps, config.guidance)
    scores = image_scores(images, labels, draws=20)
    context.artifacts[name] = {
        "loss": curve[-1][1], "interval of the distance": [scores.low, scores.high], "floor": scores.floor,
        "weights": sum(weight.numel() for weight in model.parameters()),
    }  # fmt: skip
    seconds = timed(model, labels[:20], config.draw_steps, config.guidance)
    calls = float(made.entities * config.draw_steps)
    return {FRECHET: scores.frechet, RIGHT: scores.right, SECONDS: seconds, CALLS: calls}


GUIDANCE = 2.7
"""The paper's, of its base network."""


def timed(model: Any, labels: Any, steps: int, guidance: float) -> float:
    """Processor seconds of an image in a batch; the least of three."""
    least = float("inf")
    for _ in range(3):
        began = time.process_time()
        model.generate(labels, steps, guidance)
        least = min(least, time.process_time() - began)
    return least / len(labels)


REPRODUCTION = Reproduction(
    name="xar",
    summary="digits drawn by cells, patches, rows and as a whole, after noisy and after clean context",
    run=run,
    claims=[
        Claim(FRECHET, CELL, PATCH, "cells are best among entities", "ratio", False, why=WHY),
        Claim(FRECHET, CELL, ROW, "cells are best among entities", "ratio", False, why=WHY),
        Claim(FRECHET, CELL, CLEAN, "noisy context is better", "ratio", False, why=WHY),
        Claim(FRECHET, ROW, CLEAN_ROW, "noisy context is better", "ratio", False, why=WHY),
        Claim(FRECHET, CELL, IMAGE, "FID 1.72, below diffusion transformers", "ratio", False, why=WHY_IMAGE),
        Claim(RIGHT, CELL, PATCH, "not stated", "difference", why=WHY),
        Claim(RIGHT, CELL, CLEAN, "not stated", "difference", why=WHY),
        Claim(RIGHT, CELL, IMAGE, "not stated", "difference", why=WHY_IMAGE),
        Claim(SECONDS, CELL, PATCH, "fewer entities, fewer calls", "ratio", False, why=WHY),
    ],
    extra=("search", "sklearn"),
)
"""The experiment of this paper."""
