"""Texts of a pattern that have so many characters: the pattern's automaton once for every count, as arrays.

A state is a state of the pattern, a place inside a character, and how many characters are complete. The copies are
made and pruned by array operations: each level of the count is the same automaton, but for what can no longer be
completed near the bounds.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .automata import build, minimise, trim
from .automaton import ArrayAutomaton, Automaton, run_starts
from .expressions import GrammarError
from .json_text import CANONICAL

MAX_EDGES = 8_000_000
"""More edges than this, over all counts, are refused."""
Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]


def counted(pattern: Automaton, low: int, high: int | None) -> Automaton:
    """Texts of a regular automaton (over JSON's canonical spelling) that have ``low`` to ``high`` characters.

    Raises:
        GrammarError: there are too many states.
    """
    source, lows, highs, target, whole, final = _characters(
        minimise(pattern if "_minimal" in pattern.__dict__ else trim(pattern))
    )
    size, top = len(final), low if high is None else high
    if high is not None and high < low:
        return Automaton([[]], [[]], [False])
    if (top + 1) * len(source) > MAX_EDGES:
        raise GrammarError(
            f"A pattern or format with a length of up to {top:,} needs too many states.",
            f"Lower the bound to {MAX_EDGES // len(source):,} or less, or leave it out.",
        )
    keep = np.zeros((top + 2, size), np.bool_)  # the last row is what lies beyond the bound
    following = np.minimum(np.arange(top + 1) + 1, top) if high is None else np.arange(top + 1) + 1
    for level in range(top, -1, -1):  # what can still be completed
        here = final & (level >= low)
        beyond = keep[following[level]] if following[level] != level else None
        here = _completable(here, beyond, source, target, whole)
        keep[level] = here
        if level > low and level < top and np.array_equal(here, keep[level + 1]):
            keep[low:level] = here  # from here down to the lower bound every level is the same
            break
    for level in range(low - 1, -1, -1):
        keep[level] = _completable(np.zeros(size, np.bool_), keep[level + 1], source, target, whole)
        if level + 1 < low and np.array_equal(keep[level], keep[level + 1]):
            keep[:level] = keep[level]
            break
    reached = np.zeros(size, np.bool_)
    reached[0] = True
    for level in range(top + 1):  # what a text can come to
        if level == top and high is None:
            reached = _reachable(reached, source, target, np.zeros_like(whole))
        else:
            reached = _reachable(reached, source, target, whole)
        keep[level] &= reached
        after = np.zeros(size, np.bool_)
        after[target[whole & reached[source]]] = True
        if high is not None and np.array_equal(_reachable(after, source, target, whole), reached):
            keep[level + 1 : top + 1] &= reached  # every level from here on is reached in the same states
            break
        reached = after
    if not keep[0, 0]:
        return Automaton([[]], [[]], [False])
    numbers = (np.cumsum(keep[: top + 1].reshape(-1)) - 1).reshape(top + 1, size)
    edge_level, edge = np.nonzero(
        keep[: top + 1][:, source] & np.where(whole, keep[following][:, target], keep[: top + 1][:, target])
    )
    onto = np.where(whole[edge], following[edge_level], edge_level)
    counts = np.bincount(numbers[edge_level, source[edge]], minlength=int(keep[: top + 1].sum()))
    finals = (final[None, :] & (np.arange(top + 1) >= low)[:, None])[keep[: top + 1]]
    none = np.zeros(0, np.int64)
    edges = (run_starts(counts), lows[edge], highs[edge], numbers[onto, target[edge]])
    return ArrayAutomaton((*edges, np.zeros(len(finals) + 1, np.int64), none, none, finals))


def _completable(here: Flags, beyond: Flags | None, source: Numbers, target: Numbers, whole: Flags) -> Flags:
    """States of a level from which a final one is reached, in it or (``beyond``) in the next."""
    here = here.copy()
    if beyond is not None:
        here[source[whole & beyond[target]]] = True
    usable = ~whole if beyond is not None else np.ones_like(whole)
    while True:
        more = here.copy()
        more[source[usable & here[target]]] = True
        if np.array_equal(more, here):
            return here
        here = more


def _reachable(here: Flags, source: Numbers, target: Numbers, whole: Flags) -> Flags:
    """The states, and what they reach without completing a character."""
    while True:
        more = here.copy()
        more[target[~whole & here[source]]] = True
        if np.array_equal(more, here):
            return here
        here = more


def _characters(pattern: Automaton) -> tuple[Numbers, Numbers, Numbers, Numbers, Flags, Flags]:
    """``(source, low, high, target, whole, final)``: the pattern's edges, which know where characters end.

    ``whole`` edges complete a character; edges are sorted by their source.
    """
    unit = _character()
    end = unit.finals.index(True)
    states = {(0, 0): 0}
    order = [(0, 0)]
    edges: list[tuple[int, int, int, int, bool]] = []
    for pair in order:
        state, inside = pair
        for low, high, to in pattern.edges[state]:
            for least, most, onward in unit.edges[inside]:
                if max(low, least) > min(high, most):
                    continue
                key = (to, 0 if onward == end else onward)
                if key not in states:
                    states[key] = len(states)
                    order.append(key)
                edges.append((states[pair], max(low, least), min(high, most), states[key], onward == end))
    table = np.array(edges, np.int64).reshape(-1, 5)
    final = np.array([pattern.finals[state] and inside == 0 for state, inside in order], np.bool_)
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3], table[:, 4].astype(np.bool_), final


@lru_cache(maxsize=1)
def _character() -> Automaton:
    """One character, as JSON spells it."""
    return minimise(build(CANONICAL))
