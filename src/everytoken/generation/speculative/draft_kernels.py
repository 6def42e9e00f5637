"""Compiled pieces of a feature draft: its forward, and the tree that it grows. See ``core.grouped.kernels``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from ...core.grouped.kernels import FAST, exponential, llama_forward, meet, multiply, normalise, round_rows, share


@njit(cache=True, nogil=True, fastmath=FAST)
def likeliest(logits: Any, first: int, last: int, scale: float, room: Any, tokens: Any, values: Any) -> Any:
    """The largest of ``scale * logits[first:last]``, falling, and the sum of ``exp`` of all less the largest.

    Args:
        room: ``[>= last - first]``, overwritten.
        tokens, values: ``[K]`` get the places and the scaled logits.
    """
    width = tokens.size
    for k in range(width):
        tokens[k] = -1
        values[k] = np.float32(-np.inf)
    for i in range(first, last):
        value = logits[i] * np.float32(scale)
        room[i - first] = value
        if value > values[width - 1]:
            k = width - 1
            while k > 0 and value > values[k - 1]:
                values[k] = values[k - 1]
                tokens[k] = tokens[k - 1]
                k -= 1
            values[k] = value
            tokens[k] = i
    for i in range(last - first):
        room[i] -= values[0]
    exponential(room, last - first)
    total = np.float32(0)
    for i in range(last - first):
        total += room[i]
    return total


@njit(cache=True, nogil=True)
def draft_forward(
    meeting: Any,
    member: int,
    members: int,
    embeds: Any,
    before: Any,
    mix_norms: Any,
    normed: int,
    mix: Any,
    mix_scales: Any,
    epsilon: float,
    block: Any,
    head_bits: int,
    head: Any,
    head_scales: Any,
    keys: Any,
    values: Any,
    past: int,
    allowed: Any,
    cos: Any,
    sin: Any,
    wanted: int,
    scale: float,
    states: Any,
    logits: Any,
    x: Any,
    inputs: Any,
    room: Any,
    places: Any,
    best: Any,
    totals: Any,
    tokens: Any,
    chances: Any,
) -> None:
    """A feature draft over R tokens.

    Args:
        embeds: ``[R, D]``. before: ``[R, F]`` what came one position earlier: the target's states or the draft's own.
        mix_norms: ``[1 + n, D]`` norms of the embedding and of the target's states; ``normed`` of them are used.
        mix: 4 bits, ``[D, D + F]``.
        block: norms, last norm, and the packed weights of the one layer, as ``llama_forward`` takes them.
        scale: one over the temperature.
        states: ``[2, R, D]``; its last gets the draft's states. logits: ``[wanted, V]``.
        room: what ``llama_forward`` writes into. The others are room with one for each member first, for ``wanted``
            rows and K tokens.
        tokens, chances: ``[wanted, K]`` get the likeliest tokens' places in the draft's vocabulary and their chances.
    """
    rows, size = embeds.shape
    qkv_out, mixed, wide_out, narrow, numbers, steps, sums, line, scores = room
    number, step, whole, mine = numbers[member], steps[member], sums[member], inputs[member]
    columns = size + before.shape[1]
    for row in range(rows):
        normalise(embeds[row], mix_norms[0], epsilon, mine[row, :size])
        if normed == 1:
            mine[row, size:columns] = before[row]
        for part in range(1, normed):
            at = part * size
            normalise(before[row, at - size : at], mix_norms[part], epsilon, mine[row, at : at + size])
    round_rows(mine[:rows], columns, number, step, whole)
    first, last = share(size // 8, member, members)
    multiply(4, rows, columns, mix, mix_scales, number, step, whole, x, first, last)
    meet(meeting, members)
    norms, last_norm, qkv, qkv_scales, output, output_scales, wide, wide_scales, down, down_scales = block
    llama_forward(
        meeting, member, members, x, norms, last_norm, epsilon, qkv, qkv_scales, output, output_scales, wide,
        wide_scales, down, down_scales, head, head_scales, keys, values, past, allowed, cos, sin, 0, states,
        logits[:0], qkv_out, mixed, wide_out, narrow, numbers, steps, sums, line, scores,
    )  # fmt: skip
    if wanted == 0:
        return
    meet(meeting, members)
    vocab, width = logits.shape[1], tokens.shape[1]
    round_rows(states[1, rows - wanted :], size, number, step, whole)
    first, last = share(vocab // 8, member, members)
    multiply(head_bits, wanted, size, head, head_scales, number, step, whole, logits, first, last)
    for row in range(wanted):
        totals[member, row] = likeliest(
            logits[row], 8 * first, 8 * last, scale, scores[member], places[member, row], best[member, row]
        )
    meet(meeting, members)
    if member > 0:
        return
    for row in range(wanted):  # each member knows the likeliest of its part
        largest = np.float32(-np.inf)
        for other in range(members):
            largest = max(largest, best[other, row, 0])
        total = np.float32(0)
        for other in range(members):
            total += totals[other, row] * np.exp(best[other, row, 0] - largest)
        for k in range(width):
            leader = 0
            for other in range(members):
                if best[other, row, 0] > best[leader, row, 0]:
                    leader = other
            tokens[row, k] = places[leader, row, 0]
            chances[row, k] = np.exp(best[leader, row, 0] - largest) / total
            best[leader, row, : width - 1] = best[leader, row, 1:].copy()
            places[leader, row, : width - 1] = places[leader, row, 1:].copy()
            best[leader, row, width - 1] = np.float32(-np.inf)


@njit(cache=True, nogil=True)
def grow_compiled(
    meeting: Any,
    member: int,
    members: int,
    pending: Any,
    features: Any,
    offset: int,
    vocabulary: Any,
    embedding: Any,
    cos: Any,
    sin: Any,
    mix_norms: Any,
    mix: Any,
    mix_scales: Any,
    own_mix: Any,
    own_scales: Any,
    epsilon: float,
    block: Any,
    head_bits: int,
    head: Any,
    head_scales: Any,
    keys: Any,
    values: Any,
    past: int,
    deepest: int,
    scale: float,
    floor: float,
    worth_asking: float,
    states: Any,
    x: Any,
    node_states: Any,
    node_x: Any,
    logits: Any,
    inputs: Any,
    room: Any,
    places: Any,
    best: Any,
    totals: Any,
    tokens: Any,
    chances: Any,
    tree: Any,
    probs: Any,
    made: Any,
) -> None:
    """A tree, best node first: the draft reads ``pending`` and then every node behind which it is worth asking.

    Args:
        pending, features: committed tokens that the draft has not read, and the target's states before each.
        offset: the position of the first token in the draft's cache. vocabulary: the draft's tokens.
        embedding ``[V, D]``; cos, sin: by position. past: tokens in the draft's cache.
        floor: a node of less chance is not added. worth_asking: behind a node of less the draft is not asked.
        tree: ``[2, budget + 1]`` gets each node's token and parent, the root's first. probs: their chances given the
            parent. made: ``[2]`` gets how many nodes there are with the root, and how often the draft was asked.
    """
    budget, width, size = tree.shape[1] - 1, tokens.shape[1], x.shape[1]
    rows = pending.size
    seen = np.zeros((rows, rows), np.bool_)
    for row in range(rows):
        seen[row, : row + 1] = True
    embeds = np.empty((rows, size), np.float32)
    for row in range(rows):
        embeds[row] = embedding[pending[row]]
    at = offset + past
    draft_forward(
        meeting, member, members, embeds, features, mix_norms, mix_norms.shape[0], mix, mix_scales, epsilon, block,
        head_bits, head, head_scales, keys, values, past, seen, cos[at : at + rows], sin[at : at + rows], 1, scale,
        states, logits, x, inputs, room, places, best, totals, tokens, chances,
    )  # fmt: skip
    meet(meeting, members)
    # every member decides for itself, and all decide the same
    base = past + rows
    value, depth = np.zeros(budget + 1), np.zeros(budget + 1, np.int64)
    parent, place, read = np.zeros(budget + 1, np.int64), np.full(budget + 1, -1), np.full(budget + 1, -1)
    rank = np.zeros(budget + 1, np.int64)
    offered, offers = np.zeros((budget + 1, width)), np.zeros((budget + 1, width), np.int64)
    own = np.zeros((budget + 1, size), np.float32)
    value[0] = 1.0
    read[0] = 0
    own[0] = states[1, rows - 1]
    offered[0], offers[0] = chances[0], tokens[0]
    count, asked = 1, 1
    while count <= budget:
        chosen, most = -1, 0.0
        for node in range(count):
            if read[node] >= 0 and rank[node] < width:
                gain = value[node] * offered[node, rank[node]]
                if gain > most:
                    chosen, most = node, gain
        if chosen < 0 or most < floor:
            break
        node = count
        count += 1
        parent[node], place[node], value[node], depth[node] = (
            chosen,
            offers[chosen, rank[chosen]],
            most,
            depth[chosen] + 1,
        )
        if member == 0:
            tree[0, node], tree[1, node] = vocabulary[place[node]], chosen
            probs[node] = offered[chosen, rank[chosen]]
        rank[chosen] += 1
        if most < worth_asking or depth[node] >= deepest or count > budget:
            continue
        earlier = asked - 1
        path = np.zeros((1, earlier + 1), np.bool_)
        path[0, earlier] = True
        walk = chosen
        while walk > 0:
            path[0, read[walk] - 1] = True
            walk = parent[walk]
        token, at = vocabulary[place[node]], offset + base + depth[node] - 1
        before = np.empty((1, size), np.float32)
        before[0] = own[chosen]
        meet(meeting, members)  # all have taken what they need of the last answer
        draft_forward(
            meeting, member, members, embedding[token : token + 1], before, mix_norms, 1, own_mix, own_scales, epsilon,
            block, head_bits, head, head_scales, keys, values, base, path, cos[at : at + 1], sin[at : at + 1], 1, scale,
            node_states, logits, node_x, inputs, room, places, best, totals, tokens, chances,
        )  # fmt: skip
        meet(meeting, members)
        own[node] = node_states[1, 0]
        offered[node], offers[node] = chances[0], tokens[0]
        read[node] = asked
        asked += 1
    if member == 0:
        made[0], made[1] = count, asked
