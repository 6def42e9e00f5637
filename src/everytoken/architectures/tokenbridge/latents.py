"""Latents to learn from: those of the digits, or those of a file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch.nn import functional as F

from ...core.errors import BadInputError
from ...core.rng import numpy_generator
from ..images.data import CLASSES, digit_images, digit_split
from ..images.tokenizers import KLImageTokenizer, load_image_tokenizer, read_latents

TOKENIZER = "digits-kl"
HELD_SHARE = 10
"""Of a file's latents every so many are held out."""


@dataclass(frozen=True)
class LatentSet:
    """Latents of one autoencoder with their labels.

    Attributes:
        tokenizer: the autoencoder.
        known, known_labels: ``[N, n, C]`` and ``[N]``, to learn from.
        held, held_labels: ``[M, n, C]`` and ``[M]``, never learned from.
        classes: how many labels there are.
    """

    tokenizer: KLImageTokenizer
    known: torch.Tensor
    known_labels: torch.Tensor
    held: torch.Tensor
    held_labels: torch.Tensor
    classes: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.tokenizer.config.grid

    def batch(self, count: int, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents ``[count, n, C]`` and labels ``[count]`` of one step of a run."""
        rows = torch.from_numpy(numpy_generator(seed, "latents", step).integers(0, len(self.known), count))
        return self.known[rows], self.known_labels[rows]


def load_kl(name: str) -> KLImageTokenizer:
    """An autoencoder with continuous latents.

    Raises:
        UnknownNameError: neither a folder nor one that ships.
        BadInputError: a tokenizer with a codebook, or a folder of something else.
    """
    found = load_image_tokenizer(name)
    if not isinstance(found, KLImageTokenizer):
        raise BadInputError(f"{name} has a codebook: its tokens are discrete already.", f"Take {TOKENIZER}.")
    return found


def flat(latents: torch.Tensor) -> torch.Tensor:
    """``[B, C, rows, columns] -> [B, n, C]``, row by row."""
    return latents.flatten(2).transpose(1, 2).contiguous()


def unflat(latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The inverse of ``flat``."""
    return latents.transpose(1, 2).unflatten(2, grid).contiguous()


def shifts(images: torch.Tensor) -> torch.Tensor:
    """Images ``[B, 1, height, width]`` as they are and moved by a pixel, in nine ways: ``[9 B, ...]``."""
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    ways = [(1, 1), (0, 1), (1, 0), (1, 2), (2, 1), (0, 0), (0, 2), (2, 0), (2, 2)]
    return torch.cat([padded[:, :, down : down + height, right : right + width] for down, right in ways])


@lru_cache(maxsize=2)
def digit_latents(name: str = TOKENIZER, moved: bool = True) -> LatentSet:
    """The digits, those to learn from also moved by a pixel in eight ways.

    Args:
        moved: False leaves the moved ones out.

    Raises:
        as ``load_kl``; MissingExtraError: scikit-learn is not installed.
    """
    tokenizer = load_kl(name)
    images, labels = digit_images(tokenizer.config.image_size)
    known, held = digit_split()
    shown = shifts(images[known]) if moved else images[known]
    parts = [flat(tokenizer.encode(part)) for part in shown.split(500)]
    again = labels[known].repeat(len(shown) // len(known))
    return LatentSet(tokenizer, torch.cat(parts), again, flat(tokenizer.encode(images[held])), labels[held], CLASSES)


def file_latents(path: Path, name: str = TOKENIZER) -> LatentSet:
    """The latents of a file that ``images.tokenizers.save_latents`` wrote.

    Raises:
        BadInputError: no such file, or too few latents, or latents of another shape.
        TokenizerMismatchError: latents of another tokenizer.
    """
    tokenizer = load_kl(name)
    latents, labels = read_latents(path, tokenizer.identity)
    config = tokenizer.config
    if latents.dim() != 4 or latents.shape[1:] != (config.latent_channels, *config.grid):
        raise BadInputError(f"{path} holds latents {[*latents.shape]}, not those of images of {name}.")
    if len(latents) < HELD_SHARE or len(labels) != len(latents) or int(labels.min()) < 0:
        raise BadInputError(f"{path} needs {HELD_SHARE} latents at least, with one label of 0 or more each.")
    tokens, labels = flat(latents.float()), labels.long()
    kept = torch.arange(len(tokens)) % HELD_SHARE == 0
    return LatentSet(tokenizer, tokens[~kept], labels[~kept], tokens[kept], labels[kept], int(labels.max()) + 1)
