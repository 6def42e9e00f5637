"""Texts with weights: what judges their tokens, and how they are drawn again in proportion to their weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..decoding.row import DecodingRow
from .base import Constraint
from .engine.vocabulary import TokenizerInfo


class Judge(Protocol):
    """Tests tokens one at a time; what a ``Matcher`` does, and less than it."""

    def accepts(self, token: int, /) -> bool: ...

    def accept_token(self, token: int, /) -> bool: ...

    def is_terminated(self) -> bool: ...

    def fork(self) -> Judge: ...


class TextJudge:
    """A constraint on texts, asked token by token."""

    def __init__(self, constraint: Constraint, info: TokenizerInfo, text: bytes = b""):
        self.constraint, self.info, self.text = constraint, info, text

    def accepts(self, token: int) -> bool:
        if token in self.info.stop_token_ids:
            return self.constraint.complete(self.text)
        piece = self.info.vocabulary[token] if token < len(self.info.vocabulary) else None
        return bool(piece) and self.constraint.prefix(self.text + piece)  # type: ignore[operator]

    def accept_token(self, token: int) -> bool:
        if token not in self.info.stop_token_ids:
            self.text += self.info.vocabulary[token] or b""
        return True

    def is_terminated(self) -> bool:
        return False  # the call's stopping criteria end the text

    def fork(self) -> TextJudge:
        return TextJudge(self.constraint, self.info, self.text)


@dataclass
class Particle:
    """One text, as a row of its own, with its weight and the tests it took."""

    judge: Judge
    row: DecodingRow
    log_weight: float = 0.0
    finished: bool = False
    evaluations: int = 0

    def fork(self) -> Particle:
        return Particle(self.judge.fork(), self.row.fork(), self.log_weight, self.finished, self.evaluations)


def resample(weights: np.ndarray, rng: np.random.Generator, method: str = "stratified") -> np.ndarray:
    """Ancestors for each of N particles, in proportion to normalised weights."""
    count = len(weights)
    if method == "multinomial":
        return rng.choice(count, count, p=weights)
    points = (np.arange(count) + rng.random(count)) / count
    return np.minimum(np.searchsorted(np.cumsum(weights), points), count - 1)


def normalised(log_weights: np.ndarray) -> np.ndarray:
    """Weights that sum to one."""
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def log_mean(log_weights: np.ndarray) -> float:
    """The logarithm of the mean weight."""
    return float(log_weights.max() + math.log(np.exp(log_weights - log_weights.max()).mean()))


def effective_sample_size(weights: np.ndarray) -> float:
    return float(1.0 / np.square(weights).sum())
