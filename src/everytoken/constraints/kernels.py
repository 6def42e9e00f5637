"""The hot paths of the grammar engine: a pushdown automaton run over bytes, and over all tokens at once (numba).

A *stack* is a node and the frame below it; a frame is a node to return to and the frame below that one. Frames live in an
arena and are never changed, so stacks share their lower parts, branching copies nothing, and rolling back is forgetting. The
state of a matcher is a set of stacks. Below a stack's own frames there is

    BOTTOM    the end of the grammar: popping it completes the text
    UNKNOWN   nothing known: popping it is what makes a token context-dependent
    BELOW     some caller, any caller: after an unknown pop the text goes on at one of the places that can follow the rule

``walk`` runs a set of stacks over a trie of tokens. Sets are kept by depth, so a prefix shared by many tokens is matched once;
where a node loops on itself for every byte in a subtree, all its tokens are accepted without a look.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

BOTTOM, UNKNOWN, BELOW = -1, -2, -3
OVERFLOW = -7
"""Returned when a buffer is too small; the caller grows it and calls again."""


@njit(cache=True, nogil=True, inline="always")
def _put(sn: Any, sp: Any, sb: Any, begin: int, end: int, node: int, parent: int, below: int) -> int:
    """Adds a stack to the set ``[begin, end)`` unless it is there; returns the new end."""
    for i in range(begin, end):
        if sn[i] == node and sp[i] == parent and sb[i] == below:
            return end
    if end >= sn.shape[0]:
        return OVERFLOW
    sn[end], sp[end], sb[end] = node, parent, below
    return end + 1


@njit(cache=True, nogil=True)
def close(
    pda: Any, fn: Any, fp: Any, fd: Any, top: int, base: int, sn: Any, sp: Any, sb: Any, begin: int, end: int, lowest: int
) -> Any:
    """Adds what is reached without reading: rules called, and returns from finished rules.

    Returns:
        ``(end, top, lowest)``: the set's new end, the arena's new top, and the least depth of a frame below ``base`` that was
        popped (0 for the bottom), or ``lowest`` if less.
    """
    _, _, _, _, call_ptr, call_start, call_to, final, node_rule, follow_ptr, follow_to, _ = pda
    i = begin
    while i < end:
        node, parent, below = sn[i], sp[i], sb[i]
        for c in range(call_ptr[node], call_ptr[node + 1]):
            under = parent
            if call_to[c] >= 0:  # otherwise a tail call: nothing to come back to
                under = -9
                for f in range(top - 1, base - 1, -1):
                    if fn[f] == call_to[c] and fp[f] == parent:
                        under = f
                        break
                if under == -9:
                    if top >= fn.shape[0]:
                        return OVERFLOW, top, lowest
                    fn[top], fp[top] = call_to[c], parent
                    fd[top] = fd[parent] + 1 if parent >= 0 else 1
                    under = top
                    top += 1
            end = _put(sn, sp, sb, begin, end, call_start[c], under, below)
            if end == OVERFLOW:
                return OVERFLOW, top, lowest
        if final[node]:
            if parent >= 0:
                if parent < base and fd[parent] < lowest:
                    lowest = fd[parent]
                end = _put(sn, sp, sb, begin, end, fn[parent], fp[parent], below)
                if end == OVERFLOW:
                    return OVERFLOW, top, lowest
            elif parent == BOTTOM:
                lowest = 0
            else:
                rule = node_rule[node]
                for f in range(follow_ptr[rule], follow_ptr[rule + 1]):
                    end = _put(sn, sp, sb, begin, end, follow_to[f], BELOW, 1)
                    if end == OVERFLOW:
                        return OVERFLOW, top, lowest
        i += 1
    return end, top, lowest


@njit(cache=True, nogil=True, inline="always")
def _step(pda: Any, sn: Any, sp: Any, sb: Any, begin: int, end: int, byte: int) -> int:
    """Reads a byte from the closed set ``[begin, end)``; the new set starts at ``end``. Returns its end."""
    edge_ptr, edge_lo, edge_hi, edge_to = pda[0], pda[1], pda[2], pda[3]
    fresh = end
    for i in range(begin, end):
        node = sn[i]
        for e in range(edge_ptr[node], edge_ptr[node + 1]):
            if edge_lo[e] <= byte and byte <= edge_hi[e]:
                fresh = _put(sn, sp, sb, end, fresh, edge_to[e], sp[i], sb[i])
                if fresh == OVERFLOW:
                    return OVERFLOW
    return fresh


@njit(cache=True, nogil=True)
def walk(pda: Any, trie: Any, fn: Any, fp: Any, fd: Any, top: int, sn: Any, sp: Any, sb: Any, count: int, words: Any, depend: Any) -> Any:
    """Runs the set in ``sn[:count]`` over all tokens of a trie.

    Args:
        words: ``[W]`` uint32, the bits of accepted tokens are set.
        depend: receives the trie nodes of tokens that survive only below an unknown frame.

    Returns:
        ``(accepted, dependent, lowest)``: how many tokens, how many trie nodes, and the least depth of a given frame that was
        popped; ``accepted`` is OVERFLOW if a buffer was too small.
    """
    byte_of, depth_of, skip, token_ptr, token_ids, subtree, levels = trie
    loop = pda[11]
    ends = np.empty(levels, np.int64)
    begins = np.empty(levels, np.int64)
    tops = np.empty(levels, np.int64)
    closed = np.zeros(levels, np.bool_)
    begins[0], ends[0], tops[0] = 0, count, top
    base, lowest, accepted, dependent = top, 1 << 30, 0, 0
    i = 0
    while i < byte_of.shape[0]:
        depth = depth_of[i]
        above = depth - 1
        if not closed[above]:
            end, peak, lowest = close(pda, fn, fp, fd, tops[above], base, sn, sp, sb, begins[above], ends[above], lowest)
            if end == OVERFLOW:
                return OVERFLOW, 0, 0
            ends[above], tops[above], closed[above] = end, peak, True
        start = ends[above]
        end = _step(pda, sn, sp, sb, begins[above], start, byte_of[i])
        if end == OVERFLOW:
            return OVERFLOW, 0, 0
        if end == start:
            i = skip[i]
            continue
        known = False
        covered = False
        for s in range(start, end):
            if sb[s] == 0:
                known = True
                node = sn[s]
                if (
                    loop[node, 0] & subtree[i, 0] == subtree[i, 0]
                    and loop[node, 1] & subtree[i, 1] == subtree[i, 1]
                    and loop[node, 2] & subtree[i, 2] == subtree[i, 2]
                    and loop[node, 3] & subtree[i, 3] == subtree[i, 3]
                ):
                    covered = True
                    break
        if covered:
            for t in range(token_ptr[i], token_ptr[skip[i]]):
                words[token_ids[t] >> 5] |= np.uint32(1) << np.uint32(token_ids[t] & 31)
                accepted += 1
            i = skip[i]
            continue
        if token_ptr[i] < token_ptr[i + 1]:
            if known:
                for t in range(token_ptr[i], token_ptr[i + 1]):
                    words[token_ids[t] >> 5] |= np.uint32(1) << np.uint32(token_ids[t] & 31)
                    accepted += 1
            else:
                depend[dependent] = i
                dependent += 1
        begins[depth], ends[depth], tops[depth], closed[depth] = start, end, tops[above], False
        i += 1
    return accepted, dependent, lowest


@njit(cache=True, nogil=True, inline="always")
def _slot(table: Any, fn: Any, fp: Any, node: int, parent: int) -> int:
    """Where a frame is, or would be, in the arena's hash table."""
    mask = table.shape[0] - 1
    place = (np.int64(node) * 0x9E3779B1 + np.int64(parent) * 0x85EBCA77) & 0x7FFFFFFFFFFFFFFF
    place = (place ^ (place >> 15)) & mask
    while table[place] >= 0 and not (fn[table[place]] == node and fp[table[place]] == parent):
        place = (place + 1) & mask
    return place


@njit(cache=True, nogil=True)
def rehash(table: Any, fn: Any, fp: Any, top: int) -> None:
    table[:] = -1
    for f in range(top):
        table[_slot(table, fn, fp, fn[f], fp[f])] = f


@njit(cache=True, nogil=True)
def advance(pda: Any, data: Any, fn: Any, fp: Any, fd: Any, top: int, table: Any, sn: Any, sp: Any, sb: Any, count: int) -> Any:
    """Reads bytes for good: frames that stay in use get their one place in the arena.

    Returns:
        ``(count, top, read)``: the new set is in ``sn[:count]``; ``read`` bytes were read before the set died (all, if it did
        not); ``count`` is OVERFLOW if a buffer was too small (nothing has changed then but free room).
    """
    mark = np.empty(fn.shape[0] - top + 1, np.int64)
    for read in range(data.shape[0]):
        base = top
        end, peak, _ = close(pda, fn, fp, fd, top, base, sn, sp, sb, 0, count, 1 << 30)
        if end == OVERFLOW:
            return OVERFLOW, top, read
        fresh = _step(pda, sn, sp, sb, 0, end, data[read])
        if fresh == OVERFLOW:
            return OVERFLOW, top, read
        if fresh == end:
            return 0, top, read
        if peak > base:
            if peak - base > mark.shape[0]:
                mark = np.empty(2 * (peak - base), np.int64)
            mark[: peak - base] = 0
            for s in range(end, fresh):
                f = sp[s]
                while f >= base and mark[f - base] == 0:
                    mark[f - base] = 1
                    f = fp[f]
            for f in range(base, peak):  # parents come before their children
                if mark[f - base] == 0:
                    continue
                node, parent = fn[f], fp[f]
                if parent >= base:
                    parent = mark[parent - base] - 2
                place = _slot(table, fn, fp, node, parent)
                if table[place] < 0:
                    fn[top], fp[top] = node, parent
                    fd[top] = fd[parent] + 1 if parent >= 0 else 1
                    table[place] = top
                    top += 1
                mark[f - base] = table[place] + 2
        count = 0
        for s in range(end, fresh):
            parent = sp[s]
            if parent >= base:
                parent = mark[parent - base] - 2
            count = _put(sn, sp, sb, 0, count, sn[s], parent, 0)
    return count, top, data.shape[0]


@njit(cache=True, nogil=True)
def forced(pda: Any, fn: Any, fp: Any, fd: Any, top: int, sn: Any, sp: Any, sb: Any, count: int, output: Any) -> int:
    """The bytes that every text must go on with, up to ``len(output)``; stops where the text may end."""
    edge_ptr, edge_lo, edge_hi = pda[0], pda[1], pda[2]
    size = 0
    base = top
    while size < output.shape[0]:
        end, top, lowest = close(pda, fn, fp, fd, top, base, sn, sp, sb, 0, count, 1 << 30)
        if end == OVERFLOW:
            return OVERFLOW
        if lowest == 0:
            break
        byte = -1
        for s in range(end):
            for e in range(edge_ptr[sn[s]], edge_ptr[sn[s] + 1]):
                if edge_lo[e] != edge_hi[e] or (byte >= 0 and edge_lo[e] != byte):
                    return size
                byte = edge_lo[e]
        fresh = _step(pda, sn, sp, sb, 0, end, byte)
        if fresh == OVERFLOW:
            return OVERFLOW
        count = fresh - end
        for s in range(count):
            sn[s], sp[s], sb[s] = sn[end + s], sp[end + s], 0
        output[size] = byte
        size += 1
    return size


@njit(cache=True, nogil=True)
def can_end(pda: Any, fn: Any, fp: Any, fd: Any, top: int, sn: Any, sp: Any, sb: Any, count: int) -> int:
    """1 if the text may end here, 0 if not, or OVERFLOW."""
    end, _, lowest = close(pda, fn, fp, fd, top, 0, sn, sp, sb, 0, count, 1 << 30)
    if end == OVERFLOW:
        return OVERFLOW
    return 1 if lowest == 0 else 0


@njit(cache=True, nogil=True)
def survives(pda: Any, data: Any, fn: Any, fp: Any, fd: Any, top: int, sn: Any, sp: Any, sb: Any, count: int) -> int:
    """How many of the bytes can be read from the set before it dies, or OVERFLOW; nothing is kept."""
    base = top
    for read in range(data.shape[0]):
        end, top, _ = close(pda, fn, fp, fd, top, base, sn, sp, sb, 0, count, 1 << 30)
        if end == OVERFLOW:
            return OVERFLOW
        fresh = _step(pda, sn, sp, sb, 0, end, data[read])
        if fresh == OVERFLOW:
            return OVERFLOW
        if fresh == end:
            return read
        count = fresh - end
        for s in range(count):
            sn[s], sp[s], sb[s] = sn[end + s], sp[end + s], 0
    return data.shape[0]


@njit(cache=True, nogil=True)
def build_trie(data: Any, offsets: Any, shared: Any, byte_of: Any, depth_of: Any, skip: Any, parent: Any, first: Any, subtree: Any) -> int:
    """Trie nodes in preorder from sorted distinct byte strings; ``shared[k]`` is the prefix that k has in common with k - 1."""
    path = np.empty(1 << 16, np.int64)
    count = 0
    for k in range(offsets.shape[0] - 1):
        length = offsets[k + 1] - offsets[k]
        for place in range(shared[k], length):
            byte_of[count] = data[offsets[k] + place]
            depth_of[count] = place + 1
            parent[count] = path[place - 1] if place > 0 else -1
            first[count] = -1
            path[place] = count
            count += 1
        first[path[length - 1]] = k
    for i in range(count - 1, -1, -1):
        j = i + 1
        while j < count and depth_of[j] > depth_of[i]:
            j = skip[j]
        skip[i] = j
        p = parent[i]
        if p >= 0:
            for w in range(4):
                subtree[p, w] |= subtree[i, w]
            subtree[p, byte_of[i] >> 6] |= np.uint64(1) << np.uint64(byte_of[i] & 63)
    return count


@njit(cache=True, nogil=True)
def lookahead_classes(pda: Any, rounds: int) -> Any:
    """Numbers nodes so that equal numbers mean equal behaviour for at least ``rounds`` bytes (by 64-bit hashes).

    Long counted repetitions are chains of nodes that differ only in how far the end is: all that are further from it than the
    longest token share one mask.
    """
    edge_ptr, edge_lo, edge_hi, edge_to, call_ptr, call_start, call_to, final, node_rule, _, _, _ = pda
    count = final.shape[0]
    value = np.empty(count, np.uint64)
    fresh = np.empty(count, np.uint64)
    for n in range(count):
        value[n] = np.uint64(node_rule[n] * 2 + final[n] + 11)
    distinct = 0
    for _ in range(rounds):
        for n in range(count):
            h = value[n] * np.uint64(0x9E3779B97F4A7C15)
            for e in range(edge_ptr[n], edge_ptr[n + 1]):
                x = value[edge_to[e]] ^ (np.uint64(edge_lo[e]) << np.uint64(8)) ^ (np.uint64(edge_hi[e]) << np.uint64(20))
                x = (x ^ (x >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
                h += x ^ (x >> np.uint64(32))
            for c in range(call_ptr[n], call_ptr[n + 1]):
                x = np.uint64(call_start[c] + 7) * np.uint64(0x94D049BB133111EB)
                x ^= value[call_to[c]] if call_to[c] >= 0 else np.uint64(3)
                x = (x ^ (x >> np.uint64(31))) * np.uint64(0xD6E8FEB86659FD93)
                h += x ^ (x >> np.uint64(32))
            fresh[n] = h ^ (h >> np.uint64(27))
        value, fresh = fresh, value
        now = np.unique(value).shape[0]
        if now == distinct or now == count:
            break
        distinct = now
    return value
