"""The decoders of the station and their peers on the same prompts: every arm by turns on every prompt, medians.

Peers: transformers' plain generate (with its weights as they come, and packed for the CPU), assisted generation with
the same draft, prompt lookup, beam search, and llama-cpp-python on the same GGUF file where it is installed. It reads
4-bit weights, as do the arms that say so; all others are in the dtype that is named. SkipDecode runs a model that was
not tuned for it and R2R routes by entropy: their speed is measured here, not their text.

A prompt's figure is the median of its repeats, an arm's the median of its prompts, and a ratio the median of the
prompts' own ratios. The baseline is the fastest plain arm of ours; which way of running the weights was measured to be
the fastest stands below the table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import torch

from common import report
from everytoken.core.choosing import choose_weights
from everytoken.core.converted import gguf_of
from everytoken.core.loading import load_model, load_tokenizer
from everytoken.core.scoring import encode_prompt
from everytoken.decoding.llama_cpp import LlamaCpp, runs_beside
from everytoken.decoding.plain import PlainDecoding
from everytoken.generation.dyspec import DySpec
from everytoken.generation.qstar_beam import QStarBeam
from everytoken.generation.r2r import R2R
from everytoken.generation.skipdecode import SkipDecode
from everytoken.generation.speculative import load_draft
from everytoken.generation.tokenselect import TokenSelect
from everytoken.reproduce.dyspec import PROMPTS

PLAIN = ("plain generate", "plain generate, packed", "plain, lean loop", "plain, compiled, 4 bits")
LLAMA = "llama.cpp, the same GGUF"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--arms", nargs="+", default=[], help="only arms whose name has one of these words")
    parser.add_argument("--router", help="a folder written by `everytoken train r2r`; adds an arm")
    args = parser.parse_args()
    rows, choice = [], choose_weights()
    work = [encode_prompt(load_tokenizer(), prompt) for prompt in PROMPTS[: args.prompts]]
    for dtype in args.dtypes:
        rows += measure(args, dtype, work)
    report(
        "generation",
        rows,
        f"{len(work)} prompts, {args.tokens} new tokens, greedy, medians of {args.repeats} by turns; "
        f"{torch.get_num_threads()} threads; load before and after: {LOAD:.1f}, {load():.1f}. Fastest way of running "
        f"the weights here: {choice}. In bfloat16 rounding depends on how many tokens share a forward, so texts may "
        "part ways where two tokens tie.",
    )


def load() -> float:
    """Processes that want to run, over the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


LOAD = load()


def measure(args: argparse.Namespace, dtype: str, work: list[Any]) -> list[dict[str, Any]]:
    """A row an arm."""
    untouched, packed = load_model(dtype=dtype), load_model(dtype=dtype, packed=True)
    small = load_model(weights="int4")  # the GGUF's own 4 bits, and a compiled forward
    for model in (untouched, packed, small):
        model.forward_cost = None
    small.forward_cost = choose_weights(weights="int4").curve
    draft, follower, small_draft = load_draft(packed), load_draft(packed), load_draft(small)
    engine = None
    if runs_beside("auto", None):
        longest = max(inputs["input_ids"].shape[1] for inputs in work)
        engine = LlamaCpp(gguf_of(None), longest + args.tokens + 8, torch.get_num_threads())

    arms: dict[str, tuple[Any, Any]] = {
        "plain generate": (untouched, dict),
        "plain generate, packed": (packed, dict),
        "plain, lean loop": (packed, lambda: {"custom_generate": PlainDecoding()}),
        "plain, compiled, 4 bits": (small, lambda: {"custom_generate": PlainDecoding()}),
        "DySpec, 4 bits": (small, lambda: {"custom_generate": DySpec(small_draft)}),
        "assisted generation, same draft": (packed, lambda: {"assistant_model": follower.attach(packed, follow=True)}),
        "prompt lookup": (packed, lambda: {"prompt_lookup_num_tokens": 8}),
        "DySpec (default: threshold)": (packed, lambda: {"custom_generate": DySpec(draft)}),
        "DySpec, fixed size 8": (packed, lambda: {"custom_generate": DySpec(draft, budget=8, threshold=None)}),
        "SkipDecode at 2x": (packed, lambda: {"custom_generate": SkipDecode(speedup=2.0)}),
        "TokenSelect (short prompts)": (packed, lambda: {"custom_generate": TokenSelect()}),
        "R2R, entropy from 3.0 nats": (packed, lambda: {"custom_generate": R2R(draft, "entropy", 3.0)}),
        "beam search, 4": (packed, lambda: {"num_beams": 4}),
        "beam over Q*, 4": (packed, lambda: {"custom_generate": QStarBeam(4)}),
    }
    if args.router:
        arms["R2R, trained router"] = (packed, lambda: {"custom_generate": R2R(draft, args.router)})
    if engine is not None:
        arms[LLAMA] = (None, dict)
    if args.arms:  # one of them must be plain
        arms = {name: arm for name, arm in arms.items() if any(word in name for word in args.arms)}

    speeds: dict[str, list[list[float]]] = {name: [[] for _ in work] for name in arms}
    texts: dict[str, dict[int, list[int]]] = {name: {} for name in arms}
    notes: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(args.repeats + 1):  # the first turn warms everything up
        for place, inputs in enumerate(work[: None if turn else 1]):
            for name, (model, build) in arms.items():
                new, seconds, note = run(model, build(), inputs, args.tokens, engine)
                follower.detach_target()
                if turn:
                    speeds[name][place].append(len(new) / seconds)
                    texts[name][place] = new
                    notes[name] += [] if note is None else [note]
    return table(
        dtype, {name: [statistics.median(item) for item in each] for name, each in speeds.items()}, texts, notes
    )


def run(
    model: Any, extra: dict[str, Any], inputs: Any, tokens: int, engine: LlamaCpp | None
) -> tuple[list[int], float, float | None]:
    """One prompt by one arm: new tokens, seconds, and what its decoder counted."""
    prompt = inputs["input_ids"][0].tolist()
    if model is None:
        assert engine is not None
        return *engine.decode(prompt, tokens), None
    began = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **extra)
    seconds = time.perf_counter() - began
    decoder, note = extra.get("custom_generate"), None
    if isinstance(decoder, DySpec):
        note = decoder.stats.mean_accepted
    elif isinstance(decoder, R2R):
        note = decoder.large_share
    elif isinstance(decoder, SkipDecode):
        note = statistics.mean(decoder.layers_run)
    return output[0, len(prompt) :].tolist(), seconds, note


def table(
    dtype: str, speeds: dict[str, list[float]], texts: dict[str, dict[int, list[int]]], notes: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """Rows with each arm's median, and its ratios prompt by prompt."""
    fastest = max((name for name in PLAIN if name in speeds), key=lambda name: statistics.median(speeds[name]))

    def against(name: str, other: str) -> float | str:
        if other not in speeds:
            return ""
        return statistics.median(a / b for a, b in zip(speeds[name], speeds[other], strict=True))

    rows = []
    for name, values in speeds.items():
        same = sum(texts[name][place] == text for place, text in texts[fastest].items())
        kind = "accepted a round" if "DySpec" in name else "large model's share" if "R2R" in name else "layers"
        rows.append(
            {
                "dtype": "4 bits" if name == LLAMA or "4 bits" in name else dtype,
                "arm": name,
                "tokens/s": statistics.median(values),
                "to the fastest plain": against(name, fastest),
                "to plain generate": against(name, "plain generate"),
                "to llama.cpp": against(name, LLAMA),
                "worst prompt": min(a / b for a, b in zip(values, speeds[fastest], strict=True)),
                "same text": f"{same}/{len(values)}",
                "note": f"{kind} {statistics.mean(notes[name]):.2f}" if notes[name] else "baseline" * (name == fastest),
            }
        )
    return rows


if __name__ == "__main__":
    main()
