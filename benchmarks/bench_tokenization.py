"""The tokenization station against its peers: StochasTok's literal form, counting anew for dynamic merges, genlm-bytes
for exact bytes.

    python benchmarks/bench_tokenization.py [stochastok] [merges] [bytes]

genlm-bytes is measured where it is installed: ``pip install --no-deps genlm-bytes genlm-backend arsenal`` and
``pip install ipython``.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import time
from collections import Counter
from importlib.util import find_spec

import numpy as np

from common import report, seconds
from everytoken.core.loading import load_model, load_tokenizer
from everytoken.reproduce.beds.texts import declarations
from everytoken.reproduce.stochastok import prose
from everytoken.tokenization.byte_lm import ByteLM
from everytoken.tokenization.dynamic_tokenization import DynamicTokenizer
from everytoken.tokenization.merging import PairMerger
from everytoken.tokenization.stochastok import StochasTok


def literal(ids: list[int], stochastok: StochasTok, rng: random.Random) -> list[int]:
    ids = list(ids)
    for _ in range(int(stochastok.expand_prop * len(ids))):
        position = rng.randrange(len(ids))
        pairs = stochastok.table.pairs(ids[position])
        if pairs:
            ids[position : position + 1] = rng.choice(pairs)
    return ids


def stochastok() -> None:
    tokenizer = load_tokenizer()
    ids = tokenizer(prose()[:600_000])["input_ids"]
    splitter, rng = StochasTok(tokenizer), random.Random(0)
    build = seconds(lambda: StochasTok(tokenizer), repeats=3)
    rows = []
    for length in (256, 2048, len(ids)):
        chunks = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        ours = seconds(lambda chunks=chunks: [splitter.expand(chunk) for chunk in chunks])
        arrays = [np.array(chunk) for chunk in chunks]
        fast = seconds(lambda arrays=arrays: [splitter.expand(chunk) for chunk in arrays])
        some = chunks[: max(1, 20_000 // length)]
        naive = (
            seconds(lambda some=some: [literal(chunk, splitter, rng) for chunk in some], repeats=3)
            if length <= 2048
            else float("nan")
        )
        total, part = sum(map(len, chunks)), sum(map(len, some))
        rows.append(
            {
                "length": length,
                "million tokens/s, lists": total / ours / 1e6,
                "million tokens/s, arrays": total / fast / 1e6,
                "literal form, million tokens/s": part / naive / 1e6,
                "ratio to literal": (total / ours) / (part / naive),
            }
        )
    report(
        "tokenization",
        rows,
        f"expand_prop 0.1, one thread; goal 2 million tokens/s. Split table of 49,152 tokens: {build:.2f} s.",
    )


def counting_anew(rows: list[list[int]], dynamic: DynamicTokenizer, merges: int) -> list[list[bytes]]:
    """The official algorithm: all pairs counted for every merge (validity remembered, as there)."""
    table = dynamic._bytes
    texts = [[table[item] for item in row] for row in rows]
    for _ in range(merges):
        counts: Counter = Counter()
        for row in texts:
            counts.update(pair for pair in itertools.pairwise(row) if dynamic.valid(*pair))
        if not counts:
            break
        left, right = max(counts, key=counts.get)
        for number, row in enumerate(texts):
            new, place = [], 0
            while place < len(row):
                if place + 1 < len(row) and row[place] == left and row[place + 1] == right:
                    new.append(left + right)
                    place += 2
                else:
                    new.append(row[place])
                    place += 1
            texts[number] = new
    return texts


def merges() -> None:
    tokenizer = load_tokenizer()
    lines = [line for text in declarations().values() for line in text.split("\n") if len(line) > 80]
    random.Random(0).shuffle(lines)
    rows = []
    for size, count in ((8, 200), (32, 1000), (128, 1000)):
        batch = [ids[:128] for ids in tokenizer(lines[:size], add_special_tokens=False)["input_ids"]]
        dynamic = DynamicTokenizer(tokenizer, merges=count)
        result = dynamic(batch)
        naive = counting_anew(batch, dynamic, count)
        assert [dynamic.spell(result, n) for n in range(size)] == naive, "the two disagree"
        ours = seconds(lambda batch=batch, dynamic=dynamic: dynamic._run(batch, dynamic.merges))
        theirs = seconds(
            lambda batch=batch, dynamic=dynamic, count=count: counting_anew(batch, dynamic, count), repeats=3
        )
        rows.append(
            {
                "texts": size,
                "tokens": sum(map(len, batch)),
                "merges": result.merges,
                "milliseconds": ours * 1e3,
                "counting anew, milliseconds": theirs * 1e3,
                "ratio": theirs / ours,
            }
        )
    ids = tokenizer(prose()[:1_000_000], add_special_tokens=False)["input_ids"]
    whole = seconds(lambda: PairMerger([ids]), repeats=3)
    report(
        "dynamic_merges",
        rows,
        f"Lines of declarations in 24 languages, at most 128 tokens each; both give the same tokens. Pairs of "
        f"{len(ids):,} tokens set up "
        f"in {whole:.2f} s.",
    )


async def genlm(model, tokenizer, texts: list[bytes]) -> tuple[list[list[np.ndarray]], float]:
    """Next-byte log-probabilities along texts by genlm-bytes' beam."""
    from genlm.backend.llm import AsyncTransformer
    from genlm.bytes import BeamParams, ByteBeamState

    llm = AsyncTransformer(model, tokenizer)
    found, total = [], 0.0
    for text in texts:
        began = time.perf_counter()
        beam = await ByteBeamState.initial(llm, BeamParams(K=5, prune_threshold=0.0))
        rows = []
        for byte in text:
            rows.append(np.array((await beam.logp_next()).ps)[:257])
            beam = await (beam.prune() << byte)
        found.append(rows)
        total += time.perf_counter() - began
        await beam.cleanup()
    return found, total


def exact_bytes() -> None:
    tokenizer, model = load_tokenizer(), load_model(packed=True)
    rng = np.random.default_rng(0)
    prosa = prose()[-300_000:]
    texts = []
    while len(texts) < 4:
        piece = prosa[(start := int(rng.integers(0, len(prosa) - 200))) : start + 60]
        if piece.isascii() and "\n" not in piece:
            texts.append(piece.encode())
    rows, lm = [], ByteLM(model, tokenizer)
    began, curves = time.perf_counter(), []
    for text in texts:
        curves.append([lm.next_byte_logprobs(text[:place]) for place in range(len(text))])
    took, size = time.perf_counter() - began, sum(map(len, texts))
    bits = -np.mean(
        [row[byte] for text, curve in zip(texts, curves, strict=True) for byte, row in zip(text, curve, strict=True)]
    )
    rows.append({"what": "ByteLM", "bytes per second": size / took, "forwards a byte": lm.forwards / size,
                 "bits a byte": bits / np.log(2)})  # fmt: skip
    began, naive, forwards = time.perf_counter(), [], 0
    for text in texts:  # the definition: everything anew for every prefix
        for place in range(0, len(text), 6):
            fresh = ByteLM(model, tokenizer)
            naive.append(fresh.next_byte_logprobs(text[:place])[text[place]])
            forwards += fresh.forwards
    took = time.perf_counter() - began
    rows.append(
        {
            "what": "without a cache between bytes",
            "bytes per second": len(naive) / took,
            "forwards a byte": forwards / len(naive),
        }
    )
    began, before = time.perf_counter(), lm.forwards
    out = lm.generate(texts[0], 48, unit="token")
    took, tokens = time.perf_counter() - began, len(tokenizer(out.decode("utf-8", "replace"))["input_ids"])
    rows.append({"what": "ByteLM, token by token behind the "
                         "prompt", "bytes per second": len(out) / took,
                          "forwards a byte": (lm.forwards - before) / len(out),
                          "forwards a token": (lm.forwards - before) / max(1, tokens)})  # fmt: skip
    if find_spec("genlm") is not None:
        theirs, took = asyncio.run(genlm(model, tokenizer, texts))
        wanted = [
            row[byte] for text, curve in zip(texts, theirs, strict=True) for byte, row in zip(text, curve, strict=True)
        ]
        apart = [
            0.5 * np.abs(np.exp(a[:256]) - np.exp(b[:256])).sum()
            for one, two in zip(curves, theirs, strict=True)
            for a, b in zip(one, two, strict=True)
        ]
        rows.append({"what": "genlm-bytes, beam of 5", "bytes per second": size / took,
                     "bits a byte": -np.mean(wanted) / np.log(2),
                     "total variation to ByteLM": float(np.mean(apart))})  # fmt: skip
    report(
        "exact_bytes",
        rows,
        f"Next-byte distributions along {len(texts)} texts of {len(texts[0])} bytes of English prose.",
    )


if __name__ == "__main__":
    parts = {"stochastok": stochastok, "merges": merges, "bytes": exact_bytes}
    for name in sys.argv[1:] or parts:
        parts[name]()
