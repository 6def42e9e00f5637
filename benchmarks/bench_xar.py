"""Drawing images entity by entity: with keys and values of finished entities kept, and with all computed anew.

xAR of one size draws a batch of images. Both ways must give the same images. *Calls* are those of the network,
*tokens* are those that pass through it a call's row, summed over calls. On one thread, in processor time, so that
other work on the machine does not count; the least of several runs.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from common import report
from everytoken.architectures.xar.configuration_xar import XARConfig
from everytoken.architectures.xar.modeling_xar import XARModel

CASES = (("cell", 8), ("cell", 4), ("row", 1), ("image", 1))
"""Entities and their sizes on the grid of 16 x 16."""


def drawn(model: XARModel, labels: torch.Tensor, steps: int, cached: bool, repeats: int) -> tuple[float, torch.Tensor]:
    """Least processor seconds of a batch, and its images."""
    least, images = float("inf"), torch.empty(0)
    for _ in range(repeats):
        began = time.process_time()
        images = model.generate(labels, steps=steps, use_cache=cached)
        least = min(least, time.process_time() - began)
    return least, images


def case(entity: str, size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Both ways of one kind of entity."""
    torch.manual_seed(0)
    config = XARConfig(
        entity=entity, entity_size=size, grid=(16, 16), channels=4, num_classes=10, hidden_size=64,
        num_hidden_layers=4, num_attention_heads=4,
    )  # fmt: skip
    model = XARModel(config).eval()
    labels = torch.arange(args.batch) % 10
    cached, ours = drawn(model, labels, args.steps, True, args.repeats)
    anew, theirs = drawn(model, labels, args.steps, False, args.repeats)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    n, m, steps = config.entities, config.entity_tokens, args.steps
    return {
        "what": f"{entity}, {n} entities of {m} tokens",
        "calls": n * steps,
        "tokens, kept": m * (n * steps + n - 1),
        "tokens, anew": m * steps * n * (n + 1) // 2,
        "kept, ms an image": 1e3 * cached / args.batch,
        "anew, ms an image": 1e3 * anew / args.batch,
        "times faster": anew / cached,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    note = (
        f"Batches of {args.batch}, {args.steps} steps an entity; least of {args.repeats}, one thread, processor time."
    )
    report("xar", [case(*item, args) for item in CASES], note)


if __name__ == "__main__":
    main()
