"""Products of deterministic regular automata: what two of them accept together, or the one without the other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .automata import is_deterministic, minimise, trim
from .automaton import ArrayAutomaton, Automaton, arrays
from .expressions import GrammarError
from .kernels import product


def combine(
    first: Automaton, second: Automaton, accept: Callable[[bool, bool], bool], limit: int = 200_000
) -> Automaton:
    """The product of two deterministic regular automata; ``accept`` decides from both verdicts.

    A missing edge leads to a dead state, so ``lambda a, b: a and not b`` is the difference. What neither accepts is
    never accepted.

    Raises:
        GrammarError: the product has more than ``limit`` states, or an automaton is not deterministic.
    """
    return minimise(_product(first, second, accept, limit))


def _product(first: Automaton, second: Automaton, accept: Callable[[bool, bool], bool], limit: int) -> Automaton:
    for automaton in (first, second):
        if not automaton.regular or not is_deterministic(automaton):
            raise GrammarError(
                "Two patterns that must hold at once are too complex to be combined.", "Simplify one of the patterns."
            )
    one, other = arrays(first), arrays(second)
    finished, ptr, low, high, to, final = product(
        one.ptr, one.low, one.high, one.to, one.ends, other.ptr, other.low, other.high, other.to, other.ends,
        accept(True, True), accept(True, False), accept(False, True), limit,
    )  # fmt: skip
    if not finished:
        raise GrammarError(
            f"Two patterns that must hold at once need more than {limit:,} states together.",
            "Simplify one of the patterns, or drop a length bound.",
        )
    none = np.zeros(0, np.int64)
    return trim(ArrayAutomaton((ptr, low, high, to, np.zeros_like(ptr), none, none, final)))


def intersection(first: Automaton, second: Automaton) -> Automaton:
    return combine(first, second, lambda a, b: a and b)


def difference(first: Automaton, second: Automaton) -> Automaton:
    """What the first accepts and the second does not.

    Objects ask for it with their properties' names, each with others. Where no word begins like the text any more, the
    first goes on alone; what is left of it without words needs no minimising, because no two states of the words'
    automaton are alike.
    """
    if second.words and first.regular and is_deterministic(first):
        return _product(first, second, lambda a, b: a and not b, limit=10_000_000)
    return combine(first, second, lambda a, b: a and not b)
