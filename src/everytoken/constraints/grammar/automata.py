"""Automata over bytes: from expressions to nondeterministic, to deterministic, to minimal.

Calls of other rules are symbols like any other while an automaton is made deterministic, so only the choice between
reading a byte and calling a rule stays open until run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .automaton import ArrayAutomaton, Automaton, arrays, run_starts
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
from .kernels import SYMBOLS, Parts, calls_twice, joined, overlaps, pointers, trimmed
from .subset_construction import subsets
from .tries import word_states

MAX_WORK = 400_000_000
"""Edges looked at while an automaton is made minimal."""
MAX_STATES = 2_000_000
"""More states than this in one automaton are refused."""
Moves = tuple[NDArray[np.int64], NDArray[np.int64]]
"""``(ptr, to)``: what each state leads to without reading."""
_RANDOM = np.random.default_rng(0)
BYTE_WEIGHTS = np.cumsum(_RANDOM.integers(1, 1 << 63, SYMBOLS + 1, np.uint64))
CALL_WEIGHTS = _RANDOM.integers(1, 1 << 63, 4096, np.uint64)
"""Of symbols, in the hashes by which states are compared."""


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
        sources, lows, highs, targets = self.edges
        starts, read, ends = item.reads
        sources += [first + start for start in starts]
        lows += read
        highs += read
        targets += [first + target for target in ends]
        for start, label, target in item.edges:  # what is added leads away from its start, and never back to it
            if type(label) is Bytes and len(label.data) == 1:
                self.edge(first + start, label.data[0], label.data[0], first + target)
            elif type(label) is Ref and self.inline(label.name) is None:
                self.call(first + start, label.name, first + target)
            else:
                self.empty(self.add(label, first + start), first + target)
        for final in item.finals:
            self.empty(first + final, end)
        return end

    def _automaton(self, item: Automaton, source: int) -> int:
        """A copy of an automaton, with all of its states in a row."""
        known = arrays(item)
        edge_from = known.sources
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
        if not known.regular:
            call_from = np.repeat(np.arange(len(known)), np.diff(known.call_ptr))
            names, targets = known.names, self.calls[2]
            self.calls[0].extend(np.where(call_from == 0, starts, call_from + base).tolist())
            self.calls[1].extend(names[rule] for rule in known.call_id.tolist())
            targets += (known.call_to + base).tolist()
        return end

    # -- to a deterministic automaton ---------------------------------------------------------------------------------
    def moves(self) -> Moves:
        """``(ptr, to)`` of the moves that read nothing."""
        ptr, order = pointers(np.array(self.empties[0], np.int64), self.size)
        return ptr, np.array(self.empties[1], np.int64)[order]

    def closure(self, states: Iterable[int], moves: Moves | None = None) -> set[int]:
        """What is reached without reading; ``moves`` are this builder's, where they are known already."""
        ptr, to = self.moves() if moves is None else moves
        seen = set(states)
        pending = list(seen)
        while pending:
            state = pending.pop()
            for target in to[ptr[state] : ptr[state + 1]].tolist():
                if target not in seen:
                    seen.add(target)
                    pending.append(target)
        return seen

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
        moves = self.moves()

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
            closed = self.closure(starts if state == joint else (state,), moves)
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
    """The minimal acyclic automaton of a list of words."""
    ordered = sorted(set(words))
    data = np.frombuffer(b"".join(ordered), np.uint8)
    ptr, byte, to, finals = word_states(data, run_starts([len(word) for word in ordered]))
    none = np.zeros(0, np.int64)
    output = ArrayAutomaton((ptr, byte, byte, to, np.zeros_like(ptr), none, none, finals))
    output.words = True
    output.__dict__["_minimal"] = True
    return output


def trim(automaton: Automaton, productive: Callable[[str], bool] = lambda _name: True) -> ArrayAutomaton:
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
    edges, moves = list(zip(*builder.edges, strict=True)), builder.moves()
    begun = builder.closure([0], moves)
    starts = {to for source, low, high, to in edges if source in begun and low <= TEXT_START <= high}
    finals = {
        source for source, low, high, to in edges if low <= TEXT_END <= high and end in builder.closure([to], moves)
    }
    kept = [(source, low, min(high, 255), to) for source, low, high, to in edges if low < 256]
    builder.edges = tuple(map(list, zip(*kept, strict=True))) if kept else ([], [], [], [])  # type: ignore[assignment]
    if not starts:
        return Automaton([[]], [[]], [False])
    return trim(builder.determinise(-1, starts, finals))
