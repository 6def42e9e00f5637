"""Tables of counts: information between two things that were counted together, and sparse counts of pairs.

The estimates are those of the counts themselves ("plug-in"). Small counts inflate them, so each comes with its value
after the pairs were shuffled, which would be 0 with endless data.
"""

from __future__ import annotations

import numpy as np


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of a distribution given by its counts."""
    total = counts.sum()
    if total <= 0:
        return 0.0
    shares = counts[counts > 0] / total
    return float(-(shares * np.log(shares)).sum())


def mutual_information(table: np.ndarray) -> float:
    """Mutual information in nats of a table of counts ``[A, B]``; never below 0."""
    return max(entropy(table.sum(0)) + entropy(table.sum(1)) - entropy(table.ravel()), 0.0)


def explained_share(table: np.ndarray) -> float:
    """``I(a; b) / H(b)`` of counts ``[A, B]``: 1 where ``a`` determines ``b``, 0 where it says nothing."""
    whole = entropy(table.sum(0))
    return mutual_information(table) / whole if whole > 0 else 0.0


class PairCounts:
    """How often each pair ``(a, b)`` occurred, for any number of ``a`` and ``width`` values of ``b``; sparse.

    Args:
        width: values of ``b``.
    """

    def __init__(self, width: int):
        self.width = width
        self.keys = np.zeros(0, np.int64)
        self.counts = np.zeros(0, np.int64)

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Counts pairs; both ``[n]`` integers from 0 on."""
        keys, counts = np.unique(a.astype(np.int64) * self.width + b, return_counts=True)
        merged, place = np.unique(np.concatenate([self.keys, keys]), return_inverse=True)
        self.counts = np.bincount(place, np.concatenate([self.counts, counts]), len(merged)).astype(np.int64)
        self.keys = merged

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """The values of ``a`` that occurred, and their counts ``[A, width]``."""
        values, row = np.unique(self.keys // self.width, return_inverse=True)
        table = np.zeros((len(values), self.width), np.int64)
        table[row, self.keys % self.width] = self.counts
        return values, table

    def explained(self) -> float:
        """``I(a; b) / H(b)``, from the sparse counts alone."""
        _, row = np.unique(self.keys // self.width, return_inverse=True)
        of_a = np.bincount(row, self.counts) if len(row) else np.zeros(0)
        whole = entropy(np.bincount(self.keys % self.width, self.counts, self.width))
        if whole <= 0:
            return 0.0
        return max(entropy(of_a) + whole - entropy(self.counts), 0.0) / whole

    def shuffled(self, generator: np.random.Generator) -> PairCounts:
        """The same values of ``a`` and of ``b``, paired at random."""
        made = PairCounts(self.width)
        a = np.repeat(self.keys // self.width, self.counts)
        made.add(a, generator.permutation(np.repeat(self.keys % self.width, self.counts)))
        return made

    def favourites(self, number: int = 1) -> dict[int, tuple[int, ...]]:
        """For every ``a`` its most frequent values of ``b``, the lower of equal ones first.

        Args:
            number: how many, where there are as many.
        """
        order = np.lexsort((self.keys % self.width, -self.counts, self.keys // self.width))
        values, starts = np.unique((self.keys // self.width)[order], return_index=True)
        ends = np.append(starts[1:], len(order))
        best = (self.keys % self.width)[order].tolist()
        return {
            int(value): tuple(best[start : min(start + number, end)])
            for value, start, end in zip(values, starts.tolist(), ends.tolist(), strict=True)
        }

    def occurrences(self) -> dict[int, int]:
        """How often each ``a`` occurred."""
        values, row = np.unique(self.keys // self.width, return_inverse=True)
        return dict(zip(values.tolist(), np.bincount(row, self.counts).astype(int).tolist(), strict=True))
