"""Masks at their first visit: what a place costs that nobody has met before, with nothing computed ahead.

Two vocabularies: the embedded model's (49,152 tokens), and 131,072 tokens, these and pairs of them. Every grammar is
compiled anew in each round with ``warm_seconds=0``. Times are the processor's own, and of each mask along the document
the smallest of the rounds counts. The case of 100,000 characters is looked at in a few places: at the string's start,
inside it, and near its end. Writes docs/assets/bench-first-masks.md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench_constraints import CASES, greedy_ids
from common import report
from everytoken.constraints.engine.compiler import GrammarCompiler
from everytoken.constraints.engine.matcher import GrammarMatcher
from everytoken.constraints.engine.vocabulary import TokenizerInfo
from everytoken.core.loading import load_tokenizer

TABLE = Path(__file__).resolve().parents[1] / "docs" / "assets" / "bench-first-masks.md"
LONG = 100_000
MANY = {"type": "object", "properties": {f"property_{n}": {"type": "integer"} for n in range(400)}}
HEADS = ("vocabulary", "grammar", "compile, ms", "masks", "median, us", "p90, ms", "p99, ms", "largest, ms")


def paired(info: TokenizerInfo, size: int) -> TokenizerInfo:
    """A larger vocabulary: pairs of an other one's tokens, at most 12 bytes long."""
    short = [token for token in info.vocabulary if token and len(token) <= 6]
    random = np.random.default_rng(0)
    known: dict[bytes | None, None] = dict.fromkeys(token for token in info.vocabulary if token)
    while len(known) < size - 1:
        first, second = random.integers(0, len(short), 2).tolist()
        known[short[first] + short[second]] = None
    return TokenizerInfo([*known, None], [size - 1])


def long_texts() -> list[bytes]:
    """Up to and including the place after which a mask is asked for."""
    return [b'"' + b"a" * size for size in (0, 10, 500, LONG // 2, LONG - 300, LONG - 3)]


def along(compiled: Any, info: TokenizerInfo, text: bytes) -> list[float]:
    """The seconds of every mask along a document."""
    matcher, row, times = GrammarMatcher(compiled), np.zeros((1, info.words), np.int32), []
    for token in greedy_ids(info, text):
        began = time.process_time()
        matcher.fill_next_token_bitmask(row)
        times.append(time.process_time() - began)
        assert matcher.accept_token(token)
    return times


def after(compiled: Any, info: TokenizerInfo, text: bytes) -> float:
    """The seconds of one mask behind a text."""
    matcher, row = GrammarMatcher(compiled), np.zeros((1, info.words), np.int32)
    assert matcher.accept_string(text)
    began = time.process_time()
    matcher.fill_next_token_bitmask(row)
    return time.process_time() - began


def measured(info: TokenizerInfo, schema: Any, documents: list[Any] | None, rounds: int) -> tuple[float, np.ndarray]:
    """The best compile time and the best time of every mask."""
    compiling, masks = [], []
    for _ in range(rounds):
        began = time.process_time()
        compiled = GrammarCompiler(info, cache_limit=0, warm_seconds=0.0).compile_json_schema(schema)
        compiling.append(time.process_time() - began)
        if documents is None:
            masks.append([after(compiled, info, text) for text in long_texts()])
        else:
            texts = [json.dumps(document, ensure_ascii=False).encode() for document in documents]
            masks.append([seconds for text in texts for seconds in along(compiled, info, text)])
    return min(compiling), np.array(masks).min(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    vocabularies = {"49k": TokenizerInfo.from_huggingface(load_tokenizer())}
    vocabularies["131k"] = paired(vocabularies["49k"], 1 << 17)
    cases: dict[str, tuple[Any, list[Any] | None]] = dict(CASES)
    cases["400 optional properties"] = (MANY, [{f"property_{n}": n for n in range(0, 400, 40)}])
    cases[f"maxLength {LONG:,}"] = ({"type": "string", "maxLength": LONG}, None)
    rows = []
    for size, info in vocabularies.items():
        measured(info, True, CASES["any JSON"][1], 1)  # kernels, and the vocabulary's trie
        for case, (schema, documents) in cases.items():
            compiling, masks = measured(info, schema, documents, args.rounds)
            rows.append(
                dict(zip(HEADS, (
                    size, case, 1e3 * compiling, len(masks), 1e6 * float(np.median(masks)),
                    *(1e3 * float(np.quantile(masks, share)) for share in (0.9, 0.99, 1.0)),
                ), strict=True))
            )  # fmt: skip
    lines = ["| " + " | ".join(HEADS) + " |", "| --- | --- |" + " ---: |" * (len(HEADS) - 2)]
    for row in rows:
        cells = [f"{row[head]:.3g}" if isinstance(row[head], float) else str(row[head]) for head in HEADS]
        lines.append("| " + " | ".join(cells) + " |")
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    report("first_masks", rows, f"{args.rounds} rounds, the best of each; nothing computed ahead.")


if __name__ == "__main__":
    main()
