"""What ``automata`` does state by state, over arrays: determinising, trimming, minimising.

Edges of state ``s`` are ``ptr[s]:ptr[s + 1]`` of ``low, high, to``, its calls ``call_ptr[s]:call_ptr[s + 1]`` of
``call_id, call_to``.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..jit import kernel

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
UInts = NDArray[np.uint64]
Array = TypeVar("Array", Ints, UInts)
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
def subsets(
    ptr: Ints,
    low: Ints,
    high: Ints,
    to: Ints,
    call_ptr: Ints,
    call_id: Ints,
    call_to: Ints,
    move_ptr: Ints,
    move_to: Ints,
    accepting: Bools,
    starts: Ints,
    most_states: int,
    most_work: int,
) -> tuple[bool, Ints, Ints, Ints, Ints, Ints, Ints, Ints, Bools]:
    """The subset construction.

    Args:
        move_ptr, move_to: empty moves.
        accepting: ``[N]``, states where a text may end.
        starts: states to start from.
        most_states, most_work: with more states, or edges looked at, it gives up.

    Returns:
        Whether it was finished, and the ``Parts`` of the result; edges of a state are sorted, and do not overlap.
    """
    size = ptr.shape[0] - 1
    begins, ends = np.full(size, -1, np.int64), np.zeros(size, np.int64)  # of states' closures
    closed, used = np.empty(4 * size + 16, np.int64), 0
    seen, stamp = np.zeros(size, np.int64), 0
    stack, union = np.empty(size + 1, np.int64), np.empty(size + 1, np.int64)
    # the subsets, one after the other; found by their hashes in an open table
    sets, set_ptr, count = np.empty(4 * size + 16, np.int64), np.zeros(size + 2, np.int64), 0
    table = np.full(1024, -1, np.int64)
    hashes = np.empty(1024, np.int64)
    pending, waiting = np.empty(1024, np.int64), 0
    # groups of targets that one symbol leads to: ranges of bytes, then calls (their high is -1, their low the rule)
    group_low, group_high = np.empty(SYMBOLS, np.int64), np.empty(SYMBOLS, np.int64)
    group_ptr, targets = np.zeros(SYMBOLS + 1, np.int64), np.empty(1024, np.int64)
    cut, index = np.zeros(SYMBOLS + 1, np.bool_), np.zeros(SYMBOLS + 1, np.int64)
    cuts, covered = np.empty(SYMBOLS + 1, np.int64), np.zeros(SYMBOLS + 1, np.int64)
    ids, onto = np.empty(64, np.int64), np.empty(64, np.int64)
    out_from, out_low, out_high = np.empty(1024, np.int64), np.empty(1024, np.int64), np.empty(1024, np.int64)
    out_to, edges = np.empty(1024, np.int64), 0
    from_call, out_id, out_call, calls = np.empty(64, np.int64), np.empty(64, np.int64), np.empty(64, np.int64), 0
    here, work, finished = -1, 0, True
    while True:
        groups = 0
        if count == 0:
            targets = grown(targets, starts.shape[0])
            targets[: starts.shape[0]] = starts
            group_low[0], group_high[0], group_ptr[1], groups = 0, 0, starts.shape[0], 1
        else:
            if waiting == 0:
                break
            waiting -= 1
            here = pending[waiting]
            first, last = set_ptr[here], set_ptr[here + 1]
            total, called = 0, 0
            for place in range(first, last):
                state = sets[place]
                total += ptr[state + 1] - ptr[state]
                called += call_ptr[state + 1] - call_ptr[state]
            work += total + 1
            if total == 1:
                for place in range(first, last):
                    state = sets[place]
                    for edge in range(ptr[state], ptr[state + 1]):
                        group_low[0], group_high[0], targets[0] = low[edge], high[edge], to[edge]
                group_ptr[1], groups = 1, 1
            elif total > 1:
                cut[:] = False
                for place in range(first, last):
                    state = sets[place]
                    for edge in range(ptr[state], ptr[state + 1]):
                        cut[low[edge]] = True
                        cut[high[edge] + 1] = True
                kinds = 0
                for symbol in range(SYMBOLS + 1):
                    if cut[symbol]:
                        cuts[kinds], index[symbol], covered[kinds] = symbol, kinds, 0
                        kinds += 1
                for place in range(first, last):
                    state = sets[place]
                    for edge in range(ptr[state], ptr[state + 1]):
                        for kind in range(index[low[edge]], index[high[edge] + 1]):
                            covered[kind] += 1
                entries = 0
                for kind in range(kinds - 1):
                    if covered[kind]:
                        group_low[groups], group_high[groups] = cuts[kind], cuts[kind + 1] - 1
                        amount, covered[kind] = covered[kind], entries
                        entries += amount
                        groups += 1
                        group_ptr[groups] = entries
                targets = grown(targets, entries)
                for place in range(first, last):
                    state = sets[place]
                    for edge in range(ptr[state], ptr[state + 1]):
                        for kind in range(index[low[edge]], index[high[edge] + 1]):
                            targets[covered[kind]] = to[edge]
                            covered[kind] += 1
            if called:
                ids, onto = grown(ids, called), grown(onto, called)
                called = 0
                for place in range(first, last):
                    state = sets[place]
                    for call in range(call_ptr[state], call_ptr[state + 1]):
                        ids[called], onto[called] = call_id[call], call_to[call]
                        called += 1
                order = order_of(ids[:called])
                entries = group_ptr[groups]
                targets = grown(targets, entries + called)
                group_low, group_high = grown(group_low, groups + called), grown(group_high, groups + called)
                group_ptr = grown(group_ptr, groups + called + 1)
                for place in range(called):
                    if place == 0 or ids[order[place]] != ids[order[place - 1]]:
                        group_low[groups], group_high[groups] = ids[order[place]], -1
                        groups += 1
                    targets[entries] = onto[order[place]]
                    entries += 1
                    group_ptr[groups] = entries
        for group in range(groups):
            # the union of the targets' closures; only states that read, call or accept tell subsets apart
            stamp += 1
            members = 0
            for entry in range(group_ptr[group], group_ptr[group + 1]):
                target = targets[entry]
                if begins[target] < 0:
                    stamp += 1
                    closed = grown(closed, used + size)
                    begins[target] = used
                    seen[target] = stamp
                    stack[0], depth = target, 1
                    while depth:
                        depth -= 1
                        state = stack[depth]
                        if ptr[state + 1] > ptr[state] or call_ptr[state + 1] > call_ptr[state] or accepting[state]:
                            closed[used] = state
                            used += 1
                        for move in range(move_ptr[state], move_ptr[state + 1]):
                            if seen[move_to[move]] != stamp:
                                seen[move_to[move]] = stamp
                                stack[depth] = move_to[move]
                                depth += 1
                    ends[target] = used
                    stamp += 1
                    for place in range(members):  # what was seen before is told by the new stamp
                        seen[union[place]] = stamp
                for place in range(begins[target], ends[target]):
                    if seen[closed[place]] != stamp:
                        seen[closed[place]] = stamp
                        union[members] = closed[place]
                        members += 1
            if members > 1:
                union[:members] = union[:members][order_of(union[:members])]
            mixed = np.uint64(members)
            for place in range(members):
                mixed = (mixed ^ np.uint64(union[place])) * np.uint64(0x9E3779B97F4A7C15)
                mixed ^= mixed >> np.uint64(29)
            key = np.int64(mixed >> np.uint64(1))
            slot, number = key & (table.shape[0] - 1), -1
            while table[slot] >= 0:
                known = table[slot]
                if hashes[known] == key and set_ptr[known + 1] - set_ptr[known] == members:
                    same = True
                    for place in range(members):
                        if sets[set_ptr[known] + place] != union[place]:
                            same = False
                            break
                    if same:
                        number = known
                        break
                slot = (slot + 1) & (table.shape[0] - 1)
            if number < 0:
                number = count
                table[slot] = number
                hashes, set_ptr = grown(hashes, count + 1), grown(set_ptr, count + 2)
                sets = grown(sets, set_ptr[count] + members)
                hashes[count] = key
                sets[set_ptr[count] : set_ptr[count] + members] = union[:members]
                set_ptr[count + 1] = set_ptr[count] + members
                count += 1
                pending = grown(pending, waiting + 1)
                pending[waiting] = number
                waiting += 1
                if 2 * count > table.shape[0]:
                    table = np.full(4 * table.shape[0], -1, np.int64)
                    for known in range(count):
                        slot = hashes[known] & (table.shape[0] - 1)
                        while table[slot] >= 0:
                            slot = (slot + 1) & (table.shape[0] - 1)
                        table[slot] = known
            if here < 0:
                continue
            if group_high[group] < 0:
                from_call, out_id = grown(from_call, calls + 1), grown(out_id, calls + 1)
                out_call = grown(out_call, calls + 1)
                from_call[calls], out_id[calls], out_call[calls] = here, group_low[group], number
                calls += 1
            elif (
                group > 0
                and edges > 0
                and out_from[edges - 1] == here
                and out_to[edges - 1] == number
                and out_high[edges - 1] + 1 == group_low[group]
            ):
                out_high[edges - 1] = group_high[group]
            else:
                out_from, out_low = grown(out_from, edges + 1), grown(out_low, edges + 1)
                out_high, out_to = grown(out_high, edges + 1), grown(out_to, edges + 1)
                out_from[edges], out_low[edges] = here, group_low[group]
                out_high[edges], out_to[edges] = group_high[group], number
                edges += 1
        if count > most_states or work > most_work:
            finished = False
            break
    new_ptr, order = pointers(out_from[:edges], count)
    new_call_ptr, call_order = pointers(from_call[:calls], count)
    final = np.zeros(count, np.bool_)
    for number in range(count):
        for place in range(set_ptr[number], set_ptr[number + 1]):
            if accepting[sets[place]]:
                final[number] = True
    return (
        finished,
        new_ptr,
        out_low[:edges][order],
        out_high[:edges][order],
        out_to[:edges][order],
        new_call_ptr,
        out_id[:calls][call_order],
        out_call[:calls][call_order],
        final,
    )


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
    table[np.int64((np.uint64(1) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(33)) & 1023] = 0
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
                slot = np.int64((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(33))
                slot &= table.shape[0] - 1
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
                            slot = np.int64((np.uint64(keys[known]) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(33))
                            slot &= table.shape[0] - 1
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
