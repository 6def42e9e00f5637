"""Lists of words as automata, and the tries of an object's names, over arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..jit import kernel
from .kernels import Bools, Ints, grown, pointers

Bytes = NDArray[np.uint8]


@kernel
def word_states(data: Bytes, ptr: Ints) -> tuple[Ints, Ints, Ints, Bools]:
    """The minimal acyclic automaton of sorted, different words.

    States of the words' trie come after those that lead to them, so one pass from the last to the first finds equal
    ones; what is left is numbered from the root on.

    Args:
        data: the words, one after the other; word ``n`` is ``data[ptr[n]:ptr[n + 1]]``.

    Returns:
        ``ptr, byte, to`` of the edges (see ``kernels``), and the final states.
    """
    room, words = data.shape[0] + 1, ptr.shape[0] - 1
    source, symbol = np.empty(room, np.int64), np.empty(room, np.int64)  # of the edge that leads to each state
    final = np.zeros(room, np.bool_)
    longest = 0
    for word in range(words):
        longest = max(longest, ptr[word + 1] - ptr[word])
    path = np.zeros(longest + 1, np.int64)
    count = 1
    for word in range(words):
        begin, size, shared = ptr[word], ptr[word + 1] - ptr[word], 0
        if word:
            before = ptr[word - 1]
            most = min(size, begin - before)
            while shared < most and data[before + shared] == data[begin + shared]:
                shared += 1
        for place in range(shared, size):
            source[count], symbol[count] = path[place], data[begin + place]
            path[place + 1] = count
            count += 1
        final[path[size]] = True
    starts, order = pointers(source[1:count], count)
    slots = 1
    while slots < 2 * count:
        slots *= 2
    table, same = np.full(slots, -1, np.int64), np.arange(count)
    for state in range(count - 1, -1, -1):
        mixed = np.uint64(7 + final[state])
        for place in range(starts[state], starts[state + 1]):
            below = order[place] + 1
            mixed = (mixed ^ np.uint64(symbol[below])) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29)) ^ np.uint64(same[below])) * np.uint64(0xBF58476D1CE4E5B9)
            mixed ^= mixed >> np.uint64(31)
        slot = np.int64(mixed >> np.uint64(1)) & (slots - 1)
        while table[slot] >= 0:
            other = table[slot]
            width = starts[state + 1] - starts[state]
            equal = final[other] == final[state] and starts[other + 1] - starts[other] == width
            for place in range(width):
                if not equal:
                    break
                one, two = order[starts[state] + place] + 1, order[starts[other] + place] + 1
                equal = symbol[one] == symbol[two] and same[one] == same[two]
            if equal:
                break
            slot = (slot + 1) & (slots - 1)
        if table[slot] < 0:
            table[slot] = state
        same[state] = table[slot]
    numbers, queue, filled = np.full(count, -1, np.int64), np.empty(count, np.int64), 1
    numbers[0], queue[0] = 0, 0
    new_ptr, byte, to = np.zeros(count + 1, np.int64), np.empty(count, np.int64), np.empty(count, np.int64)
    ends = np.empty(count, np.bool_)
    edges, here = 0, 0
    while here < filled:
        state = queue[here]
        ends[here] = final[state]
        for place in range(starts[state], starts[state + 1]):
            below = order[place] + 1
            onto = same[below]
            if numbers[onto] < 0:
                numbers[onto] = filled
                queue[filled] = onto
                filled += 1
            byte[edges], to[edges] = symbol[below], numbers[onto]
            edges += 1
        here += 1
        new_ptr[here] = edges
    return new_ptr[: filled + 1], byte[:edges], to[:edges], ends[:filled]


@kernel
def name_tries(data: Bytes, ptr: Ints, required: Bools) -> tuple[Ints, Ints, Ints, Ints, int]:
    """For each place of a list of names, a trie of those that may follow there.

    The trie of a place is that of the next one and a name, with which it shares all but the name's own path; behind a
    required name, it is that name alone. So all of them together are as large as the names.

    Args:
        data: the names, one after the other; none begins another. Name ``n`` is ``data[ptr[n]:ptr[n + 1]]``.

    Returns:
        ``(roots, source, byte, target, size)``: the node where each place's trie starts (-1 behind the last one),
        the edges, and how many nodes there are. A target below zero is the end of the name ``-1 - target``.
    """
    last = ptr.shape[0] - 1
    head, nodes = np.empty(1024, np.int64), 0  # each node's list of edges
    symbol, onto, following, entries = np.empty(1024, np.int64), np.empty(1024, np.int64), np.empty(1024, np.int64), 0
    roots = np.full(last + 1, -1, np.int64)
    for place in range(last - 1, -1, -1):
        old = -1 if required[place] else roots[place + 1]
        slot = -1  # the edge that is to lead to the node made next
        for position in range(ptr[place], ptr[place + 1]):
            head = grown(head, nodes + 1)
            here, nodes = nodes, nodes + 1
            head[here] = -1
            if slot < 0:
                roots[place] = here
            else:
                onto[slot] = here
            slot, wanted, below = -1, np.int64(data[position]), -1
            entry = head[old] if old >= 0 else -1
            while entry >= 0:  # a copy of the old node
                symbol, onto = grown(symbol, entries + 1), grown(onto, entries + 1)
                following = grown(following, entries + 1)
                symbol[entries], onto[entries], following[entries] = symbol[entry], onto[entry], head[here]
                head[here] = entries
                if symbol[entry] == wanted:
                    slot, below = entries, onto[entry]
                entries += 1
                entry = following[entry]
            if slot < 0:
                symbol, onto = grown(symbol, entries + 1), grown(onto, entries + 1)
                following = grown(following, entries + 1)
                symbol[entries], following[entries] = wanted, head[here]
                head[here], slot = entries, entries
                entries += 1
            onto[slot] = -1 - place  # unless the name goes on
            old = below
    numbers, queue, filled = np.full(nodes, -1, np.int64), np.empty(nodes, np.int64), 0
    for place in range(last):
        if numbers[roots[place]] < 0:
            numbers[roots[place]] = filled
            queue[filled] = roots[place]
            filled += 1
        roots[place] = numbers[roots[place]]
    source, byte, target, edges = np.empty(1024, np.int64), np.empty(1024, np.int64), np.empty(1024, np.int64), 0
    here = 0
    while here < filled:
        entry = head[queue[here]]
        while entry >= 0:
            source, byte, target = grown(source, edges + 1), grown(byte, edges + 1), grown(target, edges + 1)
            source[edges], byte[edges], target[edges] = here, symbol[entry], onto[entry]
            if onto[entry] >= 0:
                if numbers[onto[entry]] < 0:
                    numbers[onto[entry]] = filled
                    queue[filled] = onto[entry]
                    filled += 1
                target[edges] = numbers[onto[entry]]
            edges += 1
            entry = following[entry]
        here += 1
    return roots, source[:edges], byte[:edges], target[:edges], filled
