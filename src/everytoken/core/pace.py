"""Which of several ways of doing the same work is the fastest here: measured while they are used.

What a forward over n tokens costs depends on the machine, on its load and on the length of the text, and how many
drafted tokens are accepted on the text itself. So no table says which way pays; the clock does. Only ways that give
the same text may be chosen by it.
"""

from __future__ import annotations

from collections.abc import Sequence

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
