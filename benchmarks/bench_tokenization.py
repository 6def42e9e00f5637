"""StochasTok: tokens per second on one core, against the algorithm written literally with list insertions."""

from __future__ import annotations

import random

from common import report, seconds
from everytoken.core.loading import load_tokenizer
from everytoken.reproduce.stochastok import prose
from everytoken.tokenization.stochastok import StochasTok


def literal(ids: list[int], stochastok: StochasTok, rng: random.Random) -> list[int]:
    ids = list(ids)
    for _ in range(int(stochastok.expand_prop * len(ids))):
        position = rng.randrange(len(ids))
        pairs = stochastok.table.pairs(ids[position])
        if pairs:
            ids[position : position + 1] = rng.choice(pairs)
    return ids


if __name__ == "__main__":
    tokenizer = load_tokenizer()
    ids = tokenizer(prose()[:600_000])["input_ids"]
    stochastok, rng = StochasTok(tokenizer), random.Random(0)
    build = seconds(lambda: StochasTok(tokenizer), repeats=3)
    rows = []
    for length in (256, 2048, len(ids)):
        chunks = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        ours = seconds(lambda chunks=chunks: [stochastok.expand(chunk) for chunk in chunks])
        arrays = [__import__("numpy").array(chunk) for chunk in chunks]
        fast = seconds(lambda arrays=arrays: [stochastok.expand(chunk) for chunk in arrays])
        some = chunks[: max(1, 20_000 // length)]
        naive = (
            seconds(lambda some=some: [literal(chunk, stochastok, rng) for chunk in some], repeats=3)
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
