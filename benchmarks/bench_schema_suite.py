"""The official JSON-Schema-Test-Suite (draft 2020-12) on three engines: what each judges rightly, wrongly, or refuses.

    python benchmarks/bench_schema_suite.py FOLDER     (scripts/fetch_suite.py fetches it; `make bench` does)
    python benchmarks/bench_schema_suite.py --schemas FILE      (real schemas with labelled instances, see real_schemas)

An instance is judged by its text, ``json.dumps(..., ensure_ascii=False)``. *Refused* schemas raise an error; accepting
an invalid instance is the only silent mistake that matters for generation. Writes docs/assets/schema-suite.md, or
docs/assets/real-schemas.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import real_schemas
from common import report
from everytoken.constraints.engine.compiler import GrammarCompiler
from everytoken.constraints.engine.matcher import GrammarMatcher
from everytoken.constraints.engine.vocabulary import TokenizerInfo
from everytoken.constraints.grammar import Grammar, GrammarError
from real_schemas import Judge

INFO = TokenizerInfo([bytes([byte]) for byte in range(256)] + [None], [256])
ASSETS = Path(__file__).resolve().parents[1] / "docs" / "assets"
TABLE = ASSETS / "schema-suite.md"


def ours(schema: object, order: str = "any") -> Judge:
    try:
        grammar = Grammar.from_json_schema(schema, strict_mode=False, property_order=order)
        compiled = GrammarCompiler(INFO, 0, 0.0).compile_grammar(grammar)
    except GrammarError as error:
        if "No text" in str(error):
            return lambda _text: (False, [])
        raise
    row = np.zeros((1, INFO.words), np.int32)

    def judge(text: bytes) -> tuple[bool, list[float]]:
        matcher = GrammarMatcher(compiled)
        return followed(text, lambda: matcher.fill_next_token_bitmask(row), matcher.accept_token, matcher.can_end)

    return judge


def ours_in_order(schema: object) -> Judge:
    return ours(schema, "schema")


def ours_flexible(schema: object) -> Judge:
    return ours(schema, "flexible")


def ours_required_first(schema: object) -> Judge:
    return ours(schema, "required_first")


def followed(
    text: bytes, fill: Callable[[], object], accept: Callable[[int], bool], can_end: Callable[[], bool]
) -> tuple[bool, list[float]]:
    """Byte by byte, a mask before each."""
    times = []
    for byte in text:
        began = time.perf_counter()
        fill()
        times.append(time.perf_counter() - began)
        if not accept(byte):
            return False, times
    return can_end(), times


def xgrammar(schema: object, any_order: bool = True) -> Judge:
    import xgrammar as xgr

    info = xgr.TokenizerInfo(
        [bytes([byte]) for byte in range(256)] + [b""], xgr.VocabType.RAW, vocab_size=257, stop_token_ids=[256]
    )
    compiled = xgr.GrammarCompiler(info).compile_json_schema(json.dumps(schema), strict_mode=False, any_order=any_order)
    row = xgr.allocate_token_bitmask(1, 257)

    def judge(text: bytes) -> tuple[bool, list[float]]:
        matcher = xgr.GrammarMatcher(compiled)
        return followed(
            text, lambda: matcher.fill_next_token_bitmask(row), matcher.accept_token, lambda: matcher.accept_token(256)
        )

    return judge


def xgrammar_in_order(schema: object) -> Judge:
    return xgrammar(schema, False)


def llguidance(schema: object) -> Judge:
    import llguidance as llg
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

    class Shim:
        eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
        tokens = [bytes([byte]) for byte in range(256)] + [b"<eos>"]

        def __call__(self, text: bytes | str) -> list[int]:
            return list(text.encode() if isinstance(text, str) else text)

    tokenizer = llguidance.__dict__.setdefault("tokenizer", llg.LLTokenizer(llg.TokenizerWrapper(Shim())))
    grammar = llg.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": True})
    first = llg.LLMatcher(tokenizer, grammar, log_level=0)
    if first.is_error():
        raise ValueError(first.get_error())
    row = allocate_token_bitmask(1, tokenizer.vocab_size)

    def judge(text: bytes) -> tuple[bool, list[float]]:
        matcher = first.deep_copy()
        return followed(
            text, lambda: fill_next_token_bitmask(matcher, row), matcher.consume_token, matcher.is_accepting
        )

    return judge


def main(folder: Path) -> None:
    engines = {"everytoken": ours} | {
        name: build for name, build in (("xgrammar", xgrammar), ("llguidance", llguidance)) if find_spec(name)
    }
    files = [
        path
        for path in sorted(folder.glob("*.json"))
        if path.stem not in ("refRemote", "dynamicRef", "vocabulary", "format")
    ]
    rows: list[dict[str, Any]] = []
    totals: dict[str, Counter[str]] = {name: Counter() for name in engines}
    for path in files:
        counts: dict[str, Counter[str]] = {name: Counter() for name in engines}
        for case in json.loads(path.read_text(encoding="utf-8")):
            for name, build in engines.items():
                try:
                    judge = build(case["schema"])
                except Exception:
                    counts[name]["refused"] += len(case["tests"])
                    continue
                for test in case["tests"]:
                    try:
                        text = json.dumps(test["data"], ensure_ascii=False).encode()
                    except UnicodeEncodeError:
                        text = json.dumps(test["data"]).encode()
                    found = judge(text)[0]
                    right = found == test["valid"]
                    counts[name]["right" if right else "accepts invalid" if found else "rejects valid"] += 1
        for name in engines:
            totals[name] += counts[name]
        rows.append({"keyword": path.stem} | {name: shown(counts[name]) for name in engines})
    rows.append({"keyword": "**all**"} | {name: shown(totals[name]) for name in engines})
    lines = ["| keyword | " + " | ".join(engines) + " |", "| --- |" + " --- |" * len(engines)]
    lines += ["| " + " | ".join(str(row[head]) for head in ("keyword", *engines)) + " |" for row in rows]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    report(
        "schema_suite",
        rows,
        "right / accepts invalid / rejects valid / refused; remote references, $dynamicRef and vocabularies left out.",
    )


def shown(counts: Counter[str]) -> str:
    return " / ".join(str(counts[key]) for key in ("right", "accepts invalid", "rejects valid", "refused"))


def real(path: Path, limit: float, show: int, only: list[str], write: bool) -> None:
    engines = {
        "everytoken": ours_in_order,
        "everytoken, required first": ours_required_first,
        "everytoken, flexible order": ours_flexible,
        "everytoken, any order": ours,
        "xgrammar": xgrammar_in_order,
        "xgrammar, any order": xgrammar,
        "llguidance": llguidance,
    }
    chosen = {
        name: build
        for name, build in engines.items()
        if (name.startswith("everytoken") or find_spec(name.split(",")[0])) and (not only or name in only)
    }
    ours({"type": "string"})(b'"a"')  # compiles the kernels
    cases = real_schemas.read(path)
    rows = real_schemas.compare(chosen, cases, limit, show)
    if write or not only:
        (ASSETS / "real-schemas.md").write_text(real_schemas.table(rows), encoding="utf-8")
    report("real_schemas", rows, f"{len(cases)} schemas; byte vocabulary; at most {limit:g} s a schema.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(sys.prefix) / "json-schema-test-suite")
    parser.add_argument("--schemas", type=Path, help="a file of real schemas instead of the official suite")
    parser.add_argument("--limit", type=float, default=15.0, help="seconds for one schema and its instances")
    parser.add_argument("--show", type=int, default=40, help="reasons of refusal to list; 0 lists no mistakes either")
    parser.add_argument("--only", nargs="*", default=[], help="names of engines")
    parser.add_argument("--write", action="store_true", help="write the documentation's table for --only as well")
    args = parser.parse_args()
    if args.schemas:
        real(args.schemas, args.limit, args.show, args.only, args.write)
    else:
        main(args.folder)
