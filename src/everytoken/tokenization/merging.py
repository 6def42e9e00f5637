"""Pair merges over a batch of sequences, with counts kept up to date instead of counted anew.

Every slot that has a right neighbour is an occurrence of one pair. The occurrences of a pair are a doubly linked list
through the slots, in order, so the head of the list is the first occurrence. A heap holds ``(count, first occurrence)``
of every pair. A merge touches only its occurrences and their neighbours: all merges of a batch together cost O(n log
n), where counting anew costs O(n) each.

Counting is the plain one: all adjacent pairs, overlapping ones too; the most frequent pair goes first, ties by first
occurrence in the batch as it then is; a pair is replaced left to right everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np

PAIRS, HEAP, LIVE, CHANGED, STAMP = range(5)
"""Places of the counters."""


@numba.njit(cache=True)
def _pair(left: int, right: int, keys: np.ndarray, values: np.ndarray, pairs: np.ndarray, counters: np.ndarray) -> int:
    """The number of a pair, new or known (open addressing)."""
    key = (np.int64(left) << 32) | np.int64(right)
    mask = len(keys) - 1
    place = (key * np.int64(-7046029254386353131) >> 20) & mask
    while keys[place] != -1:
        if keys[place] == key:
            return values[place]
        place = (place + 1) & mask
    number = counters[PAIRS]
    counters[PAIRS] += 1
    keys[place], values[place] = key, number
    pairs[number, 0], pairs[number, 1], pairs[number, 2] = left, right, 0
    pairs[number, 3], pairs[number, 4], pairs[number, 5], pairs[number, 6] = -1, -1, 1, 0
    return number


@numba.njit(cache=True)
def _touch(number: int, pairs: np.ndarray, changed: np.ndarray, counters: np.ndarray) -> None:
    if pairs[number, 6] != counters[STAMP]:
        pairs[number, 6] = counters[STAMP]
        changed[counters[CHANGED]] = number
        counters[CHANGED] += 1


@numba.njit(cache=True)
def _attach(
    slot: int,
    slots: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    pairs: np.ndarray,
    changed: np.ndarray,
    counters: np.ndarray,
) -> None:
    """The slot and its right neighbour become an occurrence."""
    right = slots[slot, 1]
    if right < 0:
        slots[slot, 3] = -1
        return
    number = _pair(slots[slot, 0], slots[right, 0], keys, values, pairs, counters)
    slots[slot, 3] = number
    after, before = -1, pairs[number, 4]
    while before > slot:  # only where a merged token spells one that was there before
        after, before = before, slots[before, 5]
    slots[slot, 4], slots[slot, 5] = after, before
    if before >= 0:
        slots[before, 4] = slot
    else:
        pairs[number, 3] = slot
    if after >= 0:
        slots[after, 5] = slot
    else:
        pairs[number, 4] = slot
    pairs[number, 2] += 1
    _touch(number, pairs, changed, counters)


@numba.njit(cache=True)
def _detach(slot: int, slots: np.ndarray, pairs: np.ndarray, changed: np.ndarray, counters: np.ndarray) -> None:
    number = slots[slot, 3]
    if number < 0:
        return
    after, before = slots[slot, 4], slots[slot, 5]
    if before >= 0:
        slots[before, 4] = after
    else:
        pairs[number, 3] = after
    if after >= 0:
        slots[after, 5] = before
    else:
        pairs[number, 4] = before
    pairs[number, 2] -= 1
    slots[slot, 3] = -1
    _touch(number, pairs, changed, counters)


@numba.njit(cache=True)
def _score(number: int, pairs: np.ndarray) -> int:
    return (np.int64(pairs[number, 2]) << 32) | (np.int64(0x7FFFFFFF) - pairs[number, 3])


@numba.njit(cache=True)
def _push_changed(pairs: np.ndarray, changed: np.ndarray, heap: np.ndarray, counters: np.ndarray) -> None:
    for index in range(counters[CHANGED]):
        number = changed[index]
        if pairs[number, 2] <= 0 or pairs[number, 5] == 0:
            continue
        score, place = _score(number, pairs), counters[HEAP]
        counters[HEAP] += 1
        while place > 0:
            above = (place - 1) >> 1
            if heap[above, 0] >= score:
                break
            heap[place, 0], heap[place, 1] = heap[above, 0], heap[above, 1]
            place = above
        heap[place, 0], heap[place, 1] = score, number
    counters[CHANGED] = 0
    counters[STAMP] += 1


@numba.njit(cache=True)
def _begin(
    starts: np.ndarray,
    slots: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    pairs: np.ndarray,
    heap: np.ndarray,
    changed: np.ndarray,
    counters: np.ndarray,
) -> None:
    for row in range(len(starts) - 1):
        for slot in range(starts[row], starts[row + 1]):
            slots[slot, 1] = slot + 1 if slot + 1 < starts[row + 1] else -1
            slots[slot, 2] = slot - 1 if slot > starts[row] else -1
        for slot in range(starts[row], starts[row + 1]):
            _attach(slot, slots, keys, values, pairs, changed, counters)
    _push_changed(pairs, changed, heap, counters)


@numba.njit(cache=True)
def _pop(pairs: np.ndarray, heap: np.ndarray, counters: np.ndarray) -> int:
    """The best pair whose entry is still true, or -1."""
    while counters[HEAP] > 0:
        score, number = heap[0, 0], heap[0, 1]
        counters[HEAP] -= 1
        size = counters[HEAP]
        last_score, last = heap[size, 0], heap[size, 1]
        place = 0
        while True:
            below = 2 * place + 1
            if below >= size:
                break
            if below + 1 < size and heap[below + 1, 0] > heap[below, 0]:
                below += 1
            if heap[below, 0] <= last_score:
                break
            heap[place, 0], heap[place, 1] = heap[below, 0], heap[below, 1]
            place = below
        heap[place, 0], heap[place, 1] = last_score, last
        if pairs[number, 5] == 1 and pairs[number, 2] > 0 and _score(number, pairs) == score:
            return number
    return -1


@numba.njit(cache=True)
def _merge(
    number: int,
    token: int,
    slots: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    pairs: np.ndarray,
    heap: np.ndarray,
    changed: np.ndarray,
    counters: np.ndarray,
) -> None:
    while pairs[number, 3] >= 0:
        slot = pairs[number, 3]
        right, before = slots[slot, 1], slots[slot, 2]
        after = slots[right, 1]
        if before >= 0:
            _detach(before, slots, pairs, changed, counters)
        _detach(slot, slots, pairs, changed, counters)
        _detach(right, slots, pairs, changed, counters)
        slots[slot, 0], slots[slot, 1] = token, after
        if after >= 0:
            slots[after, 2] = slot
        counters[LIVE] -= 1
        if before >= 0:
            _attach(before, slots, keys, values, pairs, changed, counters)
        _attach(slot, slots, keys, values, pairs, changed, counters)
    _push_changed(pairs, changed, heap, counters)


class PairMerger:
    """The pairs of a batch.

    ::

        merger = PairMerger([[5, 6, 5, 6], [5, 6]])
        merger.best()                                  # (5, 6)
        merger.merge(100)                              # or merger.discard()
        merger.rows()                                  # [([100, 100], [0, 2]), ([100], [0])]

    Args:
        rows: sequences of numbers, 0 to 2^31 - 1.
    """

    def __init__(self, rows: Sequence[Sequence[int]]):
        sizes = [len(row) for row in rows]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        total = int(self._starts[-1])
        self._slots = np.full((total, 6), -1, np.int32)  # token, following, previous, pair, occurrence after, before
        if total:
            self._slots[:, 0] = np.concatenate([np.asarray(row, np.int64) for row in rows if len(row)])
        capacity = 3 * total + 1  # a merge makes one token less and at most two new pairs
        self._keys = np.full(1 << (2 * capacity).bit_length(), -1, np.int64)
        self._values = np.empty(len(self._keys), np.int32)
        self._pairs = np.empty((capacity, 7), np.int32)  # left, right, count, head, tail, allowed, stamp
        self._heap = np.empty((8 * total + 8, 2), np.int64)
        self._changed = np.empty(capacity, np.int32)
        self._counters = np.array([0, 0, total, 0, 1], np.int64)
        self._current = -1
        self._state = (self._slots, self._keys, self._values, self._pairs, self._heap, self._changed, self._counters)
        _begin(self._starts, *self._state)

    @property
    def length(self) -> int:
        """Tokens left, all rows together."""
        return int(self._counters[LIVE])

    def best(self) -> tuple[int, int] | None:
        """The most frequent pair (ties: the first in the batch), or None at the end.

        Answer with ``merge`` or ``discard``.
        """
        self._current = _pop(self._pairs, self._heap, self._counters)
        if self._current < 0:
            return None
        return int(self._pairs[self._current, 0]), int(self._pairs[self._current, 1])

    @property
    def count(self) -> int:
        """How often the pair that ``best`` gave occurs, overlapping ones counted too."""
        return int(self._pairs[self._current, 2])

    def merge(self, token: int) -> None:
        """Replaces the pair that ``best`` gave everywhere."""
        _merge(self._current, token, *self._state)

    def discard(self) -> None:
        """The pair that ``best`` gave is never to be merged."""
        self._pairs[self._current, 5] = 0

    def rows(self) -> list[tuple[list[int], list[int]]]:
        """For each row its tokens now, and at which old token each starts."""
        found = []
        token, following = self._slots[:, 0].tolist(), self._slots[:, 1].tolist()
        for row in range(len(self._starts) - 1):
            first, end = int(self._starts[row]), int(self._starts[row + 1])
            slot, tokens, places = (first if first < end else -1), [], []
            while slot >= 0:
                tokens.append(token[slot])
                places.append(slot - first)
                slot = following[slot]
            found.append((tokens, places))
        return found
