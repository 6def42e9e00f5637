"""Handwritten digits: the 1,797 of scikit-learn (8 x 8 pixels), and which of them are never learned from."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn import functional as F

from ...core.errors import BadInputError, require
from ...core.rng import numpy_generator

HELD = 500
"""Digits that are never learned from."""
CLASSES = 10
SIDE = 8
"""Pixels a side as they ship."""


@lru_cache(maxsize=4)
def digit_images(side: int = SIDE) -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``[1797, 1, side, side]`` from -1 to 1, and their digits ``[1797]``.

    Args:
        side: pixels a side; other sizes than 8 are resized by a bicubic filter.

    Raises:
        BadInputError: a side below 1.
        MissingExtraError: scikit-learn is not installed.
    """
    if side < 1:
        raise BadInputError(f"Images have one pixel a side at least; got {side}.")
    require("sklearn", "search", "The digits")
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    return resized(images, side), torch.from_numpy(found.target).long()


def digit_split(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to learn from ``[1297]``, and held-out ones ``[500]``, for a seed.

    What ships (tokenizers, the classifier) never saw the rows that seed 0 holds out.
    """
    order = torch.from_numpy(numpy_generator(seed, "digits").permutation(1797))
    return order[HELD:], order[:HELD]


def resized(images: torch.Tensor, side: int) -> torch.Tensor:
    """Images ``[B, channels, height, width]`` as ``[B, channels, side, side]`` from -1 to 1."""
    if images.shape[-2:] == (side, side):
        return images
    found = F.interpolate(images.float(), size=(side, side), mode="bicubic", align_corners=False, antialias=True)
    return found.clamp(-1, 1)


def digit_batch(count: int, seed: int, step: int, side: int = SIDE) -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``[count, 1, side, side]`` to learn from and their digits ``[count]``, drawn for one step of a run."""
    images, labels = digit_images(side)
    known = digit_split()[0]
    rows = known[torch.from_numpy(numpy_generator(seed, "digits", step).integers(0, len(known), count))]
    return images[rows], labels[rows]


def check_labels(labels: torch.Tensor, classes: int) -> None:
    """Raises BadInputError unless ``labels`` are integers ``[B]`` from 0 to ``classes - 1``."""
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise BadInputError(f"Labels are integers of shape [B]; got {labels.dtype} {[*labels.shape]}.")
    if len(labels) and not bool(((labels >= 0) & (labels < classes)).all()):
        raise BadInputError(f"Labels lie from 0 to {classes - 1}; got {int(labels.min())} to {int(labels.max())}.")
