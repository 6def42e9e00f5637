"""Any-subset speculative decoding beside the same network one token after the other: time a text, and forwards.

The network is the one that ships (sudokus, 124,000 weights): drafts of a trained network are refused as often as they
deserve, those of a random one never are. Arms run by turns, one row at a time; the figure is the median of the
processor's time, which other work on the machine changes less than the clock's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch

from common import report
from everytoken.decoding.canvas_trial import load_denoiser
from everytoken.generation.assd import AnySubsetSequential, AnySubsetSpeculative
from everytoken.training.datasets.sudoku import OPEN, puzzles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--texts", type=int, default=8)
    args = parser.parse_args()
    model = load_denoiser(None, AnySubsetSpeculative.weights)
    ids = puzzles(args.texts, 1, holes=(10, 10))
    open_ = ids == OPEN
    arms = {"one by one": AnySubsetSequential(check=False)}
    arms |= {f"ASSD, k={k}": AnySubsetSpeculative(k=k, check=False) for k in (2, 3, 5, 10)}
    times: dict[str, list[float]] = {name: [] for name in arms}
    forwards = dict.fromkeys(arms, 0)
    for repeat in range(args.repeats + 1):
        for name, sampler in arms.items():
            began = time.process_time()
            for row in range(args.texts):
                sampler(model, ids[row : row + 1], editable=open_[row : row + 1], seeds=[row + args.texts * repeat])
                forwards[name] += sampler.stats.target_forwards
            if repeat:  # the first one warms up
                times[name].append(time.process_time() - began)
    plain = times["one by one"]
    rows = [
        {
            "arm": name,
            "processor ms a text": 1e3 * statistics.median(own) / args.texts,
            "over one by one": statistics.median(a / b for a, b in zip(own, plain, strict=True)),
            "forwards a token": forwards[name] / int(open_.sum()) / (args.repeats + 1),
        }
        for name, own in times.items()
    ]
    report(
        "assd",
        rows,
        f"{args.texts} sudokus of ten open cells, medians of {args.repeats} by turns; {torch.get_num_threads()} "
        f"threads; load {os.getloadavg()[0]:.1f}.",
    )


if __name__ == "__main__":
    main()
