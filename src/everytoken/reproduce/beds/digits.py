"""Handwritten digits for small networks: the 1,797 of scikit-learn, 8 x 8 pixels, one token a pixel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...architectures.images.data import digit_images, digit_split
from ...core.progress import Report
from ...core.rng import derive_seed, numpy_generator, seed_everything
from ...training.stepwise import Stage, fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...core.results import Values

SCALE = 2
"""Every pixel is drawn so many times a side: an even patch is one pixel."""


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``[1797, 1, 16, 16]`` around zero, and their digits ``[1797]``."""
    images, labels = digit_images()
    return images.repeat_interleave(SCALE, 2).repeat_interleave(SCALE, 3), labels


def learn_digits(
    make: Callable[[], PreTrainedModel],
    seed: int,
    steps: int,
    batch: int = 32,
    lr: float = 2e-3,
    learned: int | None = None,
    report: Report | None = None,
    name: str = "digits",
) -> tuple[PreTrainedModel, dict[str, Values]]:
    """Trains a classifier and measures it on the held-out digits, one value a digit.

    Args:
        make: a fresh network, made after seeding.
        learned: how many digits to learn from; None takes all that are not held out.
    """
    images, labels = digits()
    known, held = digit_split(seed)
    known = known[:learned]
    seed_everything(derive_seed(seed, "network"))
    model = make()

    def loss(step: int) -> torch.Tensor:
        rows = known[torch.from_numpy(numpy_generator(seed, "batch", step).integers(0, len(known), batch))]
        found: torch.Tensor = model(images[rows], labels=labels[rows]).loss
        return found

    arguments = {} if report is None else {"report": report}
    fit(model, loss, Stage(name, steps, lr, warmup=0.05, hold=0.5), None, **arguments)  # type: ignore[arg-type]
    return model.eval(), measured(model, held)


@torch.no_grad()
def measured(model: nn.Module, rows: torch.Tensor) -> dict[str, Values]:
    """Right answers and losses of digits, one value each."""
    images, labels = digits()
    logits = torch.cat([model(images[part]).logits.float() for part in rows.split(125)])
    right = (logits.argmax(-1) == labels[rows]).float()
    losses = nn.functional.cross_entropy(logits, labels[rows], reduction="none")
    return {"right answers": right.tolist(), "loss": losses.tolist()}
