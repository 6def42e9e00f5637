"""The selective scan on a processor: one pass forward and one backward, compiled by numba on first use and kept.

The states of all tokens are never in memory together. The forward keeps one state for every ``CHUNK`` tokens, and the
backward makes those between anew. The innermost loop runs over channels, which lie side by side.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numba import njit

from ..core.grouped.kernels import FAST, exponential, share

Array: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[Any]]

CHUNK = 16
"""Tokens between two kept states."""
BLOCK = 64
"""Channels that are worked on together, so that their states stay close to the processor."""


@njit(cache=True, nogil=True, fastmath=FAST)
def _decays(dt: Array, a: Array, row: int, first: int, count: int, left: int, width: int, out: Array) -> None:
    """``exp(dt A)`` of some tokens and channels into a flat array, by token, state and channel."""
    at = 0
    for t in range(first, first + count):
        for j in range(a.shape[0]):
            for i in range(width):
                out[at + i] = dt[row, t, left + i] * a[j, left + i]
            at += width
    if out.itemsize == 4:
        exponential(out, at)
    else:
        for i in range(at):
            out[i] = np.exp(out[i])


@njit(cache=True, nogil=True, fastmath=FAST)
def forward(
    meeting: Array, member: int, members: int, u: Array, dt: Array, a: Array, b: Array, c: Array, start: Array,
    y: Array, kept: Array, end: Array,
) -> None:  # fmt: skip
    """``y``, the states ``kept`` before every chunk (if there is room for any) and the last state ``end``.

    Shapes: ``u, dt, y [R, L, E]``, ``a [n, E]``, ``b, c [R, L, n]``, ``start, end [R, n, E]``,
    ``kept [R, chunks or 0, n, E]``.
    """
    rows, length, channels = u.shape
    n = a.shape[0]
    blocks = (channels + BLOCK - 1) // BLOCK
    first, last = share(rows * blocks, member, members)
    decay, h = np.empty(CHUNK * n * BLOCK, u.dtype), np.empty((n, BLOCK), u.dtype)
    written, total = np.empty(BLOCK, u.dtype), np.empty(BLOCK, u.dtype)
    for piece in range(first, last):
        row, left = piece // blocks, (piece % blocks) * BLOCK
        width = min(BLOCK, channels - left)
        h[:, :width] = start[row, :, left : left + width]
        for chunk in range((length + CHUNK - 1) // CHUNK):
            if kept.shape[1]:
                kept[row, chunk, :, left : left + width] = h[:, :width]
            begin = chunk * CHUNK
            count = min(CHUNK, length - begin)
            _decays(dt, a, row, begin, count, left, width, decay)
            at = 0
            for t in range(begin, begin + count):
                for i in range(width):
                    written[i] = dt[row, t, left + i] * u[row, t, left + i]
                    total[i] = 0
                for j in range(n):
                    into, out = b[row, t, j], c[row, t, j]
                    for i in range(width):
                        h[j, i] = decay[at + i] * h[j, i] + written[i] * into
                        total[i] += out * h[j, i]
                    at += width
                for i in range(width):
                    y[row, t, left + i] = total[i]
        end[row, :, left : left + width] = h[:, :width]


@njit(cache=True, nogil=True, fastmath=FAST)
def backward(
    meeting: Array, member: int, members: int, u: Array, dt: Array, a: Array, b: Array, c: Array, kept: Array,
    gy: Array, gend: Array, gu: Array, gdt: Array, ga: Array, gb: Array, gc: Array, gstart: Array,
) -> None:  # fmt: skip
    """The gradients of all inputs from those of ``y`` and ``end``.

    Shapes as in ``forward``; ``ga [R, n, E]`` is to be summed over rows, ``gb, gc [blocks, R, L, n]`` over blocks of
    channels: no two members write to one place.
    """
    rows, length, channels = u.shape
    n = a.shape[0]
    blocks = (channels + BLOCK - 1) // BLOCK
    first, last = share(rows * blocks, member, members)
    decay, g = np.empty(CHUNK * n * BLOCK, u.dtype), np.empty((n, BLOCK), u.dtype)
    states = np.empty((CHUNK + 1, n, BLOCK), u.dtype)
    step_sum, input_sum = np.empty(BLOCK, u.dtype), np.empty(BLOCK, u.dtype)
    for piece in range(first, last):
        row, block = piece // blocks, piece % blocks
        left = block * BLOCK
        width = min(BLOCK, channels - left)
        g[:, :width] = gend[row, :, left : left + width]
        ga[row, :, left : left + width] = 0
        for chunk in range((length + CHUNK - 1) // CHUNK - 1, -1, -1):
            begin = chunk * CHUNK
            count = min(CHUNK, length - begin)
            _decays(dt, a, row, begin, count, left, width, decay)
            states[0, :, :width] = kept[row, chunk, :, left : left + width]
            for k in range(count):
                for j in range(n):
                    into, at = b[row, begin + k, j], (k * n + j) * width
                    for i in range(width):
                        written = dt[row, begin + k, left + i] * u[row, begin + k, left + i] * into
                        states[k + 1, j, i] = decay[at + i] * states[k, j, i] + written
            for k in range(count - 1, -1, -1):
                t = begin + k
                for i in range(width):
                    step_sum[i] = 0
                    input_sum[i] = 0
                for j in range(n):
                    into, out, at = b[row, t, j], c[row, t, j], (k * n + j) * width
                    for_b, for_c = u.dtype.type(0), u.dtype.type(0)
                    for i in range(width):
                        gh = g[j, i] + out * gy[row, t, left + i]
                        for_c += gy[row, t, left + i] * states[k + 1, j, i]
                        for_b += gh * dt[row, t, left + i] * u[row, t, left + i]
                        g[j, i] = gh * decay[at + i]
                        exponent = g[j, i] * states[k, j, i]
                        ga[row, j, left + i] += exponent * dt[row, t, left + i]
                        step_sum[i] += exponent * a[j, left + i] + gh * into * u[row, t, left + i]
                        input_sum[i] += gh * into
                    gb[block, row, t, j] = for_b
                    gc[block, row, t, j] = for_c
                for i in range(width):
                    gdt[row, t, left + i] = step_sum[i]
                    gu[row, t, left + i] = input_sum[i] * dt[row, t, left + i]
        gstart[row, :, left : left + width] = g[:, :width]
