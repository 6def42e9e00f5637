"""Following bytes: the pushdown automaton of a grammar, run from a set of stacks (see ``layout``)."""

from __future__ import annotations

import numpy as np

from ..jit import inlined, kernel
from .layout import BELOW, CROWDED, OVERFLOW, frame_slot, put
from .tables import BOTTOM, Int32s, Int64s, PackedTables, Tables, UInt8s

CROWD = 64
"""Places below an unknown frame that are followed; beyond, every token that pops it counts as dependent."""
NOWHERE = -9
"""In place of a frame that has not been found."""
ENDS, POPS = 1, 2
"""What ``close`` reports: the bottom was popped; an unknown frame was popped and not followed."""


@kernel
def close(
    tables: Tables,
    frame_node: Int32s,
    frame_parent: Int32s,
    top: int,
    base: int,
    stack_node: Int32s,
    stack_frame: Int32s,
    stack_below: UInt8s,
    begin: int,
    end: int,
    loose: bool,
) -> tuple[int, int, int]:
    """Adds what is reached without reading: rules called, and returns from finished rules.

    Args:
        base: frames from here on are the caller's scratch and may be shared with new ones.
        loose: do not follow pops of unknown frames, report them.

    Returns:
        ``(end, top, seen)``: the set's new end, the arena's new top, and flags, ENDS and POPS.
    """
    call_ptr, call_start, call_to = tables.call_ptr, tables.call_start, tables.call_to
    follow_ptr, follow_to = tables.follow_ptr, tables.follow_to
    seen = 0
    stack = begin
    while stack < end:
        node, parent, below = stack_node[stack], stack_frame[stack], stack_below[stack]
        for call in range(call_ptr[node], call_ptr[node + 1]):
            under = parent
            if call_to[call] >= 0:  # otherwise a tail call: nothing to come back to
                under = NOWHERE
                for frame in range(top - 1, base - 1, -1):
                    if frame_node[frame] == call_to[call] and frame_parent[frame] == parent:
                        under = frame
                        break
                if under == NOWHERE:
                    if top >= frame_node.shape[0]:
                        return OVERFLOW, top, seen
                    frame_node[top], frame_parent[top] = call_to[call], parent
                    under = top
                    top += 1
            end = put(stack_node, stack_frame, stack_below, begin, end, call_start[call], under, below)
            if end < 0:
                return end, top, seen
        if tables.final[node]:
            if parent >= 0:
                end = put(
                    stack_node, stack_frame, stack_below, begin, end, frame_node[parent], frame_parent[parent], below
                )
                if end < 0:
                    return end, top, seen
            elif parent == BOTTOM:
                seen |= ENDS
            elif loose:
                seen |= POPS
            else:
                if end - begin > CROWD:
                    return CROWDED, top, seen
                rule = tables.node_rule[node]
                for place in range(follow_ptr[rule], follow_ptr[rule + 1]):
                    end = put(stack_node, stack_frame, stack_below, begin, end, follow_to[place], BELOW, 1)
                    if end < 0:
                        return end, top, seen
        stack += 1
    return end, top, seen


@inlined
def step(
    tables: Tables, stack_node: Int32s, stack_frame: Int32s, stack_below: UInt8s, begin: int, end: int, byte: int
) -> int:
    """Reads a byte from the closed set ``[begin, end)``; the new set starts at ``end``. Returns its end."""
    edge_ptr, edge_lo, edge_hi, edge_to = tables.edge_ptr, tables.edge_lo, tables.edge_hi, tables.edge_to
    fresh = end
    for stack in range(begin, end):
        node = stack_node[stack]
        for edge in range(edge_ptr[node], edge_ptr[node + 1]):
            if edge_lo[edge] <= byte and byte <= edge_hi[edge]:
                frame, below = stack_frame[stack], stack_below[stack]
                fresh = put(stack_node, stack_frame, stack_below, end, fresh, edge_to[edge], frame, below)
                if fresh < 0:
                    return fresh
    return fresh


@kernel
def advance(
    packed: PackedTables,
    data: UInt8s,
    frame_node: Int32s,
    frame_parent: Int32s,
    top: int,
    table: Int64s,
    stack_node: Int32s,
    stack_frame: Int32s,
    stack_below: UInt8s,
    count: int,
) -> tuple[int, int, int]:
    """Reads bytes for good: frames that stay in use get their one place in the arena.

    Returns:
        ``(count, top, read)``: the new set is in ``stack_node[:count]``. ``read`` bytes were read before the set
        died (all of
        them if it did not). ``count`` is OVERFLOW or AMBIGUOUS if there is no room; then only free room has changed.
    """
    tables = Tables(*packed)
    mark = np.empty(frame_node.shape[0] - top + 1, np.int64)
    for read in range(data.shape[0]):
        base = top
        end, peak, _ = close(
            tables, frame_node, frame_parent, top, base, stack_node, stack_frame, stack_below, 0, count, False
        )
        if end < 0:
            return end, top, read
        fresh = step(tables, stack_node, stack_frame, stack_below, 0, end, data[read])
        if fresh < 0:
            return fresh, top, read
        if fresh == end:
            return 0, top, read
        if peak > base:
            if peak - base > mark.shape[0]:
                mark = np.empty(2 * (peak - base), np.int64)
            mark[: peak - base] = 0
            for stack in range(end, fresh):
                frame = stack_frame[stack]
                while frame >= base and mark[frame - base] == 0:
                    mark[frame - base] = 1
                    frame = frame_parent[frame]
            for frame in range(base, peak):  # parents come before their children
                if mark[frame - base] == 0:
                    continue
                node, parent = frame_node[frame], frame_parent[frame]
                if parent >= base:
                    parent = mark[parent - base] - 2
                place = frame_slot(table, frame_node, frame_parent, node, parent)
                if table[place] < 0:
                    frame_node[top], frame_parent[top] = node, parent
                    table[place] = top
                    top += 1
                mark[frame - base] = table[place] + 2
        count = 0
        for stack in range(end, fresh):
            parent = stack_frame[stack]
            if parent >= base:
                parent = mark[parent - base] - 2
            count = put(stack_node, stack_frame, stack_below, 0, count, stack_node[stack], parent, 0)
    return count, top, data.shape[0]


@kernel
def forced(
    packed: PackedTables,
    frame_node: Int32s,
    frame_parent: Int32s,
    top: int,
    stack_node: Int32s,
    stack_frame: Int32s,
    stack_below: UInt8s,
    count: int,
    output: UInt8s,
) -> int:
    """The bytes that every text must go on with, up to ``len(output)``; stops where the text may end."""
    tables = Tables(*packed)
    edge_ptr, edge_lo, edge_hi = tables.edge_ptr, tables.edge_lo, tables.edge_hi
    size = 0
    base = top
    while size < output.shape[0]:
        end, top, seen = close(
            tables, frame_node, frame_parent, top, base, stack_node, stack_frame, stack_below, 0, count, False
        )
        if end < 0:
            return end
        if seen & ENDS:
            break
        byte = -1
        for stack in range(end):
            for edge in range(edge_ptr[stack_node[stack]], edge_ptr[stack_node[stack] + 1]):
                if edge_lo[edge] != edge_hi[edge] or (byte >= 0 and edge_lo[edge] != byte):
                    return size
                byte = edge_lo[edge]
        fresh = step(tables, stack_node, stack_frame, stack_below, 0, end, byte)
        if fresh < 0:
            return fresh
        count = fresh - end
        for stack in range(count):
            stack_node[stack], stack_frame[stack] = stack_node[end + stack], stack_frame[end + stack]
            stack_below[stack] = 0
        output[size] = byte
        size += 1
    return size


@kernel
def survives(
    packed: PackedTables,
    data: UInt8s,
    frame_node: Int32s,
    frame_parent: Int32s,
    top: int,
    stack_node: Int32s,
    stack_frame: Int32s,
    stack_below: UInt8s,
    count: int,
) -> int:
    """How many of the bytes can be read from the set before it dies, or OVERFLOW; nothing is kept."""
    tables = Tables(*packed)
    base = top
    for read in range(data.shape[0]):
        end, top, _ = close(
            tables, frame_node, frame_parent, top, base, stack_node, stack_frame, stack_below, 0, count, False
        )
        if end < 0:
            return end
        fresh = step(tables, stack_node, stack_frame, stack_below, 0, end, data[read])
        if fresh < 0:
            return fresh
        if fresh == end:
            return read
        count = fresh - end
        for stack in range(count):
            stack_node[stack], stack_frame[stack] = stack_node[end + stack], stack_frame[end + stack]
            stack_below[stack] = 0
    return data.shape[0]
