"""How large, how deep and how unsure a tree may be, from what a forward costs.

A plain step brings one token for ``cost(1)``. A node that is accepted with chance v brings v tokens, and nodes that are
not accepted cost all the same. So, with ``extra(n) = cost(1 + n) / cost(1) - 1``:

- all n nodes of a tree must bring more than ``extra(n)`` tokens. A tree whose forward costs more than two plain steps
  would need a whole further token from every round, so the budget is the largest n with ``extra(n) <= 1``;
- a node whose chance is below the least share of a step that a node costs can pay in no tree: that is the threshold;
- on a path whose tokens are each accepted with chance ``SURE`` the chance falls below the threshold at the depth that
  is the last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .speculative.worth import Cost

SURE = 0.8
"""The chance of one more token on a good path."""


@dataclass(frozen=True)
class TreeShape:
    """Bounds of a tree.

    Attributes:
        budget: nodes, at most.
        threshold: the least chance of a node; None for trees that are always full.
        depth: of the longest path.
    """

    budget: int
    threshold: float | None
    depth: int

    def within(self, cost: Cost) -> TreeShape:
        """The part of these bounds that a forward at this price can repay; a budget of 0 is plain decoding."""
        extra = [cost(1 + nodes) / cost(1) - 1 for nodes in range(1, self.budget + 1)]
        budget = sum(1 for share in extra if share <= 1)
        if self.threshold is None:
            return TreeShape(budget, None, self.depth)
        least = min((share / nodes for nodes, share in enumerate(extra[:budget], 1)), default=1.0)
        threshold = min(max(self.threshold, least), 0.99)
        depth = math.ceil(math.log(threshold) / math.log(SURE)) + 1
        return TreeShape(budget, threshold, max(1, min(self.depth, depth)))
