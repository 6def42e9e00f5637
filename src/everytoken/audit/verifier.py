"""Whether opened embeddings fit: scores of blocks, and a small verifier over the set of them.

For a block with opened tokens: A is the cosine of their mean embedding with the block's, B that of the block's with the
answer's. A job is the *set* of its opened blocks' pairs (A, B); a verifier may not depend on their order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import BadInputError
from ..core.files import write_text_whole
from ..core.rng import derive_seed
from ..core.settings import read_text

KINDS = ("linear", "deepsets")
HIDDEN = 32


@dataclass(frozen=True)
class Scores:
    """The opened blocks of a job.

    Attributes:
        fit: ``[blocks]`` A, token to block.
        relevance: ``[blocks]`` B, block to answer.
        repeated: how many opened blocks have the vector of another one.
    """

    fit: np.ndarray
    relevance: np.ndarray
    repeated: int = 0

    def features(self) -> np.ndarray:
        """``[4]``: mean and least A, mean and least B."""
        return np.array([self.fit.mean(), self.fit.min(), self.relevance.mean(), self.relevance.min()])


def score(blocks: Sequence[int], block_vectors: np.ndarray, token_vectors: np.ndarray, answer: np.ndarray) -> Scores:
    """Scores of opened leaves.

    Args:
        blocks: ``[k]`` the block of each leaf.
        block_vectors, token_vectors: ``[k, dimensions]``.
        answer: ``[dimensions]``, the auditor's own embedding of the answer.

    Raises:
        BadInputError: nothing was opened.
    """
    if not len(blocks):
        raise BadInputError("No leaf was opened.")
    order: dict[int, list[int]] = {}
    for row, block in enumerate(blocks):
        order.setdefault(block, []).append(row)
    fit, relevance = [], []
    seen: dict[bytes, int] = {}
    for block in sorted(order):  # the order of the openings does not matter, to the last bit
        rows = sorted(order[block], key=lambda row: token_vectors[row].tobytes())
        vector = block_vectors[rows[0]]
        mean = token_vectors[rows].mean(0)
        fit.append(float(mean @ vector) / max(float(np.linalg.norm(mean) * np.linalg.norm(vector)), 1e-12))
        relevance.append(float(vector @ answer) / max(float(np.linalg.norm(vector) * np.linalg.norm(answer)), 1e-12))
        seen[vector.tobytes()] = seen.get(vector.tobytes(), 0) + 1
    return Scores(np.array(fit), np.array(relevance), sum(count - 1 for count in seen.values()))


@dataclass
class Verifier:
    """How much likelier the scores are of an inflated job than of an honest one.

    Args:
        kind: ``"linear"`` (logistic regression on mean and least scores) or ``"deepsets"`` (a permutation-invariant
            network of about 2,400 weights on the pairs; trained with torch, run with numpy).
        embedder: the name of the embedder whose scores it was trained on.

    Raises:
        BadInputError: another kind.
    """

    kind: str = "linear"
    embedder: str = ""
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    bar: float = math.inf

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BadInputError(f"A verifier is {' or '.join(KINDS)}; got {self.kind!r}.")

    def fit(self, honest: Sequence[Scores], inflated: Sequence[Scores], seed: int = 0) -> Verifier:
        """Trains on jobs of both kinds; returns itself.

        Raises:
            BadInputError: fewer than two jobs of a kind.
        """
        if min(len(honest), len(inflated)) < 2:
            raise BadInputError("A verifier learns from two honest and two inflated jobs at least.")
        jobs = [*honest, *inflated]
        labels = np.array([0.0] * len(honest) + [1.0] * len(inflated))
        every = np.concatenate([np.stack([job.fit, job.relevance], 1) for job in jobs])
        self.weights = {"mean": every.mean(0), "deviation": every.std(0) + 1e-6}
        weight = np.where(labels == 1, 0.5 / labels.sum(), 0.5 / (1 - labels).sum())  # even odds before any evidence
        if self.kind == "linear":
            self.weights |= _logistic(np.stack([self._summary(job) for job in jobs]), labels, weight)
        else:
            pairs = [self._pairs(job) for job in jobs]
            self.weights |= _deepsets(pairs, labels, weight, derive_seed(seed, "deepsets"))
        return self

    def calibrate(self, honest: Sequence[Scores], alpha: float) -> Verifier:
        """Sets the bar that at most a share ``alpha`` of further honest jobs passes (split conformal); returns itself.

        Args:
            honest: jobs that ``fit`` has not seen. Fewer than ``1 / alpha - 1`` allow no bar: none is called inflated.
        """
        values = sorted(self.evidence(job) for job in honest)
        rank = math.ceil((1 - alpha) * (len(values) + 1))
        self.bar = values[rank - 1] if rank <= len(values) else math.inf
        return self

    def evidence(self, job: Scores) -> float:
        """The log-likelihood ratio of inflated against honest.

        Raises:
            BadInputError: the verifier was not trained.
        """
        if not self.weights:
            raise BadInputError("This verifier was not trained.", "Call fit, or load one.")
        w = self.weights
        if self.kind == "linear":
            return float(self._summary(job) @ w["slope"] + w["offset"][0])
        hidden = np.tanh(np.tanh(self._pairs(job) @ w["a"] + w["a0"]) @ w["b"] + w["b0"])
        pooled = np.sort(hidden, axis=0).mean(0)  # sorted: the sum does not depend on the order, to the last bit
        return float((np.tanh(pooled @ w["c"] + w["c0"]) @ w["d"] + w["d0"])[0])

    def _pairs(self, job: Scores) -> np.ndarray:
        """``[blocks, 2]`` standardised."""
        pairs: np.ndarray = (np.stack([job.fit, job.relevance], 1) - self.weights["mean"]) / self.weights["deviation"]
        return pairs

    def _summary(self, job: Scores) -> np.ndarray:
        mean, deviation = self.weights["mean"], self.weights["deviation"]
        summary: np.ndarray = (job.features() - np.repeat(mean, 2)) / np.repeat(deviation, 2)
        return summary

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        raw = {"kind": self.kind, "embedder": self.embedder, "bar": None if math.isinf(self.bar) else self.bar}
        weights = {name: value.tolist() for name, value in self.weights.items()}
        write_text_whole(path, json.dumps({"version": 1, **raw, "weights": weights}))

    @classmethod
    def load(cls, path: Path) -> Verifier:
        """Reads what ``save`` wrote.

        Raises:
            BadInputError: something else.
        """
        try:
            raw: dict[str, Any] = json.loads(read_text(path))
            weights = {name: np.array(value, np.float64) for name, value in raw["weights"].items()}
            found = cls(raw["kind"], raw["embedder"], weights, math.inf if raw["bar"] is None else float(raw["bar"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInputError(f"{path} holds no verifier ({error}).") from error
        return found


def _logistic(
    features: np.ndarray, labels: np.ndarray, weight: np.ndarray, ridge: float = 1e-2
) -> dict[str, np.ndarray]:
    """Weighted logistic regression by Newton's method, with a small penalty on the slopes."""
    design = np.concatenate([features, np.ones((len(features), 1))], 1)
    penalty = ridge * np.diag([1.0] * features.shape[1] + [0.0])
    found = np.zeros(design.shape[1])
    for _ in range(50):
        chance = 1 / (1 + np.exp(-np.clip(design @ found, -30, 30)))
        gradient = design.T @ (weight * (chance - labels)) + penalty @ found
        curvature = (design.T * (weight * chance * (1 - chance))) @ design + penalty + 1e-9 * np.eye(len(found))
        step = np.linalg.solve(curvature, gradient)
        found = found - step
        if float(np.abs(step).max()) < 1e-8:
            break
    return {"slope": found[:-1], "offset": found[-1:]}


def _deepsets(pairs: Sequence[np.ndarray], labels: np.ndarray, weight: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Two layers a block, their mean, two layers a job; Adam for 300 steps on all jobs at once."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (2, HIDDEN), "b": (HIDDEN, HIDDEN), "c": (HIDDEN, HIDDEN), "d": (HIDDEN, 1)}
    weights = {}
    for name, (rows, columns) in shapes.items():
        weights[name] = (torch.randn(rows, columns, generator=generator) / math.sqrt(rows)).requires_grad_()
        weights[f"{name}0"] = torch.zeros(columns, requires_grad=True)
    longest = max(map(len, pairs))
    data, mask = torch.zeros(len(pairs), longest, 2), torch.zeros(len(pairs), longest, 1)
    for row, item in enumerate(pairs):
        data[row, : len(item)], mask[row, : len(item)] = torch.tensor(item, dtype=torch.float32), 1.0
    wanted = torch.tensor(labels, dtype=torch.float32)
    share = torch.tensor(weight, dtype=torch.float32)
    optimizer = torch.optim.AdamW(list(weights.values()), lr=1e-2, weight_decay=1e-2)
    for _ in range(300):
        hidden = torch.tanh(torch.tanh(data @ weights["a"] + weights["a0"]) @ weights["b"] + weights["b0"])
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        logits = (torch.tanh(pooled @ weights["c"] + weights["c0"]) @ weights["d"] + weights["d0"])[:, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, share, reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.detach().double().numpy() for name, value in weights.items()}
