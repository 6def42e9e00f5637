"""One layer's attention in a decoding step over a long cache: transformers' full attention, torch's kernel alone,
TokenSelect.

*Full* is what a step of transformers does on a CPU: append to the dynamic cache, then SDPA over everything. *Kernel* is
that SDPA alone. TokenSelect appends to its own cache, scores all keys (a bfloat16 copy, or float32), votes, selects,
and attends; *reused* is a step whose selection is taken from an earlier one (``tau``). By turns on one random cache;
medians.
"""

from __future__ import annotations

import argparse

import torch

from common import report
from everytoken.core.loading import load_model
from everytoken.reproduce.tokenselect import attention_times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8000, 16000, 32000, 64000])
    args = parser.parse_args()
    model = load_model()
    rows = []
    for length in args.lengths:
        spent = attention_times(model, length, args.repeats)
        rows.append(
            {"cached tokens": length}
            | {f"{name}, ms": 1e3 * value for name, value in spent.items()}
            | {
                "full / TokenSelect": spent["full"] / spent["TokenSelect"],
                "kernel / TokenSelect": spent["kernel"] / spent["TokenSelect"],
                "full / reused": spent["full"] / spent["reused"],
            }
        )
    report(
        "attention", rows, f"medians of {args.repeats} by turns; {torch.get_num_threads()} threads; 3 key heads of 64."
    )


if __name__ == "__main__":
    main()
