"""An automaton over bytes, as lists that are easy to build and as arrays that kernels read.

It has two kinds of edges: byte ranges, and calls of other rules.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .kernels import Parts

Edge = tuple[int, int, int]


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
        return arrays(self).separable

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

    @cached_property
    def sources(self) -> NDArray[np.int64]:
        """The state of each edge."""
        return np.repeat(np.arange(len(self.ends)), np.diff(self.ptr))

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

    def calls_of(self, state: int) -> list[tuple[str, int]]:
        """One state's calls, where those of all are not asked for."""
        begin, end = self.call_ptr[state], self.call_ptr[state + 1]
        ids, targets = self.call_id[begin:end].tolist(), self.call_to[begin:end].tolist()
        return [(self.names[rule], to) for rule, to in zip(ids, targets, strict=True)]

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
