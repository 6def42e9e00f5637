"""DySpec against its peers: plain generate, transformers' assisted generation with the same draft, prompt lookup.

Ten varied prompts, 128 new tokens, greedy; every arm on every prompt, the whole repeated, medians over repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from common import report
from everytoken.core.loading import load_model, load_tokenizer
from everytoken.generation.drafts import load_draft
from everytoken.generation.dyspec import DySpec
from everytoken.generation.trial import encode_prompt
from everytoken.reproduce.dyspec import PROMPTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    rows = []
    for dtype in args.dtypes:
        tokenizer = load_tokenizer()
        model, untouched = load_model(dtype=dtype, packed=True), load_model(dtype=dtype)
        draft, follower = load_draft(model), load_draft(model)
        work = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS[: args.prompts]]
        arms = {
            "plain generate": dict,
            "plain generate, linears not packed": dict,
            "assisted generation, same draft": lambda: {"assistant_model": follower.attach(model, follow=True)},
            "prompt lookup": lambda: {"prompt_lookup_num_tokens": 8},
            "DySpec (default: threshold)": lambda: {"custom_generate": DySpec(draft)},
            "DySpec, fixed size 8": lambda: {"custom_generate": DySpec(draft, budget=8, threshold=None)},
            "DySpec, chain": lambda: {"custom_generate": DySpec(draft, max_children=1)},
        }
        speeds: dict[str, list[float]] = {name: [] for name in arms}
        accepted: dict[str, float] = {}
        texts: dict[str, list] = {}
        model.generate(**work[0], max_new_tokens=8, do_sample=False)
        for _ in range(args.repeats):
            for name, build in arms.items():
                tokens, spent, taken, rounds = 0, 0.0, 0, 0
                texts[name] = []
                for inputs in work:
                    extra = build()
                    began = time.perf_counter()
                    target = untouched if "not packed" in name else model
                    output = target.generate(**inputs, max_new_tokens=args.tokens, do_sample=False, **extra)
                    spent += time.perf_counter() - began
                    follower.detach_target()
                    new = output[0, inputs["input_ids"].shape[1] :].tolist()
                    tokens += len(new)
                    texts[name].append(new)
                    if decoder := extra.get("custom_generate"):
                        taken, rounds = taken + decoder.stats.accepted, rounds + decoder.stats.rounds
                speeds[name].append(tokens / spent)
                if rounds:
                    accepted[name] = taken / rounds
        plain = statistics.median(speeds["plain generate"])
        for name, values in speeds.items():
            same = sum(a == b for a, b in zip(texts[name], texts["plain generate"], strict=True))
            rows.append(
                {
                    "dtype": dtype,
                    "arm": name,
                    "tokens/s": statistics.median(values),
                    "ratio to plain": statistics.median(values) / plain,
                    "accepted a round": accepted.get(name, float("nan")),
                    "same text": f"{same}/{len(work)}",
                }
            )
    report(
        "generation",
        rows,
        f"{args.prompts} prompts, {args.tokens} new tokens, greedy, medians of {args.repeats}; {torch.get_num_threads()} threads. "
        "In bfloat16 rounding depends on how many tokens share a forward, so texts may part ways where two tokens tie.",
    )


if __name__ == "__main__":
    main()
