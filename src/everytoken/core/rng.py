"""Seeding: one call that makes a run repeatable, and independent streams derived from one seed."""

from __future__ import annotations

import hashlib
import random

import numpy as np


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and (if it is loaded or installed) torch, on every device.

    Raises:
        ValueError: the seed is not an integer in [0, 2**32).
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"A seed is an integer from 0 to 2**32 - 1; got {seed!r}.")
    random.seed(seed)
    np.random.seed(seed)
    import torch

    torch.manual_seed(seed)


def derive_seed(seed: int, *names: object) -> int:
    """A seed for one named part of a run, independent of the others and stable across processes and versions."""
    text = "\x1f".join(map(str, (seed, *names))).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big")


def numpy_generator(seed: int, *names: object) -> np.random.Generator:
    """A numpy generator for one named part of a run."""
    return np.random.default_rng(derive_seed(seed, *names))
