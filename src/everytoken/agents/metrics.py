"""How good a ranking of tools is: recall, average precision and discounted gain at a depth."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Sequence


def recall(ranking: Sequence[Hashable], relevant: Collection[Hashable], k: int) -> float:
    """The share of the relevant tools among the first ``k``."""
    return sum(item in relevant for item in ranking[:k]) / len(relevant)


def average_precision(ranking: Sequence[Hashable], relevant: Collection[Hashable], k: int) -> float:
    """``1/min(R, k)`` times the sum over hits of the precision at their rank."""
    hits, total = 0, 0.0
    for rank, item in enumerate(ranking[:k], 1):
        if item in relevant:
            hits += 1
            total += hits / rank
    return total / min(len(relevant), k)


def ndcg(ranking: Sequence[Hashable], relevant: Collection[Hashable], k: int) -> float:
    """Discounted gain with ``1/log2(rank + 1)``, as a share of the best possible."""
    gain = sum(1 / math.log2(rank + 1) for rank, item in enumerate(ranking[:k], 1) if item in relevant)
    return gain / sum(1 / math.log2(rank + 1) for rank in range(1, min(len(relevant), k) + 1))
