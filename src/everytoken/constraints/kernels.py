"""The hot paths of the grammar engine: a pushdown automaton run over bytes, and over all tokens at once (numba).

A *stack* is a node and the frame below it; a frame is a node to return to and the frame below that one. Frames live in an
arena and are never changed, so stacks share their lower parts, branching copies nothing, and rolling back is forgetting. The
state of a matcher is a set of stacks. Below a stack's own frames there is

    BOTTOM    the end of the grammar: popping it completes the text
    UNKNOWN   nothing known: popping it is what makes a token context-dependent
    BELOW     some caller, any caller: after an unknown pop the text goes on at one of the places that can follow the rule

``settle`` runs stacks over a trie of tokens. Sets are kept by depth, so a prefix shared by many tokens is matched once; where a
node goes on in the same way for every byte (or every character) of a subtree, for as many steps as the subtree is high (a loop, or
a counted repetition), all its tokens are accepted without a look.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .pushdown import BOTTOM

UNKNOWN, BELOW = -2, -3
OVERFLOW, CROWDED, AMBIGUOUS = -7, -8, -9
"""Returned when a buffer is too small (the caller grows it and calls again), when too many places can follow a rule, and when
a set would hold more than ``MAX_STACKS``."""
MAX_STACKS = 2048
CROWD = 1024
"""Places below an unknown frame that are followed; beyond, every token that pops it counts as dependent."""
ENDS, POPS = 1, 2
"""What ``close`` reports: the bottom was popped; an unknown frame was popped and not followed."""
ACCEPTED, REJECTED, BITS = 0, 1, 2
"""How ``settle`` stores a set of tokens: the ids in it, the ids not in it, or a row of bits."""


@njit(cache=True, nogil=True, inline="always")
def _put(sn: Any, sp: Any, sb: Any, begin: int, end: int, node: int, parent: int, below: int) -> int:
    """Adds a stack to the set ``[begin, end)`` unless it is there; returns the new end."""
    for i in range(begin, end):
        if sn[i] == node and sp[i] == parent and sb[i] == below:
            return end
    if end >= sn.shape[0]:
        return OVERFLOW
    if end - begin >= MAX_STACKS:
        return AMBIGUOUS
    sn[end], sp[end], sb[end] = node, parent, below
    return end + 1


@njit(cache=True, nogil=True)
def close(
    pda: Any, fn: Any, fp: Any, top: int, base: int, sn: Any, sp: Any, sb: Any, begin: int, end: int, loose: bool
) -> Any:
    """Adds what is reached without reading: rules called, and returns from finished rules.

    Args:
        base: frames from here on are the caller's scratch and may be shared with new ones.
        loose: do not follow pops of unknown frames, report them.

    Returns:
        ``(end, top, seen)``: the set's new end, the arena's new top, and flags, ENDS and POPS.
    """
    _, _, _, _, call_ptr, call_start, call_to, final, node_rule, follow_ptr, follow_to, _, _, _ = pda
    seen = 0
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
                        return OVERFLOW, top, seen
                    fn[top], fp[top] = call_to[c], parent
                    under = top
                    top += 1
            end = _put(sn, sp, sb, begin, end, call_start[c], under, below)
            if end < 0:
                return end, top, seen
        if final[node]:
            if parent >= 0:
                end = _put(sn, sp, sb, begin, end, fn[parent], fp[parent], below)
                if end < 0:
                    return end, top, seen
            elif parent == BOTTOM:
                seen |= ENDS
            elif loose:
                seen |= POPS
            else:
                if end - begin > CROWD:
                    return CROWDED, top, seen
                rule = node_rule[node]
                for f in range(follow_ptr[rule], follow_ptr[rule + 1]):
                    end = _put(sn, sp, sb, begin, end, follow_to[f], BELOW, 1)
                    if end < 0:
                        return end, top, seen
        i += 1
    return end, top, seen


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
                if fresh < 0:
                    return fresh
    return fresh


@njit(cache=True, nogil=True)
def _walk(
    pda: Any,
    trie: Any,
    fn: Any,
    fp: Any,
    top: int,
    sn: Any,
    sp: Any,
    sb: Any,
    levels: Any,
    words: Any,
    depend: Any,
    loose: bool,
) -> Any:
    """Runs the stack ``sn[0], sp[0]`` over all tokens of a trie.

    Args:
        levels: ``[5, L]`` scratch.
        words: ``[W]`` uint32, the bits of accepted tokens are set.
        depend: receives the trie nodes of tokens that survive only below an unknown frame.

    Returns:
        ``(accepted, dependent)``: how many tokens, how many trie nodes; ``accepted`` is OVERFLOW, CROWDED or AMBIGUOUS instead.
    """
    byte_of, depth_of, skip, token_ptr, token_ids, subtree, characters, height, _ = trie
    edge_ptr, edge_lo, edge_hi, call_ptr, final, plain, wide, run = (
        pda[0],
        pda[1],
        pda[2],
        pda[4],
        pda[7],
        pda[11],
        pda[12],
        pda[13],
    )
    begins, ends, tops, closed, popped = levels[0], levels[1], levels[2], levels[3], levels[4]
    begins[0], ends[0], tops[0], closed[0], popped[0] = 0, 1, top, 0, 0
    live = np.zeros(256, np.bool_)  # bytes that the root's set can read
    base, accepted, dependent = top, 0, 0
    i = 0
    while i < byte_of.shape[0]:
        depth = depth_of[i]
        above = depth - 1
        if not closed[above]:
            closed[above] = 1
            for p in range(begins[above], ends[above]):
                if final[sn[p]] or call_ptr[sn[p]] < call_ptr[sn[p] + 1]:  # something is reached without reading
                    end, peak, seen = close(
                        pda, fn, fp, tops[above], base, sn, sp, sb, begins[above], ends[above], loose
                    )
                    if end < 0:
                        return end, 0
                    if seen & POPS:
                        popped[above] = 1
                    ends[above], tops[above] = end, peak
                    break
            if above == 0:
                for p in range(ends[0]):
                    for e in range(edge_ptr[sn[p]], edge_ptr[sn[p] + 1]):
                        live[edge_lo[e] : edge_hi[e] + 1] = True
        if above == 0 and not live[byte_of[i]] and not popped[0]:
            i = skip[i]
            continue
        start = ends[above]
        covered = False
        for p in range(begins[above], start):
            if sb[p] == 0:
                node = sn[p]
                if (
                    height[i] <= run[node]
                    and plain[node, 0] & subtree[i, 0] == subtree[i, 0]
                    and plain[node, 1] & subtree[i, 1] == subtree[i, 1]
                    and (
                        (characters[i] and wide[node])
                        or (
                            plain[node, 2] & subtree[i, 2] == subtree[i, 2]
                            and plain[node, 3] & subtree[i, 3] == subtree[i, 3]
                        )
                    )
                ):
                    covered = True
                    break
        if covered:
            for t in range(token_ptr[i], token_ptr[skip[i]]):
                words[token_ids[t] >> 5] |= np.uint32(1) << np.uint32(token_ids[t] & 31)
            accepted += token_ptr[skip[i]] - token_ptr[i]
            i = skip[i]
            continue
        end = _step(pda, sn, sp, sb, begins[above], start, byte_of[i])
        if end < 0:
            return end, 0
        if end == start and not popped[above]:
            i = skip[i]
            continue
        if token_ptr[i] < token_ptr[i + 1]:
            known = False
            for p in range(start, end):
                if sb[p] == 0:
                    known = True
                    break
            if known:
                for t in range(token_ptr[i], token_ptr[i + 1]):
                    words[token_ids[t] >> 5] |= np.uint32(1) << np.uint32(token_ids[t] & 31)
                    accepted += 1
            else:
                depend[dependent] = i
                dependent += 1
        begins[depth], ends[depth], tops[depth] = start, end, tops[above]
        closed[depth], popped[depth] = 0, popped[above]
        i += 1
    return accepted, dependent


@njit(cache=True, nogil=True)
def settle_one(pda: Any, trie: Any, context: Any, words: Any, depend: Any) -> Any:
    """One context: adds its tokens to ``words`` and puts the trie nodes of dependent ones into ``depend``.

    Returns:
        ``(accepted, dependent)``: how many of each; ``accepted`` is AMBIGUOUS if a set would be too large.
    """
    room = max(256, 2 * context.shape[0])
    levels = np.empty((5, trie[8]), np.int64)
    known = words.copy()
    loose = False
    while True:
        fn, fp = np.empty(room, np.int32), np.empty(room, np.int32)
        sn, sp, sb = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.uint8)
        top = _load(context, fn, fp, sn, sp, sb)
        accepted, dependent = _walk(pda, trie, fn, fp, top, sn, sp, sb, levels, words, depend, loose)
        if accepted >= 0 or accepted == AMBIGUOUS:
            return accepted, dependent
        words[:] = known
        loose = loose or accepted == CROWDED
        room *= 2


@njit(cache=True, nogil=True)
def _load(context: Any, fn: Any, fp: Any, sn: Any, sp: Any, sb: Any) -> int:
    """Makes a context's stack; returns the number of its frames."""
    top, parent = 0, UNKNOWN
    for place in range(context.shape[0] - 1, 0, -1):
        if context[place] == BOTTOM:
            parent = BOTTOM
            continue
        fn[top], fp[top] = context[place], parent
        parent = top
        top += 1
    sn[0], sp[0], sb[0] = context[0], parent, 0
    return top


@njit(cache=True, nogil=True)
def settle(pda: Any, trie: Any, size: int, known: Any, settled: int, contexts: Any, pointers: Any) -> Any:
    """Which tokens of a trie are allowed in each of some contexts, and which depend on more than the context tells.

    Args:
        size: of the vocabulary.
        known: ``[W]`` uint32, tokens known to be allowed in all these contexts (``settled`` of them); the trie has the rest.
        contexts: for each context, at ``pointers[k] .. pointers[k + 1]``: a node, then the nodes that the frames below it return
            to, from the top; a last BOTTOM says that nothing is below them, otherwise what is there is unknown.

    Returns:
        ``(kinds, counts, id_ptr, ids, rows, depend_ptr, depends)``: how each context's set of tokens is stored (ACCEPTED and
        REJECTED as ``ids``, BITS as the next of ``rows``), its size, and the trie nodes of its dependent tokens. ``kinds`` is
        empty if a set would be too large (AMBIGUOUS).
    """
    total = pointers.shape[0] - 1
    width = known.shape[0]
    kinds, counts = np.empty(total, np.uint8), np.empty(total, np.int64)
    id_ptr, depend_ptr = np.zeros(total + 1, np.int64), np.zeros(total + 1, np.int64)
    ids, depends = np.empty(4 * width, np.int32), np.empty(256, np.int32)
    rows = np.empty((4, width), np.uint32)
    used = 0
    words = np.empty(width, np.uint32)
    depend = np.empty(trie[0].shape[0], np.int32)
    for k in range(total):
        words[:] = known
        accepted, dependent = settle_one(pda, trie, contexts[pointers[k] : pointers[k + 1]], words, depend)
        if accepted < 0:
            return kinds[:0], counts, id_ptr, ids, rows, depend_ptr, depends
        accepted += settled
        counts[k] = accepted
        place = id_ptr[k]
        if accepted <= width or size - accepted <= width:
            wanted = 1 if accepted <= width else 0
            kinds[k] = ACCEPTED if wanted else REJECTED
            if place + width > ids.shape[0]:
                more = np.empty(2 * ids.shape[0], np.int32)
                more[:place] = ids[:place]
                ids = more
            for word in range(width):
                value = words[word] if wanted else ~words[word]
                index = 32 * word
                while value != 0 and index < size:
                    if value & np.uint32(1):
                        ids[place] = index
                        place += 1
                    value >>= np.uint32(1)
                    index += 1
        else:
            kinds[k] = BITS
            if used == rows.shape[0]:
                larger = np.empty((2 * used, width), np.uint32)
                larger[:used] = rows
                rows = larger
            rows[used] = words
            used += 1
        id_ptr[k + 1] = place
        place = depend_ptr[k]
        while place + dependent > depends.shape[0]:
            more = np.empty(2 * depends.shape[0], np.int32)
            more[:place] = depends[:place]
            depends = more
        depends[place : place + dependent] = depend[:dependent]
        depend_ptr[k + 1] = place + dependent
    return kinds, counts, id_ptr, ids, rows, depend_ptr, depends


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
def advance(pda: Any, data: Any, fn: Any, fp: Any, top: int, table: Any, sn: Any, sp: Any, sb: Any, count: int) -> Any:
    """Reads bytes for good: frames that stay in use get their one place in the arena.

    Returns:
        ``(count, top, read)``: the new set is in ``sn[:count]``; ``read`` bytes were read before the set died (all, if it did
        not); ``count`` is OVERFLOW or AMBIGUOUS if there is no room (nothing has changed then but free room).
    """
    mark = np.empty(fn.shape[0] - top + 1, np.int64)
    for read in range(data.shape[0]):
        base = top
        end, peak, _ = close(pda, fn, fp, top, base, sn, sp, sb, 0, count, False)
        if end < 0:
            return end, top, read
        fresh = _step(pda, sn, sp, sb, 0, end, data[read])
        if fresh < 0:
            return fresh, top, read
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
def forced(pda: Any, fn: Any, fp: Any, top: int, sn: Any, sp: Any, sb: Any, count: int, output: Any) -> int:
    """The bytes that every text must go on with, up to ``len(output)``; stops where the text may end."""
    edge_ptr, edge_lo, edge_hi = pda[0], pda[1], pda[2]
    size = 0
    base = top
    while size < output.shape[0]:
        end, top, seen = close(pda, fn, fp, top, base, sn, sp, sb, 0, count, False)
        if end < 0:
            return end
        if seen & ENDS:
            break
        byte = -1
        for s in range(end):
            for e in range(edge_ptr[sn[s]], edge_ptr[sn[s] + 1]):
                if edge_lo[e] != edge_hi[e] or (byte >= 0 and edge_lo[e] != byte):
                    return size
                byte = edge_lo[e]
        fresh = _step(pda, sn, sp, sb, 0, end, byte)
        if fresh < 0:
            return fresh
        count = fresh - end
        for s in range(count):
            sn[s], sp[s], sb[s] = sn[end + s], sp[end + s], 0
        output[size] = byte
        size += 1
    return size


@njit(cache=True, nogil=True)
def closing_nodes(call_ptr: Any, call_start: Any, call_to: Any, final: Any) -> Any:
    """Whether a node's rule can be finished from it without reading anything."""
    closes = final.astype(np.bool_)
    changed = True
    while changed:
        changed = False
        for node in range(closes.shape[0]):
            if closes[node]:
                continue
            for c in range(call_ptr[node], call_ptr[node + 1]):
                if closes[call_start[c]] and (call_to[c] < 0 or closes[call_to[c]]):
                    closes[node] = True
                    changed = True
                    break
    return closes


@njit(cache=True, nogil=True)
def set_bits(words: Any, ids: Any, wanted: bool) -> None:
    """Sets or clears the bits of some tokens."""
    for i in range(ids.shape[0]):
        bit = np.uint32(1) << np.uint32(ids[i] & 31)
        if wanted:
            words[ids[i] >> 5] |= bit
        else:
            words[ids[i] >> 5] &= ~bit


@njit(cache=True, nogil=True)
def survives(pda: Any, data: Any, fn: Any, fp: Any, top: int, sn: Any, sp: Any, sb: Any, count: int) -> int:
    """How many of the bytes can be read from the set before it dies, or OVERFLOW; nothing is kept."""
    base = top
    for read in range(data.shape[0]):
        end, top, _ = close(pda, fn, fp, top, base, sn, sp, sb, 0, count, False)
        if end < 0:
            return end
        fresh = _step(pda, sn, sp, sb, 0, end, data[read])
        if fresh < 0:
            return fresh
        if fresh == end:
            return read
        count = fresh - end
        for s in range(count):
            sn[s], sp[s], sb[s] = sn[end + s], sp[end + s], 0
    return data.shape[0]


@njit(cache=True, nogil=True)
def build_trie(
    data: Any,
    offsets: Any,
    shared: Any,
    byte_of: Any,
    depth_of: Any,
    skip: Any,
    parent: Any,
    first: Any,
    subtree: Any,
    characters: Any,
    height: Any,
) -> int:
    """Trie nodes in preorder from sorted distinct byte strings; ``shared[k]`` is the prefix that k has in common with k - 1.

    ``subtree`` receives the bytes of a node and of all below it, ``characters`` whether they are UTF-8 (the last character may
    be unfinished) when a character starts at the node, ``height`` how many bytes its longest token adds from it on.
    """
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
    sound = np.ones((count, 8), np.bool_)  # by the state of a UTF-8 decoder before the node's byte
    for i in range(count - 1, -1, -1):
        j = i + 1
        while j < count and depth_of[j] > depth_of[i]:
            j = skip[j]
        skip[i] = j
        byte = byte_of[i]
        subtree[i, byte >> 6] |= np.uint64(1) << np.uint64(byte & 63)
        for state in range(8):
            after = _utf8(state, byte)
            good = after >= 0
            j = i + 1
            while good and j < skip[i]:
                good = sound[j, after]
                j = skip[j]
            sound[i, state] = good
        characters[i] = sound[i, 0]
        height[i] += 1
        p = parent[i]
        if p >= 0:
            height[p] = max(height[p], height[i])
            for w in range(4):
                subtree[p, w] |= subtree[i, w]
    return count


@njit(cache=True, nogil=True, inline="always")
def _utf8(state: int, byte: int) -> int:
    """UTF-8's decoder: 0 between characters; 1, 2, 3 bytes to come; 4 to 7 the same with a restricted next byte. -1: invalid."""
    if state == 0:
        if byte < 0x80:
            return 0
        if 0xC2 <= byte <= 0xDF:
            return 1
        if byte == 0xE0:
            return 4
        if byte == 0xED:
            return 5
        if 0xE1 <= byte <= 0xEF:
            return 2
        if byte == 0xF0:
            return 6
        if byte == 0xF4:
            return 7
        return 3 if 0xF1 <= byte <= 0xF3 else -1
    if byte < 0x80 or byte > 0xBF:
        return -1
    if state <= 3:
        return state - 1
    if state == 4:
        return 1 if byte >= 0xA0 else -1
    if state == 5:
        return 1 if byte <= 0x9F else -1
    if state == 6:
        return 2 if byte >= 0x90 else -1
    return 2 if byte <= 0x8F else -1


ENDLESS = 1 << 30


@njit(cache=True, nogil=True)
def steady_runs(edge_ptr: Any, edge_lo: Any, edge_hi: Any, edge_to: Any, plain: Any, wide: Any, run: Any) -> None:
    """What goes on in the same way for a while from each node.

    Args:
        plain: ``[N, 4]`` uint64, receives the bytes that lead to the node's main target (the one that most bytes lead to).
        wide: receives whether every non-ASCII character leads to it as well.
        run: receives for how many characters in a row, of those bytes (and, if ``wide``, non-ASCII characters), this can be
            repeated: ENDLESS in a loop.
    """
    size = run.shape[0]
    main = np.full(size, -1, np.int64)
    place = np.empty(8, np.int64)
    for node in range(size):
        most: Any = 0
        for e in range(edge_ptr[node], edge_ptr[node + 1]):
            count: Any = 0
            for other in range(edge_ptr[node], edge_ptr[node + 1]):
                if edge_to[other] == edge_to[e]:
                    count += np.int64(edge_hi[other]) - np.int64(edge_lo[other]) + 1
            if count > most:
                most = count
                main[node] = edge_to[e]
        for e in range(edge_ptr[node], edge_ptr[node + 1]):
            if edge_to[e] == main[node]:
                for byte in range(edge_lo[e], np.int64(edge_hi[e]) + 1):
                    plain[node, byte >> 6] |= np.uint64(1) << np.uint64(byte & 63)
        place[:] = -1
        place[0] = main[node]
        good = main[node] >= 0
        for state in (0, 3, 6, 7, 2, 4, 5, 1):  # each is entered before it is left
            if not good:
                break
            if place[state] < 0:
                good = False
                break
            here = node if state == 0 else place[state]
            for byte in range(0x80, 0x100):
                after = _utf8(state, byte)
                if after < 0:
                    continue
                found = -1
                for e in range(edge_ptr[here], edge_ptr[here + 1]):
                    if edge_lo[e] <= byte and byte <= edge_hi[e]:
                        if found >= 0:
                            found = -2
                            break
                        found = edge_to[e]
                if found < 0 or (place[after] >= 0 and place[after] != found):
                    good = False
                    break
                place[after] = found
        wide[node] = good
    run[:] = 0
    path = np.empty(size, np.int64)
    for start in range(size):
        length, node = 0, start
        while run[node] == 0:  # forward to a node that is known, or that goes on differently
            run[node] = -1
            path[length] = node
            length += 1
            following = main[node]
            if following < 0:
                break
            if wide[following] != wide[node] or (plain[following] != plain[node]).any():
                break
            node = following
        steps = 0
        if length and node != path[length - 1]:
            steps = ENDLESS if run[node] == -1 else run[node]
        elif length and main[node] == node:
            steps = ENDLESS
        for back in range(length - 1, -1, -1):
            steps = min(steps + 1, ENDLESS)
            run[path[back]] = steps if main[path[back]] >= 0 else 0


@njit(cache=True, nogil=True)
def extract(nodes: Any, byte_of: Any, depth_of: Any, skip: Any, token_ptr: Any, token_ids: Any, levels: int) -> Any:
    """The trie of the tokens at some nodes (in preorder) alone: ``(byte, depth, skip, token_ptr, token_ids, levels)``."""
    room = min(byte_of.shape[0], nodes.shape[0] * levels)
    kept = np.empty(room, np.int64)
    ends = np.zeros(room, np.bool_)
    count, total, i = 0, 0, 0
    for k in range(nodes.shape[0]):
        while i < nodes[k]:
            if skip[i] <= nodes[k]:
                i = skip[i]  # beside the way to the node
            else:
                kept[count] = i
                count += 1
                i += 1
        kept[count], ends[count] = i, True
        count += 1
        i += 1
        total += token_ptr[nodes[k] + 1] - token_ptr[nodes[k]]
    new_byte, new_depth = np.empty(count, np.uint8), np.empty(count, np.int32)
    new_skip, new_ptr = np.empty(count, np.int32), np.zeros(count + 1, np.int32)
    new_ids = np.empty(total, np.int32)
    size, deepest = 0, 1
    for a in range(count):
        i = kept[a]
        new_byte[a], new_depth[a] = byte_of[i], depth_of[i]
        deepest = max(deepest, depth_of[i] + 1)
        if ends[a]:
            for t in range(token_ptr[i], token_ptr[i + 1]):
                new_ids[size] = token_ids[t]
                size += 1
        new_ptr[a + 1] = size
    for a in range(count - 1, -1, -1):
        b = a + 1
        while b < count and new_depth[b] > new_depth[a]:
            b = new_skip[b]
        new_skip[a] = b
    return new_byte, new_depth, new_skip, new_ptr, new_ids, deepest


@njit(cache=True, nogil=True)
def lookahead_classes(pda: Any, rounds: int) -> Any:
    """Numbers nodes so that equal numbers mean equal behaviour for at least ``rounds`` bytes (by 64-bit hashes).

    Long counted repetitions are chains of nodes that differ only in how far the end is: all that are further from it than the
    longest token share one mask.
    """
    edge_ptr, edge_lo, edge_hi, edge_to, call_ptr, call_start, call_to, final, node_rule, _, _, _, _, _ = pda
    count = final.shape[0]
    value = np.empty(count, np.uint64)
    fresh = np.empty(count, np.uint64)
    for n in range(count):
        value[n] = np.uint64(node_rule[n] * 2 + final[n] + 11)
    distinct = 0
    for done in range(rounds):
        for n in range(count):
            h = value[n] * np.uint64(0x9E3779B97F4A7C15)
            for e in range(edge_ptr[n], edge_ptr[n + 1]):
                x = (
                    value[edge_to[e]]
                    ^ (np.uint64(edge_lo[e]) << np.uint64(8))
                    ^ (np.uint64(edge_hi[e]) << np.uint64(20))
                )
                x = (x ^ (x >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
                h += x ^ (x >> np.uint64(32))
            for c in range(call_ptr[n], call_ptr[n + 1]):
                x = np.uint64(call_start[c] + 7) * np.uint64(0x94D049BB133111EB)
                x ^= value[call_to[c]] if call_to[c] >= 0 else np.uint64(3)
                x = (x ^ (x >> np.uint64(31))) * np.uint64(0xD6E8FEB86659FD93)
                h += x ^ (x >> np.uint64(32))
            fresh[n] = h ^ (h >> np.uint64(27))
        value, fresh = fresh, value
        if done % 8 != 7:
            continue
        now = np.unique(value).shape[0]
        if now in (distinct, count):
            break
        distinct = now
    return value
