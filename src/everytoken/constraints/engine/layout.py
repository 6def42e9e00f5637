"""How the states of a grammar's automaton lie in memory.

A *stack* is a node and the frame below it; a *frame* is a node to return to and the frame below that one. Frames
live in an arena,
two arrays ``frame_node`` and ``frame_parent``, and are never changed: stacks share their lower parts, branching
copies nothing, and
rolling back is forgetting. Parents come before their children. Each frame has one place, which a hash table finds.

The state of a matcher is a set of stacks: a slice of three arrays. ``stack_node`` and ``stack_frame`` are the stack;
``stack_below``
is 1 where an unknown frame was popped on the way there. Below a stack's own frames there is

    BOTTOM    the end of the grammar: popping it completes the text
    UNKNOWN   nothing known: popping it is what makes a token context-dependent
    BELOW     some caller, any caller: after an unknown pop the text goes on at one of the places that can follow the
    rule
"""

from __future__ import annotations

import numpy as np

from ..jit import inlined, kernel
from .tables import BOTTOM, Int32s, Int64s, UInt8s

UNKNOWN, BELOW = -2, -3
OVERFLOW, CROWDED, AMBIGUOUS = -7, -8, -9
"""Returned when a buffer is too small (the caller grows it and calls again), when too many places can follow a rule,
and when
a set would hold more than ``MAX_STACKS``."""
MAX_STACKS = 2048


@inlined
def put(
    stack_node: Int32s,
    stack_frame: Int32s,
    stack_below: UInt8s,
    begin: int,
    end: int,
    node: int,
    parent: int,
    below: int,
) -> int:
    """Adds a stack to the set ``[begin, end)`` unless it is there; returns the new end."""
    for place in range(begin, end):
        if stack_node[place] == node and stack_frame[place] == parent and stack_below[place] == below:
            return end
    if end >= stack_node.shape[0]:
        return OVERFLOW
    if end - begin >= MAX_STACKS:
        return AMBIGUOUS
    stack_node[end], stack_frame[end], stack_below[end] = node, parent, below
    return end + 1


@kernel
def load_context(
    context: Int32s,
    frame_node: Int32s,
    frame_parent: Int32s,
    stack_node: Int32s,
    stack_frame: Int32s,
    stack_below: UInt8s,
) -> int:
    """Makes a context's stack; returns the number of its frames."""
    top, parent = 0, UNKNOWN
    for place in range(context.shape[0] - 1, 0, -1):
        if context[place] == BOTTOM:
            parent = BOTTOM
            continue
        frame_node[top], frame_parent[top] = context[place], parent
        parent = top
        top += 1
    stack_node[0], stack_frame[0], stack_below[0] = context[0], parent, 0
    return top


@inlined
def frame_slot(table: Int64s, frame_node: Int32s, frame_parent: Int32s, node: int, parent: int) -> int:
    """Where a frame is, or would be, in the arena's hash table."""
    mask = table.shape[0] - 1
    slot = (np.int64(node) * 0x9E3779B1 + np.int64(parent) * 0x85EBCA77) & 0x7FFFFFFFFFFFFFFF
    slot = (slot ^ (slot >> 15)) & mask
    while table[slot] >= 0 and not (frame_node[table[slot]] == node and frame_parent[table[slot]] == parent):
        slot = (slot + 1) & mask
    return slot


@kernel
def rehash(table: Int64s, frame_node: Int32s, frame_parent: Int32s, top: int) -> None:
    """Fills the hash table anew, after the arena has grown."""
    table[:] = -1
    for frame in range(top):
        table[frame_slot(table, frame_node, frame_parent, frame_node[frame], frame_parent[frame])] = frame
