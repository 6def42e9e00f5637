"""Which way of doing a piece of work is the fastest here, and what it costs by its size: measured while it is done.

What a forward over n tokens costs depends on the machine, on its load and on the length of the text, and how many
drafted tokens are accepted on the text itself. So no table says which way pays; the clock does. Only ways that give
the same text may be chosen by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WEIGHT = 0.3
"""Of the newest measurement, in the running mean."""
TRIALS = 2
"""Each way is tried so often before any is preferred."""
HOPELESS = 1.5
"""A way that costs so many times the best says that the next one need not be tried."""
RETRY = 64
"""Tokens until a way that lost is tried again; twice as many each time that it loses again."""


class Pace:
    """Seconds a token of each way, and the choice among them.

    Args:
        ways: budgets, or any other numbers by which the caller knows the ways, in order. The first is tried first, and
            from the third on one is tried only while the one before it is not far behind the best.
    """

    def __init__(self, ways: Sequence[int]):
        self.ways = tuple(dict.fromkeys(ways))
        self.costs: dict[int, float] = {}
        self.tried = dict.fromkeys(self.ways, 0)
        self.patience = dict.fromkeys(self.ways, RETRY)
        self.waited = dict.fromkeys(self.ways, 0)

    def choose(self) -> int:
        """The way for the next round."""
        for place, way in enumerate(self.ways):
            if place > 1 and self.costs[self.ways[place - 1]] > HOPELESS * self.costs[self.best]:
                break  # this one goes further in the same direction
            if self.tried[way] < TRIALS or self.waited[way] >= self.patience[way]:
                return way
        return self.best

    @property
    def best(self) -> int:
        """The way of fewest seconds a token so far."""
        return min(self.costs, key=self.costs.__getitem__)

    def saw(self, way: int, tokens: int, seconds: float) -> None:
        """Takes note of a round that wrote ``tokens`` in ``seconds``."""
        if tokens < 1:
            return
        cost, first = seconds / tokens, self.tried[way] < TRIALS
        known = self.costs.get(way)
        # the first rounds of a way warm it up, and a pause of the machine says nothing about it
        self.costs[way] = cost if known is None else min(known, cost) if first else known + WEIGHT * (cost - known)
        self.tried[way] += 1
        for other in self.ways:
            self.waited[other] += tokens
        if not first and self.waited[way] - tokens >= self.patience[way] and way != self.best:
            self.patience[way] *= 2
        self.waited[way] = 0


SLOPE = 0.12
"""What each further piece is taken to cost, in first ones, before anything was measured."""
FASTER, SLOWER = 0.4, 0.06
"""Of the newest measurement, where it is faster and where it is slower: other work on the machine makes many
measurements slower and none faster."""
COMMON = 0.7
"""The part of a change at one size that all other sizes share: the machine, or the text's length, has changed."""
LARGEST = 64
EVERY = 4
"""Measurements between two times that the line is drawn anew."""


class RunningCurve:
    """What a piece of work costs by its size, in pieces of size 1: measured while it is done.

    Between measured sizes it is a straight line; beyond the largest, it goes on as steeply as so far.
    """

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self._news = 0
        self._lay()

    def __call__(self, size: int) -> float:
        return self.costs[size] if size <= LARGEST else self.costs[LARGEST] + (size - LARGEST) * self.slope

    def saw(self, size: int, seconds: float) -> None:
        """Takes note of a piece of this size."""
        size = min(size, LARGEST)
        known = self.seconds.get(size)
        self._news += 1
        if known is None:
            self.seconds[size] = seconds
            self._news = EVERY
        else:
            change = min(seconds / known - 1, 1.0)
            change *= FASTER if change < 0 else SLOWER
            for other in self.seconds:
                self.seconds[other] *= 1 + (change if other == size else COMMON * change)
        if self._news >= EVERY:
            self._lay()

    def _lay(self) -> None:
        """Draws the line anew."""
        self._news = 0
        sizes = sorted(self.seconds)
        values = np.maximum.accumulate([self.seconds[size] for size in sizes])  # more work is never cheaper
        least = values[0] / (1 + SLOPE * (sizes[0] - 1)) if sizes else 1.0
        self.step = float(least)
        self.slope = float((values[-1] / least - 1) / (sizes[-1] - 1)) if sizes and sizes[-1] > 1 else SLOPE
        every = np.arange(LARGEST + 1)
        known = np.interp(every, sizes, values / least) if sizes else np.ones(LARGEST + 1)
        largest = sizes[-1] if sizes else 1
        known[largest:] += self.slope * (every[largest:] - largest)
        if sizes and sizes[0] > 1:
            known[: sizes[0]] = 1 + SLOPE * (every[: sizes[0]] - 1)
        self.costs: list[float] = known.tolist()
