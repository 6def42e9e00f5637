"""What the canvas loop costs over the model's own time: a ModernBERT shape of 100M weights, 128 tokens, trace off.

The peer is a minimal loop: a forward, softmax, argmax and top-k a step, one row, no checks, no record. Arms run by
turns; the figure is the median of the processor's time, which other work on the machine changes less than the clock's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import torch
from transformers import ModernBertConfig, ModernBertForMaskedLM

from common import report
from everytoken.decoding.canvas.denoising import DenoisingSampler
from everytoken.generation.rcr import RCR


@torch.no_grad()
def minimal(model: Any, ids: torch.Tensor, mask: int, length: int, steps: int) -> torch.Tensor:
    """Confidence order with as few operations as it takes."""
    canvas = torch.cat([ids, torch.full((1, length), mask)], 1)
    for _ in range(steps):
        probs = model(input_ids=canvas).logits[0].softmax(-1)
        best, tokens = probs.max(-1)
        best[canvas[0] != mask] = -1
        where = best.topk(length // steps).indices
        canvas[0, where] = tokens[where]
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=50_368, hidden_size=640, intermediate_size=960, num_hidden_layers=20, num_attention_heads=10
    )
    model = ModernBertForMaskedLM(config).eval()
    weights = sum(weight.numel() for weight in model.parameters())
    ids, mask = torch.randint(5, 1000, (1, 16)), 50_284
    canvas = torch.cat([ids, torch.full((1, args.length), mask)], 1)

    @torch.no_grad()
    def forwards() -> None:
        for _ in range(args.steps):
            model(input_ids=canvas)

    settings: dict[str, Any] = {"gen_length": args.length, "steps": args.steps, "mask_id": mask}
    arms = {
        "the model's forwards alone": forwards,
        "minimal loop": lambda: minimal(model, ids, mask, args.length, args.steps),
        "DenoisingSampler": lambda: DenoisingSampler(**settings)(model, ids),
        "RCR": lambda: RCR(**settings)(model, ids),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(args.repeats + 1):
        for name, run in arms.items():
            began = time.process_time()
            run()
            if repeat:  # the first one warms up
                times[name].append(time.process_time() - began)
    ratios = {
        name: statistics.median(a / b for a, b in zip(own, times["the model's forwards alone"], strict=True))
        for name, own in times.items()
    }
    rows = [
        {"arm": name, "processor seconds": statistics.median(own), "over the forwards": ratios[name]}
        for name, own in times.items()
    ]
    report(
        "canvas",
        rows,
        f"{weights / 1e6:.0f}M weights, {args.length} tokens, {args.steps} steps, medians of {args.repeats} by turns; "
        f"{torch.get_num_threads()} threads; load {os.getloadavg()[0]:.1f}.",
    )


if __name__ == "__main__":
    main()
