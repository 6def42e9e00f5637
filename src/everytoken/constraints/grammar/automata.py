"""Automata over bytes: from expressions to nondeterministic, to deterministic, to minimal.

A rule's automaton has two kinds of edges: byte ranges, and calls of other rules. Calls are symbols like any other
while an
automaton is made deterministic, so only the choice between reading a byte and calling a rule stays open until run time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .expressions import (
    TEXT_END,
    TEXT_START,
    Alt,
    Bytes,
    ByteSet,
    Chars,
    GrammarError,
    Graph,
    Ref,
    Repeat,
    Seq,
    utf8_sequences,
)

Edge = tuple[int, int, int]
MAX_TABLE, MAX_ROUNDS = 4_000_000, 400_000_000
"""Of the table, and of the work, with which an automaton is made minimal."""
MAX_STATES = 2_000_000
"""More states than this in one automaton are refused."""


@dataclass
class Automaton:
    """States with byte edges ``(low, high, target)``, calls ``(rule, target)`` and final states; state 0 starts.

    ``words`` says that it is a list of words: deterministic, and no state leads back to itself.
    """

    edges: list[list[Edge]] = field(default_factory=list)
    calls: list[list[tuple[str, int]]] = field(default_factory=list)
    finals: list[bool] = field(default_factory=list)
    words: bool = False

    def __len__(self) -> int:
        return len(self.edges)

    def state(self, final: bool = False) -> int:
        self.edges.append([])
        self.calls.append([])
        self.finals.append(final)
        return len(self.edges) - 1

    @property
    def regular(self) -> bool:
        return not any(self.calls)

    @property
    def opens(self) -> bool:
        """Whether a trimmed automaton accepts anything."""
        return self.finals[0] or bool(self.edges[0]) or bool(self.calls[0])

    @property
    def separable(self) -> bool:
        """Whether nothing leads back to the start, and the one final state (not the start) has no way on."""
        known = self.__dict__.get("_separable")
        if known is None:
            ends = [state for state, final in enumerate(self.finals) if final]
            known = len(ends) == 1 and ends[0] != 0 and not self.edges[ends[0]] and not self.calls[ends[0]]
            known = known and not any(to == 0 for edges in self.edges for *_, to in edges)
            known = known and not any(to == 0 for calls in self.calls for _, to in calls)
            self.__dict__["_separable"] = known
        return known

    def matches(self, data: bytes) -> bool:
        """Whether a regular automaton accepts ``data``."""
        states = {0}
        for byte in data:
            states = {to for state in states for low, high, to in self.edges[state] if low <= byte <= high}
            if not states:
                return False
        return any(self.finals[state] for state in states)

    @property
    def empty(self) -> bool:
        """Whether a regular automaton accepts nothing."""
        seen, pending = {0}, [0]
        while pending:
            state = pending.pop()
            if self.finals[state]:
                return False
            for _, _, to in self.edges[state]:
                if to not in seen:
                    seen.add(to)
                    pending.append(to)
        return True


class ArrayAutomaton(Automaton):
    """A regular automaton as arrays, for very many states; its lists are made only where somebody asks for them.

    Args:
        ptr: ``[N + 1]``, where each state's edges start.
        low, high, to: ``[E]``, the edges.
        ends: ``[N]``, final states.
    """

    def __init__(
        self,
        ptr: NDArray[np.int64],
        low: NDArray[np.int64],
        high: NDArray[np.int64],
        to: NDArray[np.int64],
        ends: NDArray[np.bool_],
    ):
        self.ptr, self.low, self.high, self.to, self.ends = ptr, low, high, to, ends

    def __len__(self) -> int:
        return len(self.ends)

    @cached_property
    def edges(self) -> list[list[Edge]]:  # type: ignore[override]
        flat = list(zip(self.low.tolist(), self.high.tolist(), self.to.tolist(), strict=True))
        return [flat[begin:end] for begin, end in itertools.pairwise(self.ptr.tolist())]

    @cached_property
    def calls(self) -> list[list[tuple[str, int]]]:  # type: ignore[override]
        return [[] for _ in range(len(self))]

    @cached_property
    def finals(self) -> list[bool]:  # type: ignore[override]
        return self.ends.tolist()

    @property
    def regular(self) -> bool:
        return True

    @property
    def opens(self) -> bool:
        return bool(self.ends[0]) or bool(self.ptr[1] > 0)


class Builder:
    """Thompson's construction, with calls; ``inline`` says which references are replaced by what they name."""

    def __init__(self, inline: Callable[[str], Any | None] = lambda _name: None):
        self.inline = inline
        self.edges: list[list[Edge]] = [[]]
        self.calls: list[list[tuple[str, int]]] = [[]]
        self.empties: list[list[int]] = [[]]

    def state(self) -> int:
        self.edges.append([])
        self.calls.append([])
        self.empties.append([])
        if len(self.edges) > MAX_STATES:
            raise GrammarError(
                f"The grammar needs more than {MAX_STATES:,} automaton states.",
                "Lower repetition bounds or list fewer values.",
            )
        return len(self.edges) - 1

    def add(self, item: Any, source: int) -> int:
        """Builds ``item`` from ``source`` on and returns the state where it ends."""
        kind = type(item)
        if kind is Bytes:
            for byte in item.data:
                following = self.state()
                self.edges[source].append((byte, byte, following))
                source = following
            return source
        if kind is Seq:
            for part in item.parts:
                source = self.add(part, source)
            return source
        if kind is Ref:
            inlined = self.inline(item.name)
            if inlined is not None:
                return self.add(inlined, source)
            end = self.state()
            self.calls[source].append((item.name, end))
            return end
        if kind is Alt:
            if literals := _literals(item):
                return self._automaton(trie(literals), source)
            end = self.state()
            for part in item.parts:
                self.empties[self.add(part, source)].append(end)
            return end
        if kind is Chars:
            end = self.state()
            for sequence in utf8_sequences(item.ranges):
                place = source
                for low, high in sequence[:-1]:
                    following = self.state()
                    self.edges[place].append((low, high, following))
                    place = following
                self.edges[place].append((*sequence[-1], end))
            return end
        if kind is ByteSet:
            end = self.state()
            self.edges[source] += [(low, high, end) for low, high in item.ranges]
            return end
        if kind is Repeat:
            return self._repeat(item, source)
        if kind is Graph:
            return self._graph(item, source)
        if isinstance(item, Automaton):
            return self._automaton(item, source)
        raise TypeError(f"not an expression: {item!r}")

    def _repeat(self, item: Repeat, source: int) -> int:
        count = item.low if item.high is None else item.high
        if count >= 4 and not isinstance(item.item, (Bytes, ByteSet, Automaton)):
            unit = minimise(
                build(item.item, self.inline)
            )  # copies of a small automaton, rather than copies of its making
            item = Repeat(unit, item.low, item.high)
        for _ in range(item.low):
            source = self.add(item.item, source)
        if item.high is None:
            loop = self.state()
            self.empties[source].append(loop)
            self.empties[self.add(item.item, loop)].append(loop)
            end = self.state()  # the loop itself must not gain edges of what follows: it may be re-entered
            self.empties[loop].append(end)
            return end
        end = self.state()
        for _ in range(item.high - item.low):
            self.empties[source].append(end)
            fresh = self.state()  # so that leaving early does not open the next copy's own loops
            self.empties[source].append(fresh)
            source = self.add(item.item, fresh)
        self.empties[source].append(end)
        return end

    def _graph(self, item: Graph, source: int) -> int:
        states = [self.state() for _ in range(item.size)]
        self.empties[source].append(states[0])
        end = self.state()
        for start, label, target in item.edges:
            fresh = self.state()
            self.empties[states[start]].append(fresh)
            self.empties[self.add(label, fresh)].append(states[target])
        for final in item.finals:
            self.empties[states[final]].append(end)
        return end

    def _automaton(self, item: Automaton, source: int) -> int:
        if item.separable:  # its end has no way on: it can be the next part's start, and its start the last part's end
            states = [source if state == 0 else self.state() for state in range(len(item))]
            end = next(place for place, final in zip(states, item.finals, strict=True) if final)
            for place, edges, calls in zip(states, item.edges, item.calls, strict=True):
                self.edges[place] += [(low, high, states[to]) for low, high, to in edges]
                self.calls[place] += [(name, states[to]) for name, to in calls]
            return end
        states = [self.state() for _ in range(len(item))]
        self.empties[source].append(states[0])
        end = self.state()
        for index, edges in enumerate(item.edges):
            self.edges[states[index]] = [(low, high, states[to]) for low, high, to in edges]
            self.calls[states[index]] = [(name, states[to]) for name, to in item.calls[index]]
            if item.finals[index]:
                self.empties[states[index]].append(end)
        return end

    # -- to a deterministic automaton ---------------------------------------------------------------------------------
    def closure(self, states: Iterable[int]) -> frozenset[int]:
        seen = set(states)
        pending = list(seen)
        while pending:
            for to in self.empties[pending.pop()]:
                if to not in seen:
                    seen.add(to)
                    pending.append(to)
        return frozenset(seen)

    def determinise(self, final: int, starts: Iterable[int] = (0,), finals: set[int] | None = None) -> Automaton:
        """Subset construction. Where it would explode, the result keeps several edges for a byte instead."""
        accepting = {final} if finals is None else finals
        closures: dict[int, frozenset[int]] = {}

        def reached(targets: Iterable[int]) -> frozenset[int]:
            union: set[int] = set()
            for target in targets:
                if target not in closures:
                    # only states that read, call or accept tell subsets apart
                    closures[target] = frozenset(
                        s for s in self.closure([target]) if self.edges[s] or self.calls[s] or s in accepting
                    )
                union |= closures[target]
            return frozenset(union)

        output = Automaton()
        numbers: dict[frozenset[int], int] = {}
        pending: list[frozenset[int]] = []
        limit = 8 * len(self.edges) + 4000

        def number(subset: frozenset[int]) -> int:
            found = numbers.get(subset)
            if found is None:
                found = numbers[subset] = output.state(not accepting.isdisjoint(subset))
                pending.append(subset)
            return found

        numbered: dict[tuple[int, ...], int] = {}

        def numbered_once(targets: tuple[int, ...]) -> int:
            found = numbered.get(targets)
            if found is None:
                found = numbered[targets] = number(reached(targets))
            return found

        work = 0
        number(reached(starts))
        while pending:
            subset = pending.pop()
            here = numbers[subset]
            edges = [edge for member in subset for edge in self.edges[member]]
            work += len(edges) + 1
            if len(edges) == 1:
                low, high, to = edges[0]
                output.edges[here] = [(low, high, numbered_once((to,)))]
            elif edges:
                output.edges[here] = [(low, high, numbered_once(targets)) for low, high, targets in disjoint(edges)]
            called: dict[str, set[int]] = {}
            for member in subset:
                for name, to in self.calls[member]:
                    called.setdefault(name, set()).add(to)
            output.calls[here] = [(name, number(reached(targets))) for name, targets in called.items()]
            if len(output) > limit or work > limit + 400_000:
                return self._without_empties(accepting, starts)
        return output

    def _without_empties(self, accepting: set[int], starts: Iterable[int]) -> Automaton:
        """The same language, nondeterministic but without empty moves; never larger than the input."""
        output = Automaton()
        numbers: dict[int, int] = {}
        pending: list[int] = []

        def number(state: int) -> int:
            if state not in numbers:
                numbers[state] = output.state()
                pending.append(state)
            return numbers[state]

        joint = self.state()
        self.empties[joint] = list(starts)
        number(joint)
        while pending:
            state = pending.pop()
            here = numbers[state]
            closed = self.closure([state])
            output.finals[here] = not accepting.isdisjoint(closed)
            output.edges[here] = list(dict.fromkeys((a, b, number(to)) for s in closed for a, b, to in self.edges[s]))
            output.calls[here] = list(dict.fromkeys((name, number(to)) for s in closed for name, to in self.calls[s]))
        return output


def disjoint(edges: list[Edge]) -> list[tuple[int, int, tuple[int, ...]]]:
    """Overlapping ranges as disjoint ones with the set of their targets; neighbours with equal targets are joined."""
    result: list[tuple[int, int, tuple[int, ...]]] = []
    ordered = sorted(edges)
    last = -1
    for low, high, _ in ordered:
        if low <= last:
            break
        last = high
    else:  # disjoint already, as most are
        for low, high, to in ordered:
            if result and result[-1][1] + 1 == low and result[-1][2][0] == to:
                result[-1] = (result[-1][0], high, (to,))
            else:
                result.append((low, high, (to,)))
        return result
    cuts = sorted({low for low, _, _ in edges} | {high + 1 for _, high, _ in edges})
    if len(cuts) > 64:  # sweep; the plain loop below is faster for few edges
        opening: dict[int, list[int]] = {}
        closing: dict[int, list[int]] = {}
        for low, high, to in edges:
            opening.setdefault(low, []).append(to)
            closing.setdefault(high + 1, []).append(to)
    active: dict[int, int] = {}
    for place, low in enumerate(cuts[:-1]):
        high = cuts[place + 1] - 1
        if len(cuts) > 64:
            for to in closing.get(low, ()):
                active[to] -= 1
                if not active[to]:
                    del active[to]
            for to in opening.get(low, ()):
                active[to] = active.get(to, 0) + 1
            targets = tuple(sorted(active))
        else:
            targets = tuple(sorted({to for a, b, to in edges if a <= low <= b}))
        if not targets:
            continue
        if result and result[-1][1] + 1 == low and result[-1][2] == targets:
            result[-1] = (result[-1][0], high, targets)
        else:
            result.append((low, high, targets))
    return result


def build(item: Any, inline: Callable[[str], Any | None] = lambda _name: None) -> Automaton:
    """An expression's automaton: deterministic unless that explodes."""
    if isinstance(item, Automaton):
        return item
    if literals := _literals(item):
        return trie(literals)
    if type(item) is Repeat and item.high is not None and item.high >= 4 and not isinstance(item.item, Automaton):
        unit = minimise(build(item.item, inline))
        if unit.separable and is_deterministic(unit):
            return _chain(unit, item.low, item.high)
    builder = Builder(inline)
    return trim(builder.determinise(builder.add(item, 0)))


def _chain(unit: Automaton, low: int, high: int) -> Automaton:
    """Copies of an automaton one after the other, each one's end the next one's start; deterministic if the copies
    are."""
    inner = len(unit) - 1  # the end of a copy is the start of the next
    end = unit.finals.index(True)
    local = [state if state <= end else state - 1 for state in range(len(unit))]
    local[end] = inner
    order = [state for state in range(len(unit)) if state != end]
    pattern = [[(a, b, local[to]) for a, b, to in unit.edges[state]] for state in order]
    calls = [[(name, local[to]) for name, to in unit.calls[state]] for state in order]
    size = inner * high + 1
    if size > MAX_STATES:
        raise GrammarError(f"A repetition needs more than {MAX_STATES:,} states.", "Lower its upper bound.")
    edges = [[(a, b, to + base) for a, b, to in here] for base in range(0, size - 1, inner) for here in pattern]
    called = [[(name, to + base) for name, to in here] for base in range(0, size - 1, inner) for here in calls]
    finals = [False] * size
    for count in range(low, high + 1):
        finals[count * inner] = True
    return Automaton([*edges, []], [*called, []], finals)


def _literals(item: Any) -> list[bytes] | None:
    if type(item) is Alt and len(item.parts) > 8 and all(type(part) is Bytes for part in item.parts):
        return [part.data for part in item.parts if type(part) is Bytes]
    return None


def trie(words: Iterable[bytes]) -> Automaton:
    """The minimal acyclic automaton of a list of words, built in sorted order (equal tails are shared as they end)."""
    register: dict[Any, int] = {}
    output = Automaton()
    root = output.state()
    path = [root]
    previous = b""

    def freeze(depth: int) -> None:
        while len(path) - 1 > depth:
            child = path.pop()
            key = (output.finals[child], tuple(output.edges[child]))
            known = register.setdefault(key, child)
            if known != child:
                low, high, _ = output.edges[path[-1]][-1]
                output.edges[path[-1]][-1] = (low, high, known)
                if child == len(output) - 1:  # the newest state: take it back
                    output.edges.pop()
                    output.calls.pop()
                    output.finals.pop()

    for word in sorted(set(words)):
        shared = 0
        for a, b in zip(previous, word, strict=False):
            if a != b:
                break
            shared += 1
        freeze(shared)
        for byte in word[shared:]:
            fresh = output.state()
            output.edges[path[-1]].append((byte, byte, fresh))
            path.append(fresh)
        output.finals[path[-1]] = True
        previous = word
    freeze(0)
    output = trim(output)
    output.words = True
    return output


def trim(automaton: Automaton, productive: Callable[[str], bool] = lambda _name: True) -> Automaton:
    """Drops states that cannot be reached, or from which nothing can be accepted; calls of unproductive rules go
    too."""
    size = len(automaton)
    back: list[list[int]] = [[] for _ in range(size)]
    for state in range(size):
        for _, _, to in automaton.edges[state]:
            back[to].append(state)
        for name, to in automaton.calls[state]:
            if productive(name):
                back[to].append(state)
    useful = [False] * size
    pending = [state for state in range(size) if automaton.finals[state]]
    for state in pending:
        useful[state] = True
    while pending:
        for state in back[pending.pop()]:
            if not useful[state]:
                useful[state] = True
                pending.append(state)
    output = Automaton()
    numbers = {0: output.state()}
    order = [0]
    for state in order:
        here = numbers[state]
        output.finals[here] = automaton.finals[state]

        def number(to: int) -> int:
            if to not in numbers:
                numbers[to] = output.state()
                order.append(to)
            return numbers[to]

        output.edges[here] = [(a, b, number(to)) for a, b, to in automaton.edges[state] if useful[to]]
        output.calls[here] = [
            (name, number(to)) for name, to in automaton.calls[state] if useful[to] and productive(name)
        ]
    return output


# -- deterministic automata --------------------------------------------------------------------------------------------
def is_deterministic(automaton: Automaton) -> bool:
    for edges in automaton.edges:
        ordered = sorted(edges)
        if any(later[0] <= earlier[1] for earlier, later in itertools.pairwise(ordered)):
            return False
    return True


def minimise(automaton: Automaton) -> Automaton:
    """Joins equivalent states of a deterministic automaton (unchanged where that would take too long).

    Moore's refinement over classes of symbols; a round compares 64-bit hashes of all states' rows at once.
    """
    size = len(automaton)
    if size <= 1 or "_minimal" in automaton.__dict__ or not is_deterministic(automaton):
        return automaton
    cuts = sorted({x for edges in automaton.edges for low, high, _ in edges for x in (low, high + 1)})
    place = {cut: number for number, cut in enumerate(cuts)}
    names = {name: n + len(cuts) for n, name in enumerate(sorted({x for c in automaton.calls for x, _ in c}))}
    if any(len({name for name, _ in calls}) < len(calls) for calls in automaton.calls):
        return automaton
    width = len(cuts) + len(names)
    if size * width > MAX_TABLE:
        return automaton
    table = np.full((size, width), size, np.int64)  # one state more stands for no way on
    for state, edges in enumerate(automaton.edges):
        for low, high, to in edges:
            table[state, place[low] : place[high + 1]] = to
        for name, to in automaton.calls[state]:
            table[state, names[name]] = to
    random = np.random.default_rng(0)
    weights = random.integers(1, 1 << 63, width, np.uint64) | np.uint64(1)
    groups = np.array([*(int(final) for final in automaton.finals), 2], np.int64)
    count = len(np.unique(groups))
    labels = random.integers(1, 1 << 63, size + 1, np.uint64)
    for _ in range(max(MAX_ROUNDS // (size * width), 64)):
        named = labels[groups]
        mixed = (named[table] * weights).sum(1, dtype=np.uint64)
        mixed ^= mixed >> np.uint64(31)
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + named[:-1]
        distinct, fresh = np.unique(mixed, return_inverse=True)
        groups = np.append(fresh.reshape(-1), len(distinct))
        if len(distinct) + 1 == count:
            break
        count = len(distinct) + 1
    else:
        return automaton
    numbers = np.full(count, -1, np.int64)  # groups in the order of their first states: state 0 stays first
    leaders: list[int] = []
    for state, group in enumerate(groups[:-1].tolist()):
        if numbers[group] < 0:
            numbers[group] = len(leaders)
            leaders.append(state)
    onto = numbers[groups].tolist()
    output = Automaton()
    for state in leaders:
        output.state(automaton.finals[state])
        merged: list[Edge] = []
        for low, high, to in sorted(automaton.edges[state]):
            if merged and merged[-1][1] + 1 == low and merged[-1][2] == onto[to]:
                merged[-1] = (merged[-1][0], high, onto[to])
            else:
                merged.append((low, high, onto[to]))
        output.edges[-1] = merged
        output.calls[-1] = [(name, onto[to]) for name, to in automaton.calls[state]]
    output.__dict__["_minimal"] = True  # automata are not changed once they are made
    return output


def strip_marks(builder: Builder, end: int) -> Automaton:
    """The texts ``t`` for which ``START t END`` is matched: how anchors become plain languages."""

    def after(states: Iterable[int], mark: int) -> set[int]:
        closed = builder.closure(states)
        return {to for state in closed for low, high, to in builder.edges[state] if low <= mark <= high}

    starts = after([0], TEXT_START)
    finals = {
        state
        for state, edges in enumerate(builder.edges)
        if any(low <= TEXT_END <= high and end in builder.closure([to]) for low, high, to in edges)
    }
    for state, edges in enumerate(builder.edges):
        builder.edges[state] = [(low, min(high, 255), to) for low, high, to in edges if low < 256]
    if not starts:
        return Automaton([[]], [[]], [False])
    return trim(builder.determinise(-1, starts, finals))
