"""Building the trie of a vocabulary's tokens, and cutting a part out of it."""

from __future__ import annotations

import numpy as np

from ..jit import inlined, kernel
from .tables import Bools, Int32s, Int64s, PackedTrie, Trie, UInt8s, UInt64s


@kernel
def build_trie(
    data: UInt8s,
    offsets: Int64s,
    shared: Int64s,
    byte_of: UInt8s,
    depth_of: Int32s,
    skip: Int32s,
    parent: Int32s,
    first: Int32s,
    subtree: UInt64s,
    characters: Bools,
    height: Int32s,
) -> int:
    """Trie nodes in preorder from sorted distinct byte strings; ``shared[k]`` is the length of the prefix that k has
    in common with k - 1.

    ``subtree`` receives the bytes of a node and of all below it, ``characters`` whether they are UTF-8 (the last
    character may
    be unfinished) when a character starts at the node, ``height`` how many bytes its longest token adds from it on.
    """
    path = np.empty(1 << 16, np.int64)
    count = 0
    for token in range(offsets.shape[0] - 1):
        length = offsets[token + 1] - offsets[token]
        for place in range(shared[token], length):
            byte_of[count] = data[offsets[token] + place]
            depth_of[count] = place + 1
            parent[count] = path[place - 1] if place > 0 else -1
            first[count] = -1
            path[place] = count
            count += 1
        first[path[length - 1]] = token
    sound = np.ones((count, 8), np.bool_)  # by the state of a UTF-8 decoder before the node's byte
    for node in range(count - 1, -1, -1):
        below = node + 1
        while below < count and depth_of[below] > depth_of[node]:
            below = skip[below]
        skip[node] = below
        byte = byte_of[node]
        subtree[node, byte >> 6] |= np.uint64(1) << np.uint64(byte & 63)
        for state in range(8):
            after = utf8_after(state, byte)
            good = after >= 0
            below = node + 1
            while good and below < skip[node]:
                good = sound[below, after]
                below = skip[below]
            sound[node, state] = good
        characters[node] = sound[node, 0]
        height[node] += 1
        above = parent[node]
        if above >= 0:
            height[above] = max(height[above], height[node])
            for word in range(4):
                subtree[above, word] |= subtree[node, word]
    return count


@inlined
def utf8_after(state: int, byte: int) -> int:
    """UTF-8's decoder: 0 between characters; 1, 2, 3 bytes to come; 4 to 7 the same with a restricted next byte. -1:
    invalid."""
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


@kernel
def extract(nodes: Int32s, packed_trie: PackedTrie) -> tuple[UInt8s, Int32s, Int32s, Int32s, Int32s, int]:
    """The trie of the tokens at some nodes (in preorder) alone: ``(byte, depth, skip, token_ptr, token_ids,
    levels)``."""
    trie = Trie(*packed_trie)
    byte_of, depth_of, skip, token_ptr, token_ids = trie.byte, trie.depth, trie.skip, trie.token_ptr, trie.token_ids
    room = min(byte_of.shape[0], nodes.shape[0] * trie.levels)
    kept = np.empty(room, np.int64)
    ends = np.zeros(room, np.bool_)
    count, total, node = 0, 0, 0
    for wanted in range(nodes.shape[0]):
        while node < nodes[wanted]:
            if skip[node] <= nodes[wanted]:
                node = skip[node]  # beside the way to the node
            else:
                kept[count] = node
                count += 1
                node += 1
        kept[count], ends[count] = node, True
        count += 1
        node += 1
        total += token_ptr[nodes[wanted] + 1] - token_ptr[nodes[wanted]]
    new_byte, new_depth = np.empty(count, np.uint8), np.empty(count, np.int32)
    new_skip, new_ptr = np.empty(count, np.int32), np.zeros(count + 1, np.int32)
    new_ids = np.empty(total, np.int32)
    size, deepest = 0, 1
    for here in range(count):
        node = kept[here]
        new_byte[here], new_depth[here] = byte_of[node], depth_of[node]
        deepest = max(deepest, depth_of[node] + 1)
        if ends[here]:
            for token in range(token_ptr[node], token_ptr[node + 1]):
                new_ids[size] = token_ids[token]
                size += 1
        new_ptr[here + 1] = size
    for here in range(count - 1, -1, -1):
        below = here + 1
        while below < count and new_depth[below] > new_depth[here]:
            below = new_skip[below]
        new_skip[here] = below
    return new_byte, new_depth, new_skip, new_ptr, new_ids, deepest
