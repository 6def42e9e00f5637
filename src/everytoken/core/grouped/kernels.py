"""Compiled pieces of a forward with grouped weights on a CPU. numba compiles them on first use and keeps them.

Each takes ``(meeting, member, members)`` of ``team.run_together`` where its work is shared among threads.
"""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import numpy as np
from numba import njit, types

from .vectors import (
    atomic_add,
    bits_to_float,
    tile_4_1,
    tile_4_2,
    tile_4_3,
    tile_4_4,
    tile_8_1,
    tile_8_2,
    tile_8_3,
    tile_8_4,
)

Array: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[Any]]

FAST = {"reassoc", "contract", "nsz", "arcp"}
BLOCK = 4
SPINS = 2000
YIELDS = sys.platform != "win32"
_yield = types.ExternalFunction("sched_yield", types.int32()) if YIELDS else None


@njit(cache=True, nogil=True)
def meet(meeting: Array, members: int) -> None:
    """Returns when all members have come here, or one has given up."""
    if members == 1:
        return
    waiting = np.uint64(meeting.ctypes.data)
    rounds, stopped = waiting + np.uint64(8), waiting + np.uint64(16)
    now = atomic_add(rounds, 0)
    if atomic_add(waiting, 1) == members - 1:
        atomic_add(waiting, -members)
        atomic_add(rounds, 1)
        return
    spins = 0
    while atomic_add(rounds, 0) == now and atomic_add(stopped, 0) == 0:
        spins += 1
        if YIELDS and spins > SPINS:  # the processor may be needed by the one that we wait for
            _yield()  # type: ignore[misc]


@njit(cache=True, nogil=True, inline="always")
def share(count: int, member: int, members: int) -> tuple[int, int]:
    """The part ``[first, last)`` of ``count`` pieces that a member works on."""
    return count * member // members, count * (member + 1) // members


@njit(cache=True, nogil=True, fastmath=FAST)
def exponential(values: Array, count: int) -> None:
    """``exp`` of the first ``count`` float32 numbers, none above 88, in place; to 2 units in the last place."""
    for i in range(count):
        x = max(values[i], np.float32(-87.0))
        whole = np.float32(np.rint(x * np.float32(1.44269504)))
        x = x - whole * np.float32(0.693359375) + whole * np.float32(2.12194440e-4)
        y = np.float32(1.9875691500e-4)
        y = y * x + np.float32(1.3981999507e-3)
        y = y * x + np.float32(8.3334519073e-3)
        y = y * x + np.float32(4.1665795894e-2)
        y = y * x + np.float32(1.6666665459e-1)
        y = y * x + np.float32(5.0000001201e-1)
        y = y * x * x + x + np.float32(1.0)
        values[i] = y * bits_to_float(np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)))


@njit(cache=True, nogil=True, fastmath=FAST)
def to_steps(row: Array, numbers: Array, steps: Array, sums: Array) -> None:
    """A row of float32 numbers as integers of 16 bits: for each group of 32 a step, and the sum of the rounded ones."""
    for group in range(row.size // 32):
        first = group * 32
        largest = np.float32(0)
        for i in range(first, first + 32):
            largest = max(largest, abs(row[i]))
        step = largest / np.float32(32767)
        factor = np.float32(32767) / largest if largest > 0 else np.float32(0)
        total = np.int32(0)
        for i in range(first, first + 32):
            rounded = np.int32(np.rint(row[i] * factor))
            numbers[i] = np.int16(rounded)
            total += rounded
        steps[group] = step
        sums[group] = np.float32(total) * step


@njit(cache=True, nogil=True)
def round_rows(x: Array, columns: int, numbers: Array, steps: Array, sums: Array) -> None:
    """``to_steps`` of the first ``columns`` of each row; the results lie behind each other in flat arrays."""
    groups = columns // 32
    for row in range(x.shape[0]):
        at, group = row * columns, row * groups
        to_steps(
            x[row, :columns], numbers[at : at + columns], steps[group : group + groups], sums[group : group + groups]
        )


@njit(cache=True, nogil=True)
def multiply(
    bits: int,
    rows: int,
    columns: int,
    weights: Array,
    scales: Array,
    numbers: Array,
    steps: Array,
    sums: Array,
    out: Array,
    first: int,
    last: int,
) -> None:
    """``out[:rows, 8 first : 8 last]`` of the product of rows with packed weights.

    Args:
        weights, scales: of 4 or 8 bits, as ``vectors`` lays them out.
        numbers, steps, sums: what ``round_rows`` gave, flat.
        out: ``[>= R, N]`` float32.
    """
    groups, width = columns // 32, out.shape[1]
    weight, scale = weights.ctypes.data, scales.ctypes.data
    number, step, whole, result = numbers.ctypes.data, steps.ctypes.data, sums.ctypes.data, out.ctypes.data
    for tile in range(first, last):
        row = 0
        while row < rows:
            a, b, c = number + row * columns * 2, step + row * groups * 4, whole + row * groups * 4
            place = result + (row * width + tile * 8) * 4
            many = min(rows - row, 4)
            if bits == 4:
                w, s = weight + tile * groups * 128, scale + tile * groups * 32
                if many == 4:
                    tile_4_4(w, s, a, b, c, place, groups, width)
                elif many == 3:
                    tile_4_3(w, s, a, b, c, place, groups, width)
                elif many == 2:
                    tile_4_2(w, s, a, b, c, place, groups, width)
                else:
                    tile_4_1(w, s, a, b, c, place, groups, width)
            else:
                w, s = weight + tile * groups * 256, scale + tile * groups * 16
                if many == 4:
                    tile_8_4(w, s, a, b, c, place, groups, width)
                elif many == 3:
                    tile_8_3(w, s, a, b, c, place, groups, width)
                elif many == 2:
                    tile_8_2(w, s, a, b, c, place, groups, width)
                else:
                    tile_8_1(w, s, a, b, c, place, groups, width)
            row += many


@njit(cache=True, nogil=True)
def linear(
    meeting: Array,
    member: int,
    members: int,
    bits: int,
    weights: Array,
    scales: Array,
    x: Array,
    numbers: Array,
    steps: Array,
    sums: Array,
    out: Array,
) -> None:
    """``out = x W'`` for ``x [R, K]``; the others are room for its rounded numbers, one a member."""
    columns = x.shape[1]
    round_rows(x, columns, numbers[member], steps[member], sums[member])
    first, last = share(out.shape[1] // 8, member, members)
    multiply(bits, x.shape[0], columns, weights, scales, numbers[member], steps[member], sums[member], out, first, last)


@njit(cache=True, nogil=True, fastmath=FAST)
def normalise(x: Array, weight: Array, epsilon: float, out: Array) -> None:
    """RMS normalisation of one row."""
    total = np.float32(0)
    for i in range(x.size):
        total += x[i] * x[i]
    factor = np.float32(1) / np.sqrt(total / np.float32(x.size) + np.float32(epsilon))
    for i in range(x.size):
        out[i] = x[i] * factor * weight[i]


@njit(cache=True, nogil=True, fastmath=FAST)
def rotate(vector: Array, cos: Array, sin: Array, out: Array) -> None:
    """One head's vector ``[d]`` turned to a position; its two halves are turned against each other."""
    half = vector.size // 2
    for i in range(half):
        a, b = vector[i], vector[i + half]
        out[i] = a * cos[i] - b * sin[i]
        out[i + half] = b * cos[i + half] + a * sin[i + half]


@njit(cache=True, nogil=True, fastmath=FAST)
def attend(query: Array, keys: Array, values: Array, past: int, allowed: Array, scores: Array, out: Array) -> None:
    """Attention of one head ``[d]`` over the ``past`` keys and those of the new ones that ``allowed`` marks.

    Keys that are not allowed are left out and not weighted by zero: a node of a tree gets the sums of its own text.
    """
    size = query.size
    scale = np.float32(1) / np.sqrt(np.float32(size))
    count, largest = 0, np.float32(-np.inf)
    for key in range(past + allowed.size):
        if key < past or allowed[key - past]:
            total = np.float32(0)
            for i in range(size):
                total += query[i] * keys[key, i]
            scores[count] = total * scale
            largest = max(largest, scores[count])
            count += 1
    for i in range(count):
        scores[i] -= largest
    exponential(scores, count)
    for i in range(size):
        out[i] = 0
    count, whole = 0, np.float32(0)
    for key in range(past + allowed.size):
        if key < past or allowed[key - past]:
            weight = scores[count]
            whole += weight
            count += 1
            for i in range(size):
                out[i] += weight * values[key, i]
    for i in range(size):
        out[i] /= whole


@njit(cache=True, nogil=True, fastmath=FAST)
def gate(wide: Array, first: int, last: int, room: Array) -> None:
    """``silu(gate) * up`` in place of gate, for columns ``[first, last)``; ``wide [2 I]`` holds gates, then ups."""
    half = wide.size // 2
    for i in range(first, last):
        room[i - first] = max(-wide[i], np.float32(-87.0)) if -wide[i] < np.float32(87.0) else np.float32(87.0)
    exponential(room, last - first)
    for i in range(first, last):
        wide[i] = wide[i] / (np.float32(1) + room[i - first]) * wide[half + i]


@njit(cache=True, nogil=True)
def llama_forward(
    meeting: Array,
    member: int,
    members: int,
    x: Array,
    norms: Array,
    last_norm: Array,
    epsilon: float,
    qkv: Array,
    qkv_scales: Array,
    output: Array,
    output_scales: Array,
    wide: Array,
    wide_scales: Array,
    down: Array,
    down_scales: Array,
    head: Array,
    head_scales: Array,
    keys: Array,
    values: Array,
    past: int,
    allowed: Array,
    cos: Array,
    sin: Array,
    wanted: int,
    states: Array,
    logits: Array,
    qkv_out: Array,
    mixed: Array,
    wide_out: Array,
    narrow: Array,
    numbers: Array,
    steps: Array,
    sums: Array,
    line: Array,
    scores: Array,
) -> None:
    """A Llama over R new tokens.

    Args:
        x: ``[R, D]`` embeddings; overwritten.
        norms: ``[L, 2, D]``. last_norm: ``[D]``.
        qkv, output, wide, down: ``[L, bytes]`` weights of 4 bits as ``vectors`` lays them out (queries, keys and values
            behind each other; gates, then ups), with their scales. head: 8 bits.
        keys, values: ``[L, kv heads, room, d]``; the first ``past`` are filled, the new ones are written behind them.
        allowed: ``[R, E + R]`` which of the new tokens each may see. E of them were read in earlier calls: they lie
            behind the past ones.
        cos, sin: ``[R, d]`` rotary tables for their positions.
        wanted: the last so many tokens get logits.
        states: ``[L + 1, R, D]`` gets what enters each layer, and the normalised last state.
        logits: ``[wanted, V]`` gets the logits.
        the others: room for R rows. ``numbers``, ``steps``, ``sums``, ``line`` and ``scores`` have one for each member
            first, because each rounds all rows for itself: that is cheaper than waiting for another.
    """
    layers, rows, size = norms.shape[0], x.shape[0], x.shape[1]
    kv_heads, width = keys.shape[1], keys.shape[3]
    inner, middle = mixed.shape[1], wide_out.shape[1] // 2
    heads = inner // width
    sharing = heads // kv_heads
    begin = past + allowed.shape[1] - rows
    number, step, whole = numbers[member], steps[member], sums[member]
    mine, weights = line[member], scores[member]
    for layer in range(layers):
        # -- attention
        for row in range(rows):
            if row % members == member:
                states[layer, row] = x[row]
            normalise(x[row], norms[layer, 0], epsilon, mine[row])
        round_rows(mine[:rows], size, number, step, whole)
        first, last = share(qkv_out.shape[1] // 8, member, members)
        multiply(4, rows, size, qkv[layer], qkv_scales[layer], number, step, whole, qkv_out, first, last)
        meet(meeting, members)
        for row in range(rows):  # each member writes all keys, the same numbers
            for kv in range(kv_heads):
                at = inner + kv * width
                rotate(qkv_out[row, at : at + width], cos[row], sin[row], keys[layer, kv, begin + row])
                at += kv_heads * width
                values[layer, kv, begin + row] = qkv_out[row, at : at + width]
        first, last = share(rows * heads, member, members)
        for piece in range(first, last):
            row, query = piece // heads, piece % heads
            at = query * width
            rotate(qkv_out[row, at : at + width], cos[row], sin[row], mine[row, :width])
            attend(
                mine[row, :width],
                keys[layer, query // sharing],
                values[layer, query // sharing],
                past,
                allowed[row],
                weights,
                mixed[row, at : at + width],
            )
        meet(meeting, members)
        round_rows(mixed[:rows], inner, number, step, whole)
        first, last = share(size // 8, member, members)
        multiply(4, rows, inner, output[layer], output_scales[layer], number, step, whole, narrow, first, last)
        x[:, 8 * first : 8 * last] += narrow[:rows, 8 * first : 8 * last]
        meet(meeting, members)
        # -- feed-forward
        for row in range(rows):
            normalise(x[row], norms[layer, 1], epsilon, mine[row])
        round_rows(mine[:rows], size, number, step, whole)
        first, last = share(middle // 8, member, members)
        multiply(4, rows, size, wide[layer], wide_scales[layer], number, step, whole, wide_out, first, last)
        ups = middle // 8
        multiply(4, rows, size, wide[layer], wide_scales[layer], number, step, whole, wide_out, ups + first, ups + last)
        for row in range(rows):
            gate(wide_out[row], 8 * first, 8 * last, mine[row])
        meet(meeting, members)
        round_rows(wide_out[:rows], middle, number, step, whole)
        first, last = share(size // 8, member, members)
        multiply(4, rows, middle, down[layer], down_scales[layer], number, step, whole, narrow, first, last)
        x[:, 8 * first : 8 * last] += narrow[:rows, 8 * first : 8 * last]
        meet(meeting, members)
    for row in range(rows):
        normalise(x[row], last_norm, epsilon, mine[row])
        if row % members == member:
            states[layers, row] = mine[row, :size]
    round_rows(mine[rows - wanted : rows], size, number, step, whole)
    first, last = share(logits.shape[1] // 8, member, members)
    multiply(8, wanted, size, head, head_scales, number, step, whole, logits, first, last)
