"""What a drafted node must be worth: tokens that the same time would bring elsewhere.

A forward over a tree of n nodes costs ``cost(1 + n)``, a plain step ``cost(1)``. With ``rate`` tokens a unit of cost so
far, the time of k nodes would have brought ``rate * (cost(1 + k) - cost(1))`` tokens without them. Of a tree whose
nodes are accepted with chances ``v_1 >= v_2 >= ...`` those k are kept that maximise::

    v_1 + ... + v_k - rate * cost(1 + k)

Maximising each round's own tokens a unit of cost would be another rule, and a worse one for the whole text: the best
rate over many rounds is reached by holding every round against the common rate (Dinkelbach's condition).

The chances are the draft's opinion. ``Worth`` counts how many tokens they promised and how many came, and believes them
as far as that. Older rounds count less and less, so a text that becomes easier is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Cost = Callable[[int], float]
"""What a forward of the target over n tokens costs, in any unit."""

FIRST = 8.0
"""How many plain steps the rate that is assumed in the beginning counts for."""
FADING = 0.95
"""What a round still counts for one round later."""
PATIENCE = 0.5
"""Plain steps that a draft may lose in the beginning before it rests."""
LONGEST_REST = 16
"""For how many rounds the draft is left alone at most where it does not pay."""


def default_cost(device: str) -> Cost:
    """A straight line: a twentieth of a plain step for each further token on a CPU, a hundredth elsewhere.

    On two cores a small model took 1.35 times a plain step for 8 tokens and 1.7 times for 16. A curve that was measured
    for the model at hand is better.
    """
    slope = 0.05 if device == "cpu" else 0.01
    return lambda tokens: 1 + slope * (tokens - 1)


class Worth:
    """The rate so far, and what follows from it for the next round.

    Args:
        cost: of a forward of the target.
        draft_cost: of one forward of the draft, in the same unit; 0 without a draft.
        rereads: whether accepted tokens must be read again where not all of a path was accepted, as a recurrent state
            demands.
        widest: nodes of a tree, at most.

    Attributes:
        least: what each node costs in the tree where they cost least.
        floor: a tree whose nodes all have less chance cannot pay in this round.
    """

    def __init__(self, cost: Cost, draft_cost: float = 0.0, rereads: bool = False, widest: int = 1):
        self.cost, self.draft_cost, self.rereads, self.widest = cost, draft_cost, rereads, widest
        self.step = cost(1)
        self.tokens, self.spent = FIRST, FIRST * self.step
        self.promised, self.came = FIRST, FIRST
        self.balance, self.measured = PATIENCE * self.step, False
        self.resting, self.rest = 0, 1
        self.begin()

    @property
    def rate(self) -> float:
        """Tokens a unit of cost; never below a plain step's, which can always be had."""
        return max(self.tokens / self.spent, 1 / self.step)

    @property
    def belief(self) -> float:
        """The share of promised tokens that came."""
        return min(self.came / self.promised, 1.0)

    def nodes(self, chances: Sequence[float]) -> int:
        """How many of the nodes with these falling chances of acceptance pay for themselves together."""
        best, most, total = 0, -self.rate * self.step, 0.0
        for count, chance in enumerate(chances, 1):
            total += self.belief * chance
            cost = self.cost(1 + count)
            if self.rereads:
                cost += (1 - self.belief * chance) * self.step
            if total - self.rate * cost > most:
                best, most = count, total - self.rate * cost
        return best

    def begin(self) -> None:
        """A round begins."""
        counts = range(1, max(self.widest, 1) + 1)
        self.least = min((self.cost(1 + count) - self.step) / count for count in counts)
        self.floor = self.rate * self.least / self.belief

    def asks(self, chances: Sequence[float]) -> list[bool]:
        """Behind which of the nodes with these chances a draft forward can pay: half of what is reached is what a good
        draft adds, and that must be checked."""
        check = self.rate * self.least
        gains = [max(0.5 * self.belief * chance - check, 0.0) for chance in chances]
        pays = sum(gains) > self.rate * self.draft_cost
        return [pays and gain > 0 for gain in gains]

    def rested(self) -> bool:
        """Whether the draft takes part in the round that begins."""
        if self.resting:
            self.resting -= 1
            return False
        return True

    def add(self, nodes: int, drafts: int, promised: float, accepted: int) -> None:
        """Tells of a finished round: its nodes, its draft forwards, the sum of their chances, and how many were
        accepted."""
        extra = self.cost(1 + nodes) - self.step + drafts * self.draft_cost
        self.tokens = FADING * self.tokens + accepted + 1
        self.spent = FADING * self.spent + extra + self.step
        # towards what is assumed in the beginning: a draft that failed is tried again some day
        self.promised = FADING * self.promised + promised + (1 - FADING) * FIRST
        self.came = FADING * self.came + accepted + (1 - FADING) * FIRST
        if not drafts:
            return
        self.balance = (0.9 if self.measured else 0.8) * self.balance + accepted * self.step - extra
        if self.balance > 0:
            self.rest = 1
        elif self.measured or self.balance < -self.step:  # an assumed cost is no reason to be strict
            self.resting, self.rest, self.balance = self.rest, min(2 * self.rest, LONGEST_REST), 0.0
