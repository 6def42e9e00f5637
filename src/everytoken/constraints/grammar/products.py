"""Products of deterministic regular automata: what two of them accept together, or the one without the other."""

from __future__ import annotations

from collections.abc import Callable

from .automata import Automaton, Edge, is_deterministic, minimise, trim
from .expressions import GrammarError


def combine(
    first: Automaton, second: Automaton, accept: Callable[[bool, bool], bool], limit: int = 200_000
) -> Automaton:
    """The product of two deterministic regular automata; ``accept`` decides from both verdicts.

    A missing edge leads to a dead state, so ``lambda a, b: a and not b`` is the difference.

    Raises:
        GrammarError: the product has more than ``limit`` states, or an automaton is not deterministic.
    """
    for automaton in (first, second):
        if not automaton.regular or not is_deterministic(automaton):
            raise GrammarError(
                "Two patterns that must hold at once are too complex to be combined.", "Simplify one of the patterns."
            )
    output = Automaton()
    numbers: dict[tuple[int, int], int] = {}
    pending: list[tuple[int, int]] = []
    only_first, only_second = accept(True, False), accept(False, True)  # whether one may go on alone

    def number(pair: tuple[int, int]) -> int:
        if pair not in numbers:
            a = pair[0] >= 0 and first.finals[pair[0]]
            b = pair[1] >= 0 and second.finals[pair[1]]
            numbers[pair] = output.state(accept(a, b))
            pending.append(pair)
            if len(numbers) > limit:
                raise GrammarError(
                    f"Two patterns that must hold at once need more than {limit:,} states together.",
                    "Simplify one of the patterns, or drop a length bound.",
                )
        return numbers[pair]

    number((0, 0))
    ordered = [[sorted(edges) for edges in automaton.edges] for automaton in (first, second)]
    while pending:
        a, b = pair = pending.pop()
        mine = ordered[0][a] if a >= 0 else []
        theirs = ordered[1][b] if b >= 0 else []
        edges: list[Edge] = []
        m = t = low = 0
        while m < len(mine) or t < len(theirs):  # both are sorted and disjoint: side by side, from cut to cut
            least, most, to_a = mine[m] if m < len(mine) else (512, 512, -1)
            less, more, to_b = theirs[t] if t < len(theirs) else (512, 512, -1)
            low = max(low, min(least, less))
            high = min(most if least <= low else least - 1, more if less <= low else less - 1)
            onto = (to_a if least <= low else -1, to_b if less <= low else -1)
            if (onto[0] >= 0 or only_second) and (onto[1] >= 0 or only_first):
                edges.append((low, high, number(onto)))
            low = high + 1
            m += m < len(mine) and most < low
            t += t < len(theirs) and more < low
        output.edges[numbers[pair]] = edges
    return minimise(trim(output))


def intersection(first: Automaton, second: Automaton) -> Automaton:
    return combine(first, second, lambda a, b: a and b)


def difference(first: Automaton, second: Automaton) -> Automaton:
    if second.words and first.regular and is_deterministic(first):
        return without_words(first, second)
    return combine(first, second, lambda a, b: a and not b)


def without_words(first: Automaton, words: Automaton) -> Automaton:
    """The difference from a list of words, in the time that the words take and a copy of ``first``.

    Objects ask for it with their properties' names, each with others. Where no word begins like the text any more,
    ``first`` goes on alone; what is left needs no minimising, because no two states of the words' automaton are alike.
    """
    output = Automaton()
    numbers: dict[tuple[int, int], int] = {}
    pending: list[tuple[int, int]] = []

    def number(a: int, w: int) -> int:
        found = numbers.get((a, w))
        if found is None:
            found = numbers[a, w] = output.state(first.finals[a] and not (w >= 0 and words.finals[w]))
            pending.append((a, w))
        return found

    number(0, 0)
    stuck = False
    while pending:
        a, w = pending.pop()
        here = numbers[a, w]
        edges: list[Edge] = []
        for low, high, to in first.edges[a]:
            for less, more, onto in sorted(words.edges[w]) if w >= 0 else ():
                start, end = max(low, less), min(high, more)
                if start > end:
                    continue
                if low < start:
                    edges.append((low, start - 1, number(to, -1)))
                edges.append((start, end, number(to, onto)))
                low = end + 1
            if low <= high:
                edges.append((low, high, number(to, -1)))
        output.edges[here] = edges
        stuck = stuck or not (edges or output.finals[here])
    return trim(output) if stuck else output
