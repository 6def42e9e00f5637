"""Compute times of one layer of one rank, measured on this machine and interpolated between the measured points.

The layer has the model's shapes cut over the ranks, and constant weights. Attention is timed in three pieces: the
projections; a part's own square of scores, with causality; and scores against more keys, with a mask.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from ..core.errors import BadInputError
from ..core.progress import Report, silent
from .sharding import check_world, divides_heads
from .texts import lower_right

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Curve = tuple[tuple[float, float], ...]
"""Points ``(size, seconds)``, by size."""


def at(curve: Curve, size: float, power: int = 1) -> float:
    """A curve's value: between points on the line, before the first that of the first, and behind the last in
    proportion to the size (to its square with ``power`` 2).
    """
    if size <= 0:
        return 0.0
    place = bisect_left(curve, (size, -1.0))
    if place == 0:
        return curve[0][1]  # a smaller piece takes no less: what is called costs the same
    if place == len(curve):
        return curve[-1][1] * (size / curve[-1][0]) ** power
    (x0, y0), (x1, y1) = curve[place - 1], curve[place]
    return y0 + (y1 - y0) * (size - x0) / (x1 - x0)


@dataclass(frozen=True)
class MeasuredTimes:
    """What was measured; see ``simulation.Times``.

    Attributes:
        project, up_down, normed: of tokens.
        square: of a part's own scores, by tokens.
        wide: of scores with a mask, by tokens times keys.
    """

    project: Curve
    up_down: Curve
    normed: Curve
    square: Curve
    wide: Curve

    def attention(self, tokens: int, keys: int) -> float:
        """Of new tokens, the last of which attends to so many keys."""
        scores = at(self.square, tokens, 2) if keys == tokens else at(self.wide, tokens * keys)
        return at(self.project, tokens) + scores

    def mlp(self, tokens: int) -> float:
        return at(self.up_down, tokens)

    def norm(self, rows: int) -> float:
        return at(self.normed, rows)

    def slower(self, factor: float) -> MeasuredTimes:
        """The same with all times multiplied."""
        curves = (self.project, self.up_down, self.normed, self.square, self.wide)
        return MeasuredTimes(*(tuple((x, factor * y) for x, y in curve) for curve in curves))


@torch.no_grad()
def measure_layer(
    config: PreTrainedConfig,
    world: int,
    counts: Sequence[int],
    repeats: int = 3,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    report: Report = silent,
    clock: Callable[[], float] | None = None,
) -> MeasuredTimes:
    """Times the pieces of a layer at several numbers of tokens; the least of several runs.

    On a CPU it is this thread's processor time, which other work on the machine does not change: a rank is to have its
    processor to itself, so set one thread.

    Args:
        config: of a Llama-like model; only its sizes are read.
        world: ranks among which the layer is cut.
        counts: of tokens.
        clock: seconds; default processor time of the thread on a CPU, wall-clock time elsewhere.

    Raises:
        BadInputError: no counts, or ranks that do not divide the MLP.
    """
    counts = sorted(set(counts))
    if not counts or counts[0] < 1 or repeats < 1:
        raise BadInputError("A layer is timed at one number of tokens or more, once or more.")
    check_world(config, world)
    if clock is None:
        clock = time.thread_time if device == "cpu" else time.perf_counter
    hidden = int(config.hidden_size)
    width = int(getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    share = world if divides_heads(config, world) else 1
    heads, kv = config.num_attention_heads // share, config.num_key_value_heads // share
    inner = config.intermediate_size // world

    def full(*shape: int) -> torch.Tensor:
        return torch.full(shape, 0.01, dtype=dtype, device=device)

    into, out = full((heads + 2 * kv) * width, hidden), full(hidden, heads * width)
    up, down, gain = full(2 * inner, hidden), full(hidden, inner), full(hidden)

    def least(function: Callable[[], Any]) -> float:
        best = float("inf")
        for _ in range(repeats + 1):  # the first warms up
            _wait(device)
            began = clock()
            function()
            _wait(device)
            best = min(best, clock() - began)
        return best

    def mlp(rows: torch.Tensor) -> torch.Tensor:
        gate, value = F.linear(rows, up).chunk(2, -1)
        return F.linear(F.silu(gate) * value, down)

    def pieces(count: int) -> dict[str, Callable[[], Any]]:
        rows, state = full(count, hidden), full(count, heads * width)
        q, k, v = full(1, heads, count, width), full(1, kv, 2 * count, width), full(1, kv, 2 * count, width)
        own_k, own_v, mask = k[:, :, :count], v[:, :, :count], lower_right(count, 2 * count, rows.device)
        scores = partial(F.scaled_dot_product_attention, q, enable_gqa=heads != kv)
        return {
            "project": lambda: (F.linear(rows, into), F.linear(state, out)),
            "mlp": lambda: mlp(rows),
            "norm": lambda: F.rms_norm(rows + rows, (hidden,), gain),
            "square": lambda: scores(own_k, own_v, is_causal=True),
            "wide": lambda: scores(k, v, attn_mask=mask),
        }

    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in pieces(1)}
    for number, count in enumerate(counts):
        report("timing a layer", number, len(counts))
        for name, function in pieces(count).items():
            size = 2 * count * count if name == "wide" else count
            curves[name].append((float(size), least(function)))
    return MeasuredTimes(*map(tuple, curves.values()))


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
