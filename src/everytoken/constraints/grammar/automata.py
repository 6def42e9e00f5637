"""Automata over bytes: from expressions to nondeterministic, to deterministic, to minimal.

A rule's automaton has two kinds of edges: byte ranges, and calls of other rules. Calls are symbols like any other
while an
automaton is made deterministic, so only the choice between reading a byte and calling a rule stays open until run time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

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
from .kernels import SYMBOLS, Parts, calls_twice, joined, overlaps, pointers, subsets, trimmed

Edge = tuple[int, int, int]
MAX_WORK = 400_000_000
"""Edges looked at while an automaton is made minimal."""
MAX_STATES = 2_000_000
"""More states than this in one automaton are refused."""
_RANDOM = np.random.default_rng(0)
BYTE_WEIGHTS = np.cumsum(_RANDOM.integers(1, 1 << 63, SYMBOLS + 1, np.uint64))
CALL_WEIGHTS = _RANDOM.integers(1, 1 << 63, 4096, np.uint64)
"""Of symbols, in the hashes by which states are compared."""


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
    """An automaton as arrays; its lists are made only where somebody asks for them.

    Args:
        parts: see ``kernels``: where each state's edges start, the edges, where its calls start, the calls, and which
            states are final.
        names: the rules that calls number.
    """

    def __init__(self, parts: Parts, names: Sequence[str] = ()):
        self.ptr, self.low, self.high, self.to, self.call_ptr, self.call_id, self.call_to, self.ends = parts
        self.names = names

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def parts(self) -> Parts:
        return self.ptr, self.low, self.high, self.to, self.call_ptr, self.call_id, self.call_to, self.ends

    @cached_property
    def edges(self) -> list[list[Edge]]:  # type: ignore[override]
        flat = list(zip(self.low.tolist(), self.high.tolist(), self.to.tolist(), strict=True))
        return [flat[begin:end] for begin, end in itertools.pairwise(self.ptr.tolist())]

    @cached_property
    def calls(self) -> list[list[tuple[str, int]]]:  # type: ignore[override]
        names = self.names
        flat = [(names[rule], to) for rule, to in zip(self.call_id.tolist(), self.call_to.tolist(), strict=True)]
        return [flat[begin:end] for begin, end in itertools.pairwise(self.call_ptr.tolist())]

    @cached_property
    def finals(self) -> list[bool]:  # type: ignore[override]
        return self.ends.tolist()

    @property
    def regular(self) -> bool:
        return len(self.call_to) == 0

    @property
    def opens(self) -> bool:
        return bool(self.ends[0]) or bool(self.ptr[1] > 0) or bool(self.call_ptr[1] > 0)

    @cached_property
    def separable(self) -> bool:  # type: ignore[override]
        ends = np.flatnonzero(self.ends)
        if len(ends) != 1 or ends[0] == 0:
            return False
        end = int(ends[0])
        leaves = self.ptr[end + 1] > self.ptr[end] or self.call_ptr[end + 1] > self.call_ptr[end]
        return not leaves and bool(self.to.all()) and bool(self.call_to.all())

    def called(self) -> set[str]:
        return {self.names[rule] for rule in np.unique(self.call_id).tolist()}


def arrays(automaton: Automaton) -> ArrayAutomaton:
    """The same automaton as arrays."""
    if isinstance(automaton, ArrayAutomaton):
        return automaton
    numbers: dict[str, int] = {}
    calls = [
        (numbers.setdefault(name, len(numbers)), to) for called in automaton.calls if called for name, to in called
    ]
    edges = (
        np.array([value for edges in automaton.edges for edge in edges for value in edge], np.int64).reshape(-1, 3).T
    )
    linked = np.array(calls, np.int64).reshape(-1, 2).T
    low, high, to = np.ascontiguousarray(edges)
    call_id, call_to = np.ascontiguousarray(linked)
    parts = (
        run_starts([len(edges) for edges in automaton.edges]), low, high, to,
        run_starts([len(called) for called in automaton.calls]), call_id, call_to, np.array(automaton.finals, np.bool_),
    )  # fmt: skip
    return ArrayAutomaton(parts, list(numbers))


def run_starts(counts: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each of some runs starts, and where the last one ends."""
    pointer = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=pointer[1:])
    return pointer


class Builder:
    """Thompson's construction, with calls; ``inline`` says which references are replaced by what they name.

    Attributes:
        size: how many states there are.
        edges: ``(sources, lows, highs, targets)``, a list each.
        calls: ``(sources, names, targets)``.
        empties: ``(sources, targets)`` of moves that read nothing.
    """

    def __init__(self, inline: Callable[[str], Any | None] = lambda _name: None):
        self.inline = inline
        self.size = 1
        self.edges: tuple[list[int], list[int], list[int], list[int]] = ([], [], [], [])
        self.calls: tuple[list[int], list[str], list[int]] = ([], [], [])
        self.empties: tuple[list[int], list[int]] = ([], [])

    def state(self, count: int = 1) -> int:
        """Makes states; returns the first one's number."""
        self.size += count
        if self.size > MAX_STATES:
            raise GrammarError(
                f"The grammar needs more than {MAX_STATES:,} automaton states.",
                "Lower repetition bounds or list fewer values.",
            )
        return self.size - count

    def edge(self, source: int, low: int, high: int, target: int) -> None:
        sources, lows, highs, targets = self.edges
        sources.append(source)
        lows.append(low)
        highs.append(high)
        targets.append(target)

    def call(self, source: int, name: str, target: int) -> None:
        sources, names, targets = self.calls
        sources.append(source)
        names.append(name)
        targets.append(target)

    def empty(self, source: int, target: int) -> None:
        self.empties[0].append(source)
        self.empties[1].append(target)

    def add(self, item: Any, source: int) -> int:
        """Builds ``item`` from ``source`` on and returns the state where it ends."""
        kind = type(item)
        if kind is Bytes:
            size = len(item.data)
            if size:
                first = self.state(size)
                sources, lows, highs, targets = self.edges
                sources.append(source)
                sources += range(first, first + size - 1)
                lows += item.data
                highs += item.data
                targets += range(first, first + size)
                source = first + size - 1
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
            self.call(source, item.name, end)
            return end
        if kind is Alt:
            if literals := _literals(item):
                return self._automaton(trie(literals), source)
            end = self.state()
            for part in item.parts:
                self.empty(self.add(part, source), end)
            return end
        if kind is Chars:
            end = self.state()
            for sequence in utf8_sequences(item.ranges):
                place = source
                for low, high in sequence[:-1]:
                    following = self.state()
                    self.edge(place, low, high, following)
                    place = following
                self.edge(place, *sequence[-1], end)
            return end
        if kind is ByteSet:
            end = self.state()
            for low, high in item.ranges:
                self.edge(source, low, high, end)
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
            self.empty(source, loop)
            self.empty(self.add(item.item, loop), loop)
            end = self.state()  # the loop itself must not gain edges of what follows: it may be re-entered
            self.empty(loop, end)
            return end
        end = self.state()
        for _ in range(item.high - item.low):
            self.empty(source, end)
            fresh = self.state()  # so that leaving early does not open the next copy's own loops
            self.empty(source, fresh)
            source = self.add(item.item, fresh)
        self.empty(source, end)
        return end

    def _graph(self, item: Graph, source: int) -> int:
        first = self.state(item.size)
        self.empty(source, first)
        end = self.state()
        for start, label, target in item.edges:
            fresh = self.state()
            self.empty(first + start, fresh)
            self.empty(self.add(label, fresh), first + target)
        for final in item.finals:
            self.empty(first + final, end)
        return end

    def _automaton(self, item: Automaton, source: int) -> int:
        """A copy of an automaton, with all of its states in a row."""
        known = arrays(item)
        edge_from = np.repeat(np.arange(len(known)), np.diff(known.ptr))
        call_from = np.repeat(np.arange(len(known)), np.diff(known.call_ptr))
        finals = np.flatnonzero(known.ends).tolist()
        if known.separable:  # its end has no way on: it can be the next part's start, and its start the last part's end
            base = self.state(len(known) - 1) - 1
            end = base + finals[0]
        else:
            base = self.state(len(known))
            self.empty(source, base)
            end = self.state()
            for final in finals:
                self.empty(base + final, end)
        starts = source if known.separable else base
        for mine, theirs in (
            (self.edges[0], np.where(edge_from == 0, starts, edge_from + base)),
            (self.edges[1], known.low),
            (self.edges[2], known.high),
            (self.edges[3], known.to + base),
        ):
            mine += theirs.tolist()
        if len(call_from):
            names, targets = known.names, self.calls[2]
            self.calls[0].extend(np.where(call_from == 0, starts, call_from + base).tolist())
            self.calls[1].extend(names[rule] for rule in known.call_id.tolist())
            targets += (known.call_to + base).tolist()
        return end

    # -- to a deterministic automaton ---------------------------------------------------------------------------------
    def moves(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``(ptr, to)`` of the moves that read nothing."""
        ptr, order = pointers(np.array(self.empties[0], np.int64), self.size)
        return ptr, np.array(self.empties[1], np.int64)[order]

    def closure(self, states: Iterable[int]) -> frozenset[int]:
        """What is reached without reading."""
        ptr, to = self.moves()
        seen = set(states)
        pending = list(seen)
        while pending:
            state = pending.pop()
            for target in to[ptr[state] : ptr[state + 1]].tolist():
                if target not in seen:
                    seen.add(target)
                    pending.append(target)
        return frozenset(seen)

    def determinise(self, final: int, starts: Iterable[int] = (0,), finals: set[int] | None = None) -> Automaton:
        """Subset construction. Where it would explode, the result keeps several edges for a byte instead."""
        accepting = np.zeros(self.size, np.bool_)
        accepting[[final] if finals is None else sorted(finals)] = True
        numbers: dict[str, int] = {}
        rules = [numbers.setdefault(name, len(numbers)) for name in self.calls[1]]
        ptr, order = pointers(np.array(self.edges[0], np.int64), self.size)
        low, high, to = (np.array(values, np.int64)[order] for values in self.edges[1:])
        call_ptr, order = pointers(np.array(self.calls[0], np.int64), self.size)
        call_id, call_to = np.array(rules, np.int64)[order], np.array(self.calls[2], np.int64)[order]
        limit = 8 * self.size + 4000
        finished, *parts = subsets(
            ptr, low, high, to, call_ptr, call_id, call_to, *self.moves(), accepting,
            np.array(sorted(starts), np.int64), limit, limit + 400_000,
        )  # fmt: skip
        if finished:
            return ArrayAutomaton(cast("Parts", tuple(parts)), list(numbers))
        flat = ArrayAutomaton((ptr, low, high, to, call_ptr, call_id, call_to, accepting), list(numbers))
        return self._without_empties(flat, starts)

    def _without_empties(self, flat: ArrayAutomaton, starts: Iterable[int]) -> Automaton:
        """The same language, nondeterministic but without empty moves; never larger than the input."""
        output = Automaton()
        numbers: dict[int, int] = {}
        pending: list[int] = []
        ptr, to = self.moves()
        empties = [to[begin:end].tolist() for begin, end in itertools.pairwise(ptr.tolist())]

        def number(state: int) -> int:
            if state not in numbers:
                numbers[state] = output.state()
                pending.append(state)
            return numbers[state]

        joint = -1  # before all starts
        number(joint)
        while pending:
            state = pending.pop()
            here = numbers[state]
            closed = set(starts) if state == joint else {state}
            waiting = list(closed)
            while waiting:
                for target in empties[waiting.pop()]:
                    if target not in closed:
                        closed.add(target)
                        waiting.append(target)
            output.finals[here] = any(flat.finals[s] for s in closed)
            output.edges[here] = list(dict.fromkeys((a, b, number(to)) for s in closed for a, b, to in flat.edges[s]))
            output.calls[here] = list(dict.fromkeys((name, number(to)) for s in closed for name, to in flat.calls[s]))
        return output


def build(item: Any, inline: Callable[[str], Any | None] = lambda _name: None) -> Automaton:
    """An expression's automaton: deterministic unless that explodes."""
    if isinstance(item, Automaton):
        return item
    if literals := _literals(item):
        return trie(literals)
    if type(item) is Repeat and item.high is not None and item.high >= 4 and not isinstance(item.item, Automaton):
        unit = minimise(build(item.item, inline))
        if unit.separable and is_deterministic(unit):
            return _chain(arrays(unit), item.low, item.high)
    builder = Builder(inline)
    return trim(builder.determinise(builder.add(item, 0)))


def _chain(unit: ArrayAutomaton, low: int, high: int) -> Automaton:
    """Copies of an automaton one after the other, each one's end the next one's start; deterministic if the copies
    are."""
    inner = len(unit) - 1  # the end of a copy is the start of the next
    end = int(np.flatnonzero(unit.ends)[0])
    local = np.arange(len(unit)) - (np.arange(len(unit)) > end)
    local[end] = inner
    size = inner * high + 1
    if size > MAX_STATES:
        raise GrammarError(f"A repetition needs more than {MAX_STATES:,} states.", "Lower its upper bound.")
    bases = np.arange(high)[:, None] * inner

    def pointer(widths: NDArray[np.int64]) -> NDArray[np.int64]:
        return run_starts([*np.tile(np.delete(widths, end), high).tolist(), 0])

    finals = np.zeros(size, np.bool_)
    finals[low * inner :: inner] = True
    parts = (
        pointer(np.diff(unit.ptr)), np.tile(unit.low, high), np.tile(unit.high, high), (local[unit.to] + bases).ravel(),
        pointer(np.diff(unit.call_ptr)), np.tile(unit.call_id, high), (local[unit.call_to] + bases).ravel(), finals,
    )  # fmt: skip
    return ArrayAutomaton(parts, unit.names)


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
    known = arrays(automaton)
    kept = np.array([productive(name) for name in known.names], np.bool_)
    return ArrayAutomaton(trimmed(*known.parts, kept), known.names)


# -- deterministic automata --------------------------------------------------------------------------------------------
def is_deterministic(automaton: Automaton) -> bool:
    known = arrays(automaton)
    return not overlaps(known.ptr, known.low, known.high)


def minimise(automaton: Automaton) -> Automaton:
    """Joins equivalent states of a deterministic automaton (unchanged where that would take too long)."""
    if len(automaton) <= 1 or "_minimal" in automaton.__dict__ or not is_deterministic(automaton):
        return automaton
    known = arrays(automaton)
    if calls_twice(known.call_ptr, known.call_id):
        return automaton
    rounds = max(MAX_WORK // (len(known.to) + len(known.call_to) + len(known)), 64)
    finished, *parts = joined(
        *known.parts, BYTE_WEIGHTS, CALL_WEIGHTS.take(range(len(known.names)), mode="wrap"), rounds
    )
    if not finished:
        return automaton
    output = ArrayAutomaton(cast("Parts", tuple(parts)), known.names)
    output.__dict__["_minimal"] = True  # automata are not changed once they are made
    return output


def strip_marks(builder: Builder, end: int) -> Automaton:
    """The texts ``t`` for which ``START t END`` is matched: how anchors become plain languages."""
    edges = list(zip(*builder.edges, strict=True))
    begun = builder.closure([0])
    starts = builder.closure(to for source, low, high, to in edges if source in begun and low <= TEXT_START <= high)
    finals = {source for source, low, high, to in edges if low <= TEXT_END <= high and end in builder.closure([to])}
    kept = [(source, low, min(high, 255), to) for source, low, high, to in edges if low < 256]
    builder.edges = tuple(map(list, zip(*kept, strict=True))) if kept else ([], [], [], [])  # type: ignore[assignment]
    if not starts:
        return Automaton([[]], [[]], [False])
    return trim(builder.determinise(-1, starts, finals))
