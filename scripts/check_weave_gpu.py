"""Checks and measures TokenWeave on GPUs: exactness under NCCL, what cutting costs, and what two streams hide.

    python scripts/check_weave_gpu.py                                    # one GPU: a group of one rank
    torchrun --nproc-per-node 2 scripts/check_weave_gpu.py               # as many ranks as GPUs
    python scripts/check_weave_gpu.py --model HUB_ID --tokens 8192

One GPU has no link. There, a copy between two buffers stands in for it. So what is printed as overlap is that of a
copy, and not of a collective. Without a GPU the script says so and does nothing.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def milliseconds(function: Callable[[], Any], repeats: int = 20) -> float:
    """Median time of a function on the current stream, after three runs that do not count."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


@torch.no_grad()
def exactness(mesh: Any, model: Any, tokens: int) -> dict[str, float]:
    """Largest differences of logits, as a share of the largest, of several cuts; and milliseconds of each schedule."""
    from everytoken.distributed.token_weave import TokenWeave, weave

    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device="cuda", generator=seeded())
    wanted = model(input_ids=ids, use_cache=False, logits_to_keep=64).logits.float()
    woven, found = weave(model, mesh), {}
    for first in (1, tokens // 3, tokens // 2, tokens - 1):
        woven.settings = TokenWeave(first=first)
        ours = model(input_ids=ids, use_cache=False, logits_to_keep=64).logits.float()
        found[f"difference, cut after {first}"] = float((ours - wanted).abs().max() / wanted.abs().max())
    for schedule in ("plain", "fused", "woven"):
        woven.settings = TokenWeave(schedule, first=tokens // 2 if schedule == "woven" else None)
        found[f"ms, {schedule}"] = milliseconds(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1), 5)
    return found


def seeded() -> torch.Generator:
    """The same random numbers on every rank."""
    return torch.Generator("cuda").manual_seed(0)


@torch.no_grad()
def splitting(tokens: int, hidden: int, inner: int) -> dict[str, float]:
    """Milliseconds of an MLP's matrix products whole, in halves, and in other cuts."""
    rows = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, generator=seeded())
    up = torch.randn(hidden, 2 * inner, device="cuda", dtype=torch.bfloat16)
    down = torch.randn(inner, hidden, device="cuda", dtype=torch.bfloat16)

    def run(first: int) -> None:
        for part in (rows[:first], rows[first:]):
            if len(part):
                (part @ up)[:, :inner] @ down

    cuts = sorted({tokens, tokens // 2, tokens // 2 + 128, tokens // 2 + 256, tokens // 4})
    return {f"ms, MLP cut after {cut} of {tokens}": milliseconds(lambda cut=cut: run(cut)) for cut in cuts}  # type: ignore[misc]


@torch.no_grad()
def overlap(tokens: int, hidden: int, inner: int) -> dict[str, float]:
    """Milliseconds of an MLP and of a copy that stands in for a link, one after the other and on two lanes."""
    from everytoken.distributed.lanes import Lanes

    rows = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, generator=seeded())
    up = torch.randn(hidden, 2 * inner, device="cuda", dtype=torch.bfloat16)
    down = torch.randn(inner, hidden, device="cuda", dtype=torch.bfloat16)
    source = torch.empty(64 << 20, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    lanes = Lanes(torch.device("cuda"))

    def compute() -> torch.Tensor:
        return (rows @ up)[:, :inner] @ down

    def copy() -> torch.Tensor:
        return target.copy_(source, non_blocking=True)

    def both() -> None:
        copy()
        compute()

    return {
        "ms, MLP alone": milliseconds(compute),
        "ms, copy alone (stands in for a link)": milliseconds(copy),
        "ms, one after the other": milliseconds(both),
        "ms, on two lanes": milliseconds(lambda: lanes.stage(compute, copy)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as for load_model; default: the embedded model")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=8192, help="of the measured MLP")
    parser.add_argument("--inner", type=int, default=3584, help="of the measured MLP: a rank's share")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here: nothing was checked. `pytest tests/distributed` checks all that a CPU can.")
    from torch.distributed.device_mesh import init_device_mesh

    from everytoken.core.loading import load_model

    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29555")):
        os.environ.setdefault(name, value)
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=120))
    try:
        mesh = init_device_mesh("cuda", (world,))
        model = load_model(args.model, device="cuda", dtype="bfloat16")
        figures = exactness(mesh, model, args.tokens)
        figures |= splitting(args.tokens, args.hidden, args.inner) | overlap(args.tokens, args.hidden, args.inner)
        if rank == 0:
            print(f"{torch.cuda.get_device_name()}, {world} rank(s) under NCCL")
            for name, value in figures.items():
                print(f"{name:<44}{value:.4g}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
