"""Compiled pieces of decoding on a CPU. Compiled on first use and kept in numba's cache."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def top_indices(values: np.ndarray, k: int) -> np.ndarray:
    """Positions of the ``k`` largest of ``[N]`` non-negative float32 numbers, in ascending order; of equals, the first.

    A radix selection over the bits, which order such numbers as their values do: two counting passes and one that
    collects. Votes are mostly zeros and denormal numbers, with which torch.topk takes twenty times as long, and
    unsorted.
    """
    bits = values.view(np.uint32)
    high, low = np.zeros(1 << 16, np.int64), np.zeros(1 << 16, np.int64)
    for i in range(bits.size):
        high[bits[i] >> np.uint32(16)] += 1
    edge, above = high.size - 1, 0
    while above + high[edge] < k:
        above += high[edge]
        edge -= 1
    for i in range(bits.size):
        if bits[i] >> np.uint32(16) == edge:
            low[bits[i] & np.uint32(0xFFFF)] += 1
    last = low.size - 1
    while above + low[last] < k:
        above += low[last]
        last -= 1
    threshold = (np.uint32(edge) << np.uint32(16)) | np.uint32(last)
    equals = k - above
    chosen, count = np.empty(k, np.int64), 0
    for i in range(bits.size):
        if bits[i] > threshold or (bits[i] == threshold and equals > 0):
            if bits[i] == threshold:
                equals -= 1
            chosen[count] = i
            count += 1
            if count == k:
                break
    return chosen


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz", "arcp"})
def attend_rotated(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, cos: np.ndarray, sin: np.ndarray, scale: float
) -> np.ndarray:
    """Attention of one key head's queries over M rows, which are rotated as they are read: ``[G, d]``.

    Args:
        query: ``[G, d]``, rotated.
        keys, values: ``[M, d]``, keys un-rotated; the j-th is rotated to position j.
        cos, sin: ``[M, d]`` rotary tables whose two halves are equal (halves of a vector are rotated against each
            other).
    """
    groups, size = query.shape
    length, half = keys.shape[0], size // 2
    output = np.zeros((groups, size), np.float32)
    weights = np.empty((groups, length), np.float32)
    turned = np.empty(size, np.float32)
    factor = np.float32(scale)
    for j in range(length):
        for i in range(half):
            turned[i] = keys[j, i] * cos[j, i] - keys[j, i + half] * sin[j, i]
            turned[i + half] = keys[j, i + half] * cos[j, i] + keys[j, i] * sin[j, i]
        for group in range(groups):
            total = np.float32(0)
            for i in range(size):
                total += query[group, i] * turned[i]
            weights[group, j] = total * factor
    for group in range(groups):
        largest = weights[group].max()
        total = np.float32(0)
        for j in range(length):
            weights[group, j] = np.exp(weights[group, j] - largest)
            total += weights[group, j]
        for j in range(length):
            weights[group, j] /= total
    for j in range(length):
        for group in range(groups):
            weight = weights[group, j]
            for i in range(size):
                output[group, i] += weight * values[j, i]
    return output
