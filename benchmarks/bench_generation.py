"""The decoders of the station and their peers on the same prompts: one table, medians over repeats, every arm by turns.

Peers: transformers' plain generate (with its linear layers packed for the CPU, and as it comes), assisted generation
with the same draft, prompt lookup, beam search, and llama-cpp-python on the same GGUF file where it is installed. It
reads 4-bit weights, as do the arms that say so; all others are float32. SkipDecode runs a model that was not tuned for
it and R2R routes by entropy: their speed is measured here, not their text.
"""

from __future__ import annotations

import argparse
import statistics
import time
from importlib.util import find_spec

import torch

from common import report
from everytoken.core.loading import embedded_gguf, load_model, load_tokenizer
from everytoken.core.scoring import encode_prompt
from everytoken.decoding.plain import PlainDecoding
from everytoken.generation.dyspec import DySpec
from everytoken.generation.qstar_beam import QStarBeam
from everytoken.generation.r2r import R2R
from everytoken.generation.skipdecode import SkipDecode
from everytoken.generation.speculative import load_draft
from everytoken.generation.tokenselect import TokenSelect
from everytoken.reproduce.dyspec import PROMPTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--router", help="a folder written by `everytoken train r2r`; adds an arm")
    args = parser.parse_args()
    rows = []
    for dtype in args.dtypes:
        tokenizer = load_tokenizer()
        model, untouched = load_model(dtype=dtype, packed=True), load_model(dtype=dtype)
        draft, follower = load_draft(model), load_draft(model)
        small = load_model(weights="int4")  # the GGUF's own 4 bits, and a compiled forward
        small_draft = load_draft(small)
        work = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS[: args.prompts]]
        llama = None
        if find_spec("llama_cpp") is not None:
            from llama_cpp import Llama

            llama = Llama(str(embedded_gguf()), n_ctx=1024, n_threads=torch.get_num_threads(), verbose=False)
        arms = {
            "plain generate": dict,
            "plain generate, linears not packed": dict,
            "plain, compiled, 4 bits": lambda: {"custom_generate": PlainDecoding()},
            "DySpec, 4 bits": lambda: {"custom_generate": DySpec(small_draft)},
            "assisted generation, same draft": lambda: {"assistant_model": follower.attach(model, follow=True)},
            "prompt lookup": lambda: {"prompt_lookup_num_tokens": 8},
            "DySpec (default: threshold)": lambda: {"custom_generate": DySpec(draft)},
            "DySpec, fixed size 8": lambda: {"custom_generate": DySpec(draft, budget=8, threshold=None)},
            "SkipDecode at 2x": lambda: {"custom_generate": SkipDecode(speedup=2.0)},
            "TokenSelect (short prompts)": lambda: {"custom_generate": TokenSelect()},
            "R2R, entropy from 3.0 nats": lambda: {"custom_generate": R2R(draft, "entropy", 3.0)},
            "beam search, 4": lambda: {"num_beams": 4},
            "beam over Q*, 4": lambda: {"custom_generate": QStarBeam(4)},
        }
        if args.router:
            arms["R2R, trained router"] = lambda: {"custom_generate": R2R(draft, args.router)}
        if llama is not None:
            arms["llama.cpp, the same GGUF"] = dict
        speeds: dict[str, list[float]] = {name: [] for name in arms}
        extras: dict[str, str] = {}
        texts: dict[str, list] = {}
        model.generate(**work[0], max_new_tokens=8, do_sample=False)
        for turn in range(args.repeats + 1):  # the first turn warms everything up
            for name, build in arms.items():
                tokens, spent, notes = 0, 0.0, []
                texts[name] = []
                for inputs in work:
                    extra = build()
                    length = inputs["input_ids"].shape[1]
                    began = time.perf_counter()
                    if name.startswith("llama.cpp"):
                        llama.reset()
                        new = []
                        for token in llama.generate(inputs["input_ids"][0].tolist(), temp=0.0):
                            new.append(token)
                            if token == llama.token_eos() or len(new) == args.tokens:
                                break
                    else:
                        target = untouched if "not packed" in name else small if "4 bits" in name else model
                        output = target.generate(**inputs, max_new_tokens=args.tokens, do_sample=False, **extra)
                        new = output[0, length:].tolist()
                    spent += time.perf_counter() - began
                    follower.detach_target()
                    tokens += len(new)
                    texts[name].append(new)
                    decoder = extra.get("custom_generate")
                    if isinstance(decoder, DySpec):
                        notes.append(decoder.stats.mean_accepted)
                    elif isinstance(decoder, R2R):
                        notes.append(decoder.large_share)
                    elif isinstance(decoder, SkipDecode):
                        notes.append(statistics.mean(decoder.layers_run))
                if turn:
                    speeds[name].append(tokens / spent)
                if notes:
                    kind = (
                        "accepted a round" if "DySpec" in name else "large model's share" if "R2R" in name else "layers"
                    )
                    extras[name] = f"{kind} {statistics.mean(notes):.2f}"
        plain = statistics.median(speeds["plain generate"])
        for name, values in speeds.items():
            same = sum(a == b for a, b in zip(texts[name], texts["plain generate"], strict=True))
            rows.append(
                {
                    "dtype": "4 bits" if name.startswith("llama.cpp") or "4 bits" in name else dtype,
                    "arm": name,
                    "tokens/s": statistics.median(values),
                    "ratio to plain": statistics.median(values) / plain,
                    "same text": f"{same}/{len(work)}",
                    "note": extras.get(name, ""),
                }
            )
    report(
        "generation",
        rows,
        f"{args.prompts} prompts, {args.tokens} new tokens, greedy, medians of {args.repeats}; "
        f"{torch.get_num_threads()} threads. "
        "In bfloat16 rounding depends on how many tokens share a forward, so texts may part ways where two tokens tie.",
    )


if __name__ == "__main__":
    main()
