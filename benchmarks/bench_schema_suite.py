"""The official JSON-Schema-Test-Suite (draft 2020-12) on three engines: what each judges rightly, wrongly, or refuses.

    python benchmarks/bench_schema_suite.py FOLDER     (scripts/fetch_suite.py fetches it; `make bench` does)

An instance is judged by its text, ``json.dumps(..., ensure_ascii=False)``. *Refused* schemas raise an error; accepting
an invalid instance is the only silent mistake that matters for generation. Writes docs/assets/schema-suite.md.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import report
from everytoken.constraints.engine.compiler import GrammarCompiler
from everytoken.constraints.engine.matcher import GrammarMatcher
from everytoken.constraints.engine.vocabulary import TokenizerInfo
from everytoken.constraints.grammar import Grammar, GrammarError

INFO = TokenizerInfo([bytes([byte]) for byte in range(256)] + [None], [256])
TABLE = Path(__file__).resolve().parents[1] / "docs" / "assets" / "schema-suite.md"


def ours(schema: Any) -> Any:
    try:
        grammar = Grammar.from_json_schema(schema, strict_mode=False, property_order="any")
        compiled = GrammarCompiler(INFO, 0, 0.0).compile_grammar(grammar)
    except GrammarError as error:
        if "No text" in str(error):
            return lambda _text: False
        raise

    def judge(text: bytes) -> bool:
        matcher = GrammarMatcher(compiled)
        return matcher.accept_string(text) and matcher.can_end()

    return judge


def xgrammar(schema: Any) -> Any:
    import xgrammar as xgr

    info = xgr.TokenizerInfo(
        [bytes([byte]) for byte in range(256)] + [b""], xgr.VocabType.RAW, vocab_size=257, stop_token_ids=[256]
    )
    compiled = xgr.GrammarCompiler(info).compile_json_schema(json.dumps(schema), strict_mode=False, any_order=True)

    def judge(text: bytes) -> bool:
        matcher = xgr.GrammarMatcher(compiled)
        return all(matcher.accept_token(byte) for byte in text) and matcher.accept_token(256)

    return judge


def llguidance(schema: Any) -> Any:
    import llguidance as llg

    class Shim:
        eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
        tokens = [bytes([byte]) for byte in range(256)] + [b"<eos>"]

        def __call__(self, text: bytes | str) -> list[int]:
            return list(text.encode() if isinstance(text, str) else text)

    tokenizer = llguidance.__dict__.setdefault("tokenizer", llg.LLTokenizer(llg.TokenizerWrapper(Shim())))
    grammar = llg.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": True})
    first = llg.LLMatcher(tokenizer, grammar)
    if first.is_error():
        raise ValueError(first.get_error())

    def judge(text: bytes) -> bool:
        matcher = first.deep_copy()
        return all(matcher.consume_token(byte) for byte in text) and matcher.is_accepting()

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
                    found = judge(text)
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


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(sys.prefix) / "json-schema-test-suite")
