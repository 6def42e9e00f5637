"""A file of real schemas with labelled instances, on three engines: what compiles, what is refused and why, mistakes,
times.

Each line of the file (``.jsonl``, or ``.jsonl.gz``) is a JSON object: ``name``, ``schema``, and ``tests``, a list of
``{"valid": bool, "data": value}``. An instance is judged by its text, ``json.dumps(..., ensure_ascii=False)``. Every
engine works in a process of its own, which is ended where one schema takes longer than the limit.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

Judge = Callable[[bytes], tuple[bool, list[float]]]
"""Whether a text is in the language, and the seconds that each mask took on the way."""
Engine = Callable[[object], Judge]


@dataclass
class Outcome:
    """What became of one schema."""

    name: str
    seconds: float = 0.0
    refused: str = ""
    accepted_invalid: list[int] = field(default_factory=list)
    rejected_valid: list[int] = field(default_factory=list)
    masks: list[float] = field(default_factory=list)


def read(path: Path) -> list[dict]:
    data = path.read_bytes()
    lines = (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def text_of(value: object) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()


def examine(engine: Engine, case: dict) -> Outcome:
    outcome = Outcome(case["name"])
    began = time.process_time()  # what else the machine does should not count
    try:
        judge = engine(case["schema"])
    except Exception as error:
        outcome.seconds = time.process_time() - began
        outcome.refused = str(error).strip() or type(error).__name__
        return outcome
    outcome.seconds = time.process_time() - began
    for place, test in enumerate(case["tests"]):
        found, masks = judge(text_of(test["data"]))
        outcome.masks += masks
        if found != test["valid"]:
            (outcome.accepted_invalid if found else outcome.rejected_valid).append(place)
    return outcome


def work(engine: Engine, cases: list[dict], first: int, pipe: Connection) -> None:
    for case in cases[first:]:
        pipe.send(examine(engine, case))
    pipe.close()


def outcomes(engine: Engine, cases: list[dict], limit: float) -> Iterator[Outcome]:
    """One outcome a schema; the process is started anew after a schema that took too long or ended it."""
    context = multiprocessing.get_context("fork")
    first = 0
    while first < len(cases):
        ours, theirs = context.Pipe(False)
        process = context.Process(target=work, args=(engine, cases, first, theirs), daemon=True)
        process.start()
        theirs.close()
        try:
            while first < len(cases):
                if not ours.poll(limit):
                    yield Outcome(cases[first]["name"], limit, f"took longer than {limit:g} s")
                    first += 1
                    break
                yield ours.recv()
                first += 1
        except EOFError:
            yield Outcome(cases[first]["name"], 0.0, "the process ended")
            first += 1
        finally:
            process.kill()
            process.join()
            ours.close()


def reason(message: str) -> str:
    """A refusal without the place and the values, so that equal reasons are counted together."""
    message = re.sub(r"^Schema at \S+:\s*", "", message.splitlines()[0])
    message = re.sub(r"'[^']*'|\"[^\"]*\"|\d[\d,.]*", "…", message)
    return message[:90]


def milliseconds(values: list[float], share: float) -> str:
    return f"{1e3 * float(np.quantile(values, share)):.3g}" if values else "-"


def compare(engines: dict[str, Engine], cases: list[dict], limit: float, show: int) -> list[dict[str, str | int]]:
    """A row of figures an engine; prints refusals by reason and the mistakes by name."""
    rows: list[dict[str, str | int]] = []
    for name, engine in engines.items():
        found = list(outcomes(engine, cases, limit))
        compiled = [one for one in found if not one.refused]
        masks = [seconds for one in compiled for seconds in one.masks]
        times = [one.seconds for one in compiled]
        row: dict[str, str | int] = {
            "engine": name,
            "compiled": f"{len(compiled)} ({len(compiled) / len(found):.1%})",
            "refused": sum(bool(one.refused) and "took longer" not in one.refused for one in found),
            "late": sum("took longer" in one.refused for one in found),
            "invalid accepted": sum(len(one.accepted_invalid) for one in found),
            "valid rejected": sum(len(one.rejected_valid) for one in found),
            "compile median, ms": f"{1e3 * statistics.median(times):.3g}" if times else "-",
            "compile p90, ms": milliseconds(times, 0.9),
            "compile p99, ms": milliseconds(times, 0.99),
            "mask median, ms": milliseconds(masks, 0.5),
            "mask p99, ms": milliseconds(masks, 0.99),
            "mask max, ms": milliseconds(masks, 1.0),
        }
        rows.append(row)
        print(f"{name}: {row}", flush=True)
        for text, count in Counter(reason(one.refused) for one in found if one.refused).most_common(show):
            print(f"  refused {count}: {text}")
        for one in found:
            for kind, places in (("ACCEPTS INVALID", one.accepted_invalid), ("rejects valid", one.rejected_valid)):
                if places and show:
                    print(f"  {kind}: {one.name} {places}")
        slow = sorted(compiled, key=lambda one: -one.seconds)[:8] if show else []
        for one in slow:
            print(f"  compiled in {one.seconds:.2f} s: {one.name}")
    return rows


def table(rows: list[dict[str, str | int]]) -> str:
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    lines += ["| " + " | ".join(str(row[head]) for head in heads) + " |" for row in rows]
    return "\n".join(lines) + "\n"
