"""What a decoder's samples, streams and counters are compared with."""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
from transformers import PreTrainedModel

from ..decoding.call import DecodingStats


class Recorder:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


def chi_square_bound(freedom: int, z: float = 3.72) -> float:
    """The value that chi-square with so many degrees of freedom stays below in all but one of 10,000 cases."""
    share = 2 / (9 * freedom)
    return freedom * (1 - share + z * math.sqrt(share)) ** 3  # Wilson and Hilferty's approximation


def exact_distribution(
    model: PreTrainedModel, prompt: list[int], steps: int, temperature: float = 1.0, top_k: int = 0, end: int = 0
) -> dict[tuple[int, ...], float]:
    """The probability of every continuation of ``steps`` tokens, by enumeration; what follows ``end`` is padding
    (0)."""
    tails = list(itertools.product(range(model.config.vocab_size), repeat=steps))
    with torch.no_grad():
        logits = model(torch.tensor([prompt + list(tail) for tail in tails])).logits[:, len(prompt) - 1 : -1]
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    chosen = torch.softmax(logits, -1).gather(-1, torch.tensor(tails)[..., None])[..., 0]
    exact: dict[tuple[int, ...], float] = {}
    for tail, prob in zip(tails, chosen.prod(-1).tolist(), strict=True):
        length = tail.index(end) + 1 if end in tail else steps
        text = tail[:length] + (0,) * (steps - length)
        exact[text] = exact.get(text, 0.0) + prob
    return exact


def check_distribution(counts: dict[tuple[int, ...], int], exact: dict[tuple[int, ...], float]) -> None:
    """Asserts that samples follow a distribution (chi-square; rare outcomes are counted together)."""
    draws = sum(counts.values())
    assert all(exact[key] > 0 for key in counts), "An impossible text was sampled."
    frequent = [key for key in exact if exact[key] * draws >= 5]
    pairs = [(counts.get(key, 0), exact[key] * draws) for key in frequent]
    rest = (draws - sum(seen for seen, _ in pairs), draws - sum(wanted for _, wanted in pairs))
    pairs += [rest] if rest[1] > 1 else []
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in pairs)
    assert statistic < chi_square_bound(len(pairs) - 1), f"chi-square {statistic:.1f} with {len(pairs) - 1} degrees"


def counters(stats: DecodingStats) -> dict[str, int]:
    """Everything that was counted; times are left out."""
    values = {item.name: getattr(stats, item.name) for item in dataclasses.fields(stats)}
    return {name: value for name, value in values.items() if isinstance(value, int)}
