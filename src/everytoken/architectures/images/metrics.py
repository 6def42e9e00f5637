"""How good drawn digits are: Frechet distance of features, class accuracy, and nats a token.

Features are 32 numbers that a small classifier (``digits-classifier``, which ships) has of an image before its answer.
Two sets of images are compared as normal distributions of features (Heusel and others, arXiv 1706.08500)::

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

The distance grows where sets are small, for real images too. So ``image_scores`` compares with the images that were
learned from, and gives beside it the *floor*: the distance of as many real images that were held out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from ...core.errors import BadInputError
from ...core.quiet import quiet_transformers
from ...core.rng import numpy_generator
from ...core.weights import weights_folder
from ..base import OwnWeights
from .data import check_labels, digit_images, digit_split, resized

CLASSIFIER = "digits-classifier"


@strict
class ImageClassifierConfig(PreTrainedConfig):
    """Sizes of the classifier: pixels a side, channels inside, features, classes."""

    model_type = "image-features"

    image_size: int = 16
    width: int = 32
    features: int = 32
    classes: int = 10


class ImageClassifier(OwnWeights, PreTrainedModel):
    """A small convolutional network; ``features`` is what it has of an image before its answer."""

    config_class = ImageClassifierConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ImageClassifierConfig):
        super().__init__(config)
        width = config.width
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(2 * width * (config.image_size // 4) ** 2, config.features),
        )  # fmt: skip
        self.answer = nn.Linear(config.features, config.classes)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keeps torch's own start."""

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features ``[B, features]`` of images ``[B, 1, height, width]``, which are resized where need be."""
        found: torch.Tensor = self.body(resized(images, self.config.image_size).to(self.dtype))
        return found

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Logits ``[B, classes]``."""
        found: torch.Tensor = self.answer(F.relu(self.features(pixel_values)))
        return found


@lru_cache(maxsize=2)
def load_classifier(folder: Path | None = None) -> ImageClassifier:
    """The classifier that ships, or one of a folder, in float32 and evaluation mode."""
    with quiet_transformers():
        place = folder or weights_folder(CLASSIFIER)
        found: ImageClassifier = ImageClassifier.from_pretrained(place, dtype="float32", use_safetensors=True)
    return found.eval().requires_grad_(False)


@torch.no_grad()
def features_of(images: torch.Tensor, batch: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Features ``[B, 32]`` and logits ``[B, 10]`` of images ``[B, 1, height, width]`` from -1 to 1.

    Raises:
        BadInputError: images of another shape, or with values that are no numbers.
    """
    if images.dim() != 4 or images.shape[1] != 1 or not images.is_floating_point():
        raise BadInputError(f"Images are floats of shape [B, 1, height, width]; got {[*images.shape]}.")
    if not bool(images.isfinite().all()):
        raise BadInputError("Some images have values that are no numbers.")
    model = load_classifier()
    features = torch.cat([model.features(part.cpu()) for part in images.split(batch)])
    return features, model.answer(F.relu(features))


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The distance of two sets of features ``[N, d]`` and ``[M, d]`` as normal distributions.

    Raises:
        BadInputError: sets of different width, or with fewer than two rows.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise BadInputError(
            f"Features are two sets of shape [N, d] with two rows at least; got {[*a.shape]} and {[*b.shape]}."
        )
    a, b = a.double(), b.double()
    first, second = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    inner = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * inner
    return max(0.0, float(distance))


def frechet_interval(
    real: torch.Tensor,
    made: torch.Tensor,
    draws: int = 100,
    seed: int = 0,
    classes: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[float, float, float]:
    """The distance of features ``[N, d]`` and ``[M, d]``, and the ends of its 95% interval.

    The interval is 1.96 standard deviations of the distance over bootstrap draws of both sets, to both sides. Quantiles
    of these draws would lie too high, for drawing again makes sets smaller.

    Args:
        classes: of both sets, ``[N]`` and ``[M]``: rows are drawn within their class, so that the shares of classes
            stay what was asked for. None draws from all.

    Raises:
        BadInputError: as ``frechet_distance``, fewer than two draws, or classes of another length.
    """
    if draws < 2:
        raise BadInputError(f"An interval takes two draws at least; got {draws}.")
    value = frechet_distance(real, made)
    groups = classes or (torch.zeros(len(real)), torch.zeros(len(made)))
    if len(groups[0]) != len(real) or len(groups[1]) != len(made):
        raise BadInputError("classes hold one class a row of each set.")
    rng = numpy_generator(seed, "frechet")
    found = []
    for _ in range(draws):
        first, second = (
            item[_drawn_again(group.long().cpu(), rng)] for item, group in zip((real, made), groups, strict=True)
        )
        found.append(frechet_distance(first, second))
    spread = 1.96 * float(torch.tensor(found).std())
    return value, max(0.0, value - spread), value + spread


def _drawn_again(classes: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Rows ``[N]`` drawn with replacement, each from those of its class."""
    order, counts = classes.argsort(stable=True), classes.bincount()
    ordered = classes[order]
    within = (torch.from_numpy(rng.random(len(classes))) * counts[ordered]).long()
    return order[(counts.cumsum(0) - counts)[ordered] + within]


@dataclass(frozen=True)
class ImageScores:
    """How good drawn digits are.

    Attributes:
        frechet, low, high: the distance from the digits to learn from, and its 95% interval.
        floor: the distance of held-out digits from them, as many of each class (at most all 500 of them).
        accuracy: share of images that the classifier takes for the digit that was asked for.
        right: the same, one value an image.
    """

    frechet: float
    low: float
    high: float
    floor: float
    accuracy: float
    right: list[float]


def image_scores(images: torch.Tensor, labels: torch.Tensor, draws: int = 100, seed: int = 0) -> ImageScores:
    """Scores of drawn digits.

    Args:
        images: ``[B, 1, height, width]`` from -1 to 1, of any size; real ones are compared at this size.
        labels: ``[B]``, which digits were asked for; evenly spread, as real ones are.
        draws, seed: of the interval.

    Raises:
        BadInputError: images or labels of another shape or range, or fewer than two images.
    """
    if len(images) != len(labels) or len(images) < 2:
        raise BadInputError(f"Two images and labels at least, one label an image; got {len(images)}, {len(labels)}.")
    check_labels(labels, 10)
    real, digits = digit_images()
    known, held = digit_split()
    side = int(images.shape[-1])
    learned = features_of(resized(real[known], side))[0]
    # of every class the first ones, as many as were asked for: shares of classes weigh heavily in the distance
    rows = [held[digits[held] == label][:count] for label, count in enumerate(labels.bincount(minlength=10).tolist())]
    kept = features_of(resized(real[torch.cat(rows)], side))[0]
    made, logits = features_of(images)
    right = (logits.argmax(-1) == labels.cpu()).float()
    value, low, high = frechet_interval(learned, made, draws, seed, (digits[known], labels))
    return ImageScores(value, low, high, frechet_distance(learned, kept), float(right.mean()), right.tolist())


def nats_per_token(logps: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Minus the mean of log-probabilities ``[...]``, over those that ``mask`` keeps.

    Raises:
        BadInputError: no token to count.
    """
    kept = logps if mask is None else logps[mask.bool()]
    if not kept.numel():
        raise BadInputError("There is no token to count.")
    return -float(kept.double().mean())
