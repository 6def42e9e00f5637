"""Which tokens are allowed: tokens settled ahead of time, for what a context tells, and what a grammar's tables tell
beforehand.

``settle`` runs stacks over a trie of tokens. Sets are kept by depth, so a prefix shared by many tokens is matched
once. Where a
node goes on in the same way for every byte (or every character) of a subtree, for as many steps as the subtree is
high (a loop, or
a counted repetition), all its tokens are accepted without a look: ``steady_runs`` finds these nodes.
"""

from __future__ import annotations

import numpy as np

from ..jit import kernel
from .layout import AMBIGUOUS, CROWDED, load_context
from .run import POPS, close, step
from .tables import Bools, Int32s, Int64s, PackedTables, PackedTrie, Settled, Tables, Trie, UInt8s, UInt32s, UInt64s
from .trie import utf8_after

ACCEPTED, REJECTED, BITS = 0, 1, 2
"""How ``settle`` stores a set of tokens: the ids in it, the ids not in it, or a row of bits."""
ENDLESS = 1 << 30
"""The length of a run that goes round a loop."""


@kernel
def walk(
    tables: Tables,
    trie: Trie,
    frame_node: Int32s,
    frame_parent: Int32s,
    top: int,
    stack_node: Int32s,
    stack_frame: Int32s,
    stack_below: UInt8s,
    levels: Int64s,
    words: UInt32s,
    depend: Int32s,
    loose: bool,
) -> tuple[int, int]:
    """Runs the stack ``stack_node[0], stack_frame[0]`` over all tokens of a trie.

    Args:
        levels: ``[5, L]`` scratch.
        words: ``[W]`` uint32, the bits of accepted tokens are set.
        depend: receives the trie nodes of tokens that survive only below an unknown frame.

    Returns:
        ``(accepted, dependent)``: how many tokens, how many trie nodes; ``accepted`` is OVERFLOW, CROWDED or
        AMBIGUOUS instead.
    """
    byte_of, depth_of, skip, height = trie.byte, trie.depth, trie.skip, trie.height
    token_ptr, token_ids, subtree, characters = trie.token_ptr, trie.token_ids, trie.subtree, trie.characters
    edge_ptr, edge_lo, edge_hi = tables.edge_ptr, tables.edge_lo, tables.edge_hi
    final, call_ptr, plain, wide, run = tables.final, tables.call_ptr, tables.plain, tables.wide, tables.run
    begins, ends, tops, closed, popped = levels[0], levels[1], levels[2], levels[3], levels[4]
    begins[0], ends[0], tops[0], closed[0], popped[0] = 0, 1, top, 0, 0
    live = np.zeros(256, np.bool_)  # bytes that the root's set can read
    base, accepted, dependent = top, 0, 0
    here = 0
    while here < byte_of.shape[0]:
        depth = depth_of[here]
        above = depth - 1
        if not closed[above]:
            closed[above] = 1
            for stack in range(begins[above], ends[above]):
                if (
                    final[stack_node[stack]] or call_ptr[stack_node[stack]] < call_ptr[stack_node[stack] + 1]
                ):  # something is reached without reading
                    end, peak, seen = close(
                        tables,
                        frame_node,
                        frame_parent,
                        tops[above],
                        base,
                        stack_node,
                        stack_frame,
                        stack_below,
                        begins[above],
                        ends[above],
                        loose,
                    )
                    if end < 0:
                        return end, 0
                    if seen & POPS:
                        popped[above] = 1
                    ends[above], tops[above] = end, peak
                    break
            if above == 0:
                for stack in range(ends[0]):
                    for edge in range(edge_ptr[stack_node[stack]], edge_ptr[stack_node[stack] + 1]):
                        live[edge_lo[edge] : edge_hi[edge] + 1] = True
        if above == 0 and not live[byte_of[here]] and not popped[0]:
            here = skip[here]
            continue
        start = ends[above]
        covered = False
        for stack in range(begins[above], start):
            if stack_below[stack] == 0:
                node = stack_node[stack]
                if (
                    height[here] <= run[node]
                    and plain[node, 0] & subtree[here, 0] == subtree[here, 0]
                    and plain[node, 1] & subtree[here, 1] == subtree[here, 1]
                    and (
                        (characters[here] and wide[node])
                        or (
                            plain[node, 2] & subtree[here, 2] == subtree[here, 2]
                            and plain[node, 3] & subtree[here, 3] == subtree[here, 3]
                        )
                    )
                ):
                    covered = True
                    break
        if covered:
            for token in range(token_ptr[here], token_ptr[skip[here]]):
                words[token_ids[token] >> 5] |= np.uint32(1) << np.uint32(token_ids[token] & 31)
            accepted += token_ptr[skip[here]] - token_ptr[here]
            here = skip[here]
            continue
        end = step(tables, stack_node, stack_frame, stack_below, begins[above], start, byte_of[here])
        if end < 0:
            return end, 0
        if end == start and not popped[above]:
            here = skip[here]
            continue
        if token_ptr[here] < token_ptr[here + 1]:
            known = False
            for stack in range(start, end):
                if stack_below[stack] == 0:
                    known = True
                    break
            if known:
                for token in range(token_ptr[here], token_ptr[here + 1]):
                    words[token_ids[token] >> 5] |= np.uint32(1) << np.uint32(token_ids[token] & 31)
                    accepted += 1
            else:
                depend[dependent] = here
                dependent += 1
        begins[depth], ends[depth], tops[depth] = start, end, tops[above]
        closed[depth], popped[depth] = 0, popped[above]
        here += 1
    return accepted, dependent


@kernel
def settle_one(
    packed: PackedTables, packed_trie: PackedTrie, context: Int32s, words: UInt32s, depend: Int32s
) -> tuple[int, int]:
    """One context: adds its tokens to ``words`` and puts the trie nodes of dependent ones into ``depend``.

    Returns:
        ``(accepted, dependent)``: how many of each; ``accepted`` is AMBIGUOUS if a set would be too large.
    """
    tables = Tables(*packed)
    trie = Trie(*packed_trie)
    room = max(256, 2 * context.shape[0])
    levels = np.empty((5, trie.levels), np.int64)
    known = words.copy()
    loose = False
    while True:
        frame_node, frame_parent = np.empty(room, np.int32), np.empty(room, np.int32)
        stack_node, stack_frame, stack_below = (
            np.empty(room, np.int32),
            np.empty(room, np.int32),
            np.empty(room, np.uint8),
        )
        top = load_context(context, frame_node, frame_parent, stack_node, stack_frame, stack_below)
        accepted, dependent = walk(
            tables,
            trie,
            frame_node,
            frame_parent,
            top,
            stack_node,
            stack_frame,
            stack_below,
            levels,
            words,
            depend,
            loose,
        )
        if accepted >= 0 or accepted == AMBIGUOUS:
            return accepted, dependent
        words[:] = known
        loose = loose or accepted == CROWDED
        room *= 2


@kernel
def settle(
    packed: PackedTables,
    packed_trie: PackedTrie,
    size: int,
    known: UInt32s,
    settled: int,
    contexts: Int32s,
    pointers: Int64s,
) -> Settled:
    """Which tokens of a trie are allowed in each of some contexts, and which depend on more than the context tells.

    Args:
        size: of the vocabulary.
        known: ``[W]`` uint32, tokens known to be allowed in all these contexts (``settled`` of them); the trie has
        the rest.
        contexts: for each context, at ``pointers[k] .. pointers[k + 1]``: a node, then the nodes that the frames
        below it return
            to, from the top; a last BOTTOM says that nothing is below them, otherwise what is there is unknown.

    Returns:
        The tokens of each context; ``kinds`` is empty if a set would be too large (AMBIGUOUS).
    """
    trie = Trie(*packed_trie)
    total = pointers.shape[0] - 1
    width = known.shape[0]
    kinds, counts = np.empty(total, np.uint8), np.empty(total, np.int64)
    id_ptr, depend_ptr = np.zeros(total + 1, np.int64), np.zeros(total + 1, np.int64)
    ids, depends = np.empty(4 * width, np.int32), np.empty(256, np.int32)
    rows = np.empty((4, width), np.uint32)
    used = 0
    words = np.empty(width, np.uint32)
    depend = np.empty(trie.byte.shape[0], np.int32)
    for context in range(total):
        words[:] = known
        here = contexts[pointers[context] : pointers[context + 1]]
        accepted, dependent = settle_one(packed, packed_trie, here, words, depend)
        if accepted < 0:
            return Settled(kinds[:0], counts, id_ptr, ids, rows, depend_ptr, depends)
        accepted += settled
        counts[context] = accepted
        place = id_ptr[context]
        if accepted <= width or size - accepted <= width:
            wanted = 1 if accepted <= width else 0
            kinds[context] = ACCEPTED if wanted else REJECTED
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
            kinds[context] = BITS
            if used == rows.shape[0]:
                larger = np.empty((2 * used, width), np.uint32)
                larger[:used] = rows
                rows = larger
            rows[used] = words
            used += 1
        id_ptr[context + 1] = place
        place = depend_ptr[context]
        while place + dependent > depends.shape[0]:
            more = np.empty(2 * depends.shape[0], np.int32)
            more[:place] = depends[:place]
            depends = more
        depends[place : place + dependent] = depend[:dependent]
        depend_ptr[context + 1] = place + dependent
    return Settled(kinds, counts, id_ptr, ids, rows, depend_ptr, depends)


@kernel
def set_bits(words: UInt32s, ids: Int32s, wanted: bool) -> None:
    """Sets or clears the bits of some tokens."""
    for place in range(ids.shape[0]):
        bit = np.uint32(1) << np.uint32(ids[place] & 31)
        if wanted:
            words[ids[place] >> 5] |= bit
        else:
            words[ids[place] >> 5] &= ~bit


@kernel
def closing_nodes(packed: PackedTables) -> Bools:
    """Whether a node's rule can be finished from it without reading anything."""
    tables = Tables(*packed)
    call_ptr, call_start, call_to = tables.call_ptr, tables.call_start, tables.call_to
    closes = tables.final.astype(np.bool_)
    changed = True
    while changed:
        changed = False
        for node in range(closes.shape[0]):
            if closes[node]:
                continue
            for call in range(call_ptr[node], call_ptr[node + 1]):
                if closes[call_start[call]] and (call_to[call] < 0 or closes[call_to[call]]):
                    closes[node] = True
                    changed = True
                    break
    return closes


@kernel
def lookahead_classes(packed: PackedTables, rounds: int) -> UInt64s:
    """Numbers nodes so that equal numbers mean equal behaviour for at least ``rounds`` bytes (by 64-bit hashes).

    Long counted repetitions are chains of nodes that differ only in how far the end is: all that are further from it
    than the
    longest token share one mask.
    """
    tables = Tables(*packed)
    edge_ptr, edge_lo, edge_hi, edge_to = tables.edge_ptr, tables.edge_lo, tables.edge_hi, tables.edge_to
    call_ptr, call_start, call_to = tables.call_ptr, tables.call_start, tables.call_to
    count = tables.final.shape[0]
    value = np.empty(count, np.uint64)
    fresh = np.empty(count, np.uint64)
    for node in range(count):
        value[node] = np.uint64(tables.node_rule[node] * 2 + tables.final[node] + 11)
    distinct = 0
    for done in range(rounds):
        for node in range(count):
            mixed = value[node] * np.uint64(0x9E3779B97F4A7C15)
            for edge in range(edge_ptr[node], edge_ptr[node + 1]):
                part = (
                    value[edge_to[edge]]
                    ^ (np.uint64(edge_lo[edge]) << np.uint64(8))
                    ^ (np.uint64(edge_hi[edge]) << np.uint64(20))
                )
                part = (part ^ (part >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
                mixed += part ^ (part >> np.uint64(32))
            for call in range(call_ptr[node], call_ptr[node + 1]):
                part = np.uint64(call_start[call] + 7) * np.uint64(0x94D049BB133111EB)
                part ^= value[call_to[call]] if call_to[call] >= 0 else np.uint64(3)
                part = (part ^ (part >> np.uint64(31))) * np.uint64(0xD6E8FEB86659FD93)
                mixed += part ^ (part >> np.uint64(32))
            fresh[node] = mixed ^ (mixed >> np.uint64(27))
        value, fresh = fresh, value
        if done % 8 != 7:
            continue
        now = np.unique(value).shape[0]
        if now in (distinct, count):
            break
        distinct = now
    return value


@kernel
def steady_runs(
    edge_ptr: Int32s, edge_lo: UInt8s, edge_hi: UInt8s, edge_to: Int32s, plain: UInt64s, wide: Bools, run: Int32s
) -> None:
    """What goes on in the same way for a while from each node.

    Args:
        plain: ``[N, 4]`` uint64, receives the bytes that lead to the node's main target (the one that most bytes
        lead to).
        wide: receives whether every non-ASCII character leads to it as well.
        run: receives for how many characters in a row, of those bytes (and, if ``wide``, non-ASCII characters), this
        can be
            repeated: ENDLESS in a loop.
    """
    size = run.shape[0]
    main = np.full(size, -1, np.int64)
    place = np.empty(8, np.int64)
    for node in range(size):
        most = np.int64(0)
        for edge in range(edge_ptr[node], edge_ptr[node + 1]):
            count = np.int64(0)
            for other in range(edge_ptr[node], edge_ptr[node + 1]):
                if edge_to[other] == edge_to[edge]:
                    count += np.int64(edge_hi[other]) - np.int64(edge_lo[other]) + 1
            if count > most:
                most = count
                main[node] = edge_to[edge]
        for edge in range(edge_ptr[node], edge_ptr[node + 1]):
            if edge_to[edge] == main[node]:
                for byte in range(edge_lo[edge], np.int64(edge_hi[edge]) + 1):
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
                after = utf8_after(state, byte)
                if after < 0:
                    continue
                found = -1
                for edge in range(edge_ptr[here], edge_ptr[here + 1]):
                    if edge_lo[edge] <= byte and byte <= edge_hi[edge]:
                        if found >= 0:
                            found = -2
                            break
                        found = edge_to[edge]
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
