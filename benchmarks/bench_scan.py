"""The selective scan against transformers' own, forward and with gradients, and PlainMamba's cost over the tokens.

Both scans get the same tensors through the same arguments, gate and step bias included. The last rows are forwards of a
PlainMamba encoder and of a vision transformer of its width over growing grids. On one thread, in processor time, so
that other work on the machine does not count; the least of several runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from common import report
from everytoken.architectures.scan import scan_like_transformers
from everytoken.core.quiet import quiet_transformers
from everytoken.reproduce.plainmamba import network, transformer

CASES = ((8, 64, 128, 16), (4, 128, 256, 16), (1, 512, 256, 16), (1, 4, 64, 8))
"""Rows, tokens, channels, states."""


def milliseconds(function: Callable[[], Any], repeats: int) -> float:
    """Least processor time of several runs, after one that does not count."""
    function()
    least = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        function()
        least = min(least, time.process_time() - began)
    return 1e3 * least


def scan_row(rows: int, length: int, channels: int, states: int, repeats: int) -> dict[str, Any]:
    """Both scans on one case; they must agree."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    u, dt, z = (draw(rows, channels, length) for _ in range(3))
    b, c, d, bias = draw(rows, states, length), draw(rows, states, length), draw(channels), draw(channels)
    a = (-torch.rand(channels, states, generator=generator)).requires_grad_()

    def run(scan: Callable[..., Any]) -> torch.Tensor:
        found: torch.Tensor = scan(u, dt, a, b, c, D=d, z=z, delta_bias=bias, delta_softplus=True)
        return found

    with torch.no_grad():
        assert torch.allclose(run(scan_like_transformers), run(mamba_selective_scan), rtol=1e-3, atol=1e-3)
        forward = [milliseconds(lambda: run(scan), repeats) for scan in (scan_like_transformers, mamba_selective_scan)]
    both = [
        milliseconds(lambda: run(scan).sum().backward(), repeats)
        for scan in (scan_like_transformers, mamba_selective_scan)
    ]
    return {
        "what": f"{rows} x {length} tokens, {channels} channels, {states} states",
        "ours, ms": forward[0],
        "transformers, ms": forward[1],
        "times faster": forward[1] / forward[0],
        "ours with gradients, ms": both[0],
        "transformers with gradients, ms": both[1],
        "times faster with gradients": both[1] / both[0],
    }


@torch.no_grad()
def grid_row(side: int, repeats: int) -> dict[str, Any]:
    """Forwards over ``side^2`` tokens."""
    images = torch.randn(1, 1, 2 * side, 2 * side)
    scans, attends = network(16, 2, image_size=2 * side).eval(), transformer(16, 2, 2 * side).eval()
    return {
        "what": f"encoder, {side * side} tokens",
        "PlainMamba, ms": milliseconds(lambda: scans(images), repeats),
        "vision transformer, ms": milliseconds(lambda: attends(images), repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with quiet_transformers():
        rows = [scan_row(*case, args.repeats) for case in CASES]
        rows += [grid_row(side, args.repeats) for side in (8, 16, 32, 64)]
    heads = list(dict.fromkeys(head for row in rows for head in row))
    note = f"Least of {args.repeats}, one thread, processor time."
    report("scan", [{head: row.get(head, "") for head in heads} for row in rows], note)


if __name__ == "__main__":
    main()
