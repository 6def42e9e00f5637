"""What ``automata`` and ``products`` do state by state, over arrays: trimming, minimising, products; and what
``subset_construction`` shares with them.

Edges of state ``s`` are ``ptr[s]:ptr[s + 1]`` of ``low, high, to``, its calls ``call_ptr[s]:call_ptr[s + 1]`` of
``call_id, call_to``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..jit import inlined, kernel

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
UInts = NDArray[np.uint64]
Parts = tuple[Ints, Ints, Ints, Ints, Ints, Ints, Ints, Bools]
"""``ptr, low, high, to, call_ptr, call_id, call_to, final``"""
SYMBOLS = 260
"""Bytes, and the two marks of a text's start and end."""


@kernel
def grown(array: Ints, needed: int) -> Ints:
    """The array, with room for ``needed`` values."""
    if needed <= array.shape[0]:
        return array
    fresh = np.empty(max(needed, 2 * array.shape[0]), np.int64)
    fresh[: array.shape[0]] = array
    return fresh


@inlined
def slot_of(key: int, slots: int) -> int:
    """Where the search for a key begins in a table of ``slots`` places, a power of two."""
    return int((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(33)) & (slots - 1)


@kernel
def order_of(values: Ints) -> Ints:
    """The places of values in rising order, equal ones as they came (one function, as sorting is long to compile)."""
    return np.argsort(values, kind="mergesort")


@kernel
def pointers(source: Ints, size: int) -> tuple[Ints, Ints]:
    """``(ptr, order)``: rows sorted by ``source``, those of one source in the order in which they came."""
    ptr = np.zeros(size + 1, np.int64)
    for place in range(source.shape[0]):
        ptr[source[place] + 1] += 1
    for state in range(size):
        ptr[state + 1] += ptr[state]
    following = ptr[:-1].copy()
    order = np.empty(source.shape[0], np.int64)
    for place in range(source.shape[0]):
        order[following[source[place]]] = place
        following[source[place]] += 1
    return ptr, order


@kernel
def trimmed(
    ptr: Ints,
    low: Ints,
    high: Ints,
    to: Ints,
    call_ptr: Ints,
    call_id: Ints,
    call_to: Ints,
    final: Bools,
    productive: Bools,
) -> tuple[Ints, Ints, Ints, Ints, Ints, Ints, Ints, Bools]:
    """Without states that are not reached or lead nowhere, and without calls of rules that are not ``productive``.

    States are numbered in the order in which they are met.
    """
    size = ptr.shape[0] - 1
    alive = 0
    for call in range(call_id.shape[0]):
        alive += productive[call_id[call]]
    back_from, back_to = np.empty(to.shape[0] + alive, np.int64), np.empty(to.shape[0] + alive, np.int64)
    entries = 0
    for state in range(size):
        for edge in range(ptr[state], ptr[state + 1]):
            back_from[entries], back_to[entries] = to[edge], state
            entries += 1
        for call in range(call_ptr[state], call_ptr[state + 1]):
            if productive[call_id[call]]:
                back_from[entries], back_to[entries] = call_to[call], state
                entries += 1
    back_ptr, order = pointers(back_from, size)
    useful = final.copy()
    queue, filled = np.empty(size, np.int64), 0
    for state in range(size):
        if useful[state]:
            queue[filled] = state
            filled += 1
    place = 0
    while place < filled:
        state = queue[place]
        place += 1
        for entry in range(back_ptr[state], back_ptr[state + 1]):
            source = back_to[order[entry]]
            if not useful[source]:
                useful[source] = True
                queue[filled] = source
                filled += 1
    numbers = np.full(size, -1, np.int64)
    numbers[0], queue[0], filled = 0, 0, 1
    edges, calls, place = 0, 0, 0
    while place < filled:
        state = queue[place]
        place += 1
        for edge in range(ptr[state], ptr[state + 1]):
            if useful[to[edge]]:
                edges += 1
                if numbers[to[edge]] < 0:
                    numbers[to[edge]] = filled
                    queue[filled] = to[edge]
                    filled += 1
        for call in range(call_ptr[state], call_ptr[state + 1]):
            if productive[call_id[call]] and useful[call_to[call]]:
                calls += 1
                if numbers[call_to[call]] < 0:
                    numbers[call_to[call]] = filled
                    queue[filled] = call_to[call]
                    filled += 1
    new_ptr, new_call_ptr = np.zeros(filled + 1, np.int64), np.zeros(filled + 1, np.int64)
    new_low, new_high, new_to = np.empty(edges, np.int64), np.empty(edges, np.int64), np.empty(edges, np.int64)
    new_id, new_call = np.empty(calls, np.int64), np.empty(calls, np.int64)
    ends = np.empty(filled, np.bool_)
    edges, calls = 0, 0
    for number in range(filled):
        state = queue[number]
        ends[number] = final[state]
        for edge in range(ptr[state], ptr[state + 1]):
            if useful[to[edge]]:
                new_low[edges], new_high[edges], new_to[edges] = low[edge], high[edge], numbers[to[edge]]
                edges += 1
        for call in range(call_ptr[state], call_ptr[state + 1]):
            if productive[call_id[call]] and useful[call_to[call]]:
                new_id[calls], new_call[calls] = call_id[call], numbers[call_to[call]]
                calls += 1
        new_ptr[number + 1], new_call_ptr[number + 1] = edges, calls
    return new_ptr, new_low, new_high, new_to, new_call_ptr, new_id, new_call, ends


@kernel
def overlaps(ptr: Ints, low: Ints, high: Ints) -> bool:
    """Whether some state has two edges for one byte; its edges need not be sorted."""
    for state in range(ptr.shape[0] - 1):
        begin, end = ptr[state], ptr[state + 1]
        if end - begin < 2:
            continue
        order = order_of(low[begin:end])
        for place in range(1, end - begin):
            if low[begin + order[place]] <= high[begin + order[place - 1]]:
                return True
    return False


@kernel
def calls_twice(call_ptr: Ints, call_id: Ints) -> bool:
    """Whether some state calls one rule to go on in two states."""
    for state in range(call_ptr.shape[0] - 1):
        begin, end = call_ptr[state], call_ptr[state + 1]
        if end - begin > 1:
            order = order_of(call_id[begin:end])
            for place in range(1, end - begin):
                if call_id[begin + order[place]] == call_id[begin + order[place - 1]]:
                    return True
    return False


@kernel
def joined(
    ptr: Ints,
    low: Ints,
    high: Ints,
    to: Ints,
    call_ptr: Ints,
    call_id: Ints,
    call_to: Ints,
    final: Bools,
    weights: UInts,
    call_weights: UInts,
    most_rounds: int,
) -> tuple[bool, Ints, Ints, Ints, Ints, Ints, Ints, Ints, Bools]:
    """Equivalent states of a deterministic automaton as one (Moore's refinement over 64-bit hashes of states' rows).

    A row's hash is the sum over all symbols of a random weight times the label of the group that the symbol leads to;
    a range of bytes weighs the difference of two sums of weights.

    Args:
        weights: ``[SYMBOLS + 1]``, sums of the bytes' random weights up to each byte.
        call_weights: ``[rules]``, random weights.

    Returns:
        Whether it was finished in ``most_rounds``, and the ``Parts``; edges of a state are sorted.
    """
    size = ptr.shape[0] - 1
    groups = final.astype(np.int64)
    count = 1
    for state in range(size):
        if final[state] != final[0]:
            count = 2
            break
    slots = 1
    while slots < 2 * size + 2:
        slots *= 2
    table, owner = np.full(slots, -1, np.int64), np.empty(size, np.uint64)
    labels, fresh = np.empty(size + 2, np.uint64), np.empty(size, np.int64)
    for label in range(size + 2):
        mixed = np.uint64(label + 1) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        labels[label] = mixed ^ (mixed >> np.uint64(31))
    nowhere, done = labels[size + 1], False
    for _ in range(most_rounds):
        table[:] = -1
        found = 0
        for state in range(size):
            total = np.uint64(0)
            for edge in range(ptr[state], ptr[state + 1]):
                total += (weights[high[edge] + 1] - weights[low[edge]]) * (labels[groups[to[edge]]] - nowhere)
            for call in range(call_ptr[state], call_ptr[state + 1]):
                total += call_weights[call_id[call]] * labels[groups[call_to[call]]]
            total ^= total >> np.uint64(31)
            total = total * np.uint64(0x9E3779B97F4A7C15) + labels[groups[state]]
            slot = np.int64((total ^ (total >> np.uint64(32))) & np.uint64(slots - 1))
            while table[slot] >= 0 and owner[table[slot]] != total:
                slot = (slot + 1) & (slots - 1)
            if table[slot] < 0:
                table[slot], owner[found] = found, total
                found += 1
            fresh[state] = table[slot]
        groups[:] = fresh  # numbered in the order of their first states: state 0 stays first
        if found == count:
            done = True
            break
        count = found
    if not done:
        return False, ptr, low, high, to, call_ptr, call_id, call_to, final
    new_ptr, new_call_ptr = np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64)
    new_low, new_high, new_to = np.empty_like(low), np.empty_like(low), np.empty_like(low)
    new_id, new_call, ends = np.empty_like(call_id), np.empty_like(call_id), np.empty(count, np.bool_)
    number, edges, calls = 0, 0, 0
    for state in range(size):
        if groups[state] != number:  # not the first of its group
            continue
        begin, width = ptr[state], ptr[state + 1] - ptr[state]
        ordered = True
        for edge in range(begin + 1, begin + width):
            if low[edge] < low[edge - 1]:
                ordered = False
        order = np.arange(width) if ordered else order_of(low[begin : begin + width])
        start = edges
        for place in range(width):
            edge = begin + order[place]
            onto = groups[to[edge]]
            if edges > start and new_high[edges - 1] + 1 == low[edge] and new_to[edges - 1] == onto:
                new_high[edges - 1] = high[edge]
            else:
                new_low[edges], new_high[edges], new_to[edges] = low[edge], high[edge], onto
                edges += 1
        for call in range(call_ptr[state], call_ptr[state + 1]):
            new_id[calls], new_call[calls] = call_id[call], groups[call_to[call]]
            calls += 1
        ends[number] = final[state]
        number += 1
        new_ptr[number], new_call_ptr[number] = edges, calls
    return (
        True,
        new_ptr,
        new_low[:edges],
        new_high[:edges],
        new_to[:edges],
        new_call_ptr,
        new_id[:calls],
        new_call[:calls],
        ends,
    )


@kernel
def sorted_edges(ptr: Ints, low: Ints, high: Ints, to: Ints) -> tuple[Ints, Ints, Ints]:
    """``(low, high, to)`` with the edges of each state sorted by their bytes."""
    order = np.arange(low.shape[0])
    for state in range(ptr.shape[0] - 1):
        begin, end = ptr[state], ptr[state + 1]
        for edge in range(begin + 1, end):
            if low[edge] < low[edge - 1]:
                order[begin:end] = begin + order_of(low[begin:end])
                break
    return low[order], high[order], to[order]


@kernel
def product(
    ptr: Ints,
    low: Ints,
    high: Ints,
    to: Ints,
    final: Bools,
    ptr2: Ints,
    low2: Ints,
    high2: Ints,
    to2: Ints,
    final2: Bools,
    both: bool,
    only_first: bool,
    only_second: bool,
    most: int,
) -> tuple[bool, Ints, Ints, Ints, Ints, Bools]:
    """Two deterministic automata side by side; where one of them has no way on, the other may go on alone.

    Args:
        both, only_first, only_second: whether a text is accepted that both, or one of them, accept.
        most: with more states it gives up.

    Returns:
        Whether it was finished, ``ptr, low, high, to``, and final states.
    """
    low, high, to = sorted_edges(ptr, low, high, to)
    low2, high2, to2 = sorted_edges(ptr2, low2, high2, to2)
    width = ptr2.shape[0]  # a state of the second, or none
    table, keys, count = np.full(1024, -1, np.int64), np.empty(1024, np.int64), 1
    keys[0] = 1  # state 0 of the first, state 0 of the second
    table[slot_of(1, 1024)] = 0
    out_from, out_low = np.empty(1024, np.int64), np.empty(1024, np.int64)
    out_high, out_to, edges = np.empty(1024, np.int64), np.empty(1024, np.int64), 0
    here, finished = 0, True
    while here < count:
        one, other = keys[here] // width, keys[here] % width - 1
        if one == ptr.shape[0] - 1:
            one = -1
        mine, mine_end = (ptr[one], ptr[one + 1]) if one >= 0 else (0, 0)
        theirs, theirs_end = (ptr2[other], ptr2[other + 1]) if other >= 0 else (0, 0)
        start = 0
        while mine < mine_end or theirs < theirs_end:  # both are sorted and disjoint: from cut to cut
            least, most_a = (low[mine], high[mine]) if mine < mine_end else (512, 512)
            less, most_b = (low2[theirs], high2[theirs]) if theirs < theirs_end else (512, 512)
            start = max(start, min(least, less))
            end = min(most_a if least <= start else least - 1, most_b if less <= start else less - 1)
            onto = to[mine] if least <= start else -1
            onto2 = to2[theirs] if less <= start else -1
            if (onto >= 0 or only_second) and (onto2 >= 0 or only_first):
                key = (onto if onto >= 0 else ptr.shape[0] - 1) * width + onto2 + 1
                slot = slot_of(key, table.shape[0])
                while table[slot] >= 0 and keys[table[slot]] != key:
                    slot = (slot + 1) & (table.shape[0] - 1)
                number = table[slot]
                if number < 0:
                    number = count
                    table[slot] = number
                    keys = grown(keys, count + 1)
                    keys[number] = key
                    count += 1
                    if 2 * count > table.shape[0]:
                        table = np.full(4 * table.shape[0], -1, np.int64)
                        for known in range(count):
                            slot = slot_of(keys[known], table.shape[0])
                            while table[slot] >= 0:
                                slot = (slot + 1) & (table.shape[0] - 1)
                            table[slot] = known
                out_from, out_low = grown(out_from, edges + 1), grown(out_low, edges + 1)
                out_high, out_to = grown(out_high, edges + 1), grown(out_to, edges + 1)
                out_from[edges], out_low[edges], out_high[edges], out_to[edges] = here, start, end, number
                edges += 1
            start = end + 1
            if mine < mine_end and most_a < start:
                mine += 1
            if theirs < theirs_end and most_b < start:
                theirs += 1
        if count > most:
            finished = False
            break
        here += 1
    new_ptr, order = pointers(out_from[:edges], count)
    ends = np.zeros(count, np.bool_)
    for number in range(count):
        one, other = keys[number] // width, keys[number] % width - 1
        a = one < ptr.shape[0] - 1 and final[one]
        b = other >= 0 and final2[other]
        ends[number] = (a and b and both) or (a and not b and only_first) or (b and not a and only_second)
    return finished, new_ptr, out_low[:edges][order], out_high[:edges][order], out_to[:edges][order], ends
