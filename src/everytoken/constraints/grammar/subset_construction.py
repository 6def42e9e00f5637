"""The subset construction over arrays: what makes an automaton deterministic; ``kernels`` says how edges lie."""

from __future__ import annotations

import numpy as np

from ..jit import kernel
from .kernels import SYMBOLS, Bools, Ints, grown, order_of, pointers


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
