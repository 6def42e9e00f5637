"""Medians, a table, and a JSON file beside the benchmark."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from everytoken.reproduce.base import machine, versions


def seconds(function: Callable[[], Any], repeats: int = 5, warm: int = 1) -> float:
    """Median wall-clock time of ``function``."""
    for _ in range(warm):
        function()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def report(name: str, rows: list[dict[str, Any]], note: str = "") -> None:
    """Prints rows and writes ``benchmarks/results/NAME.json``."""
    grid = Table(title=name, title_justify="left")
    heads = list(dict.fromkeys(key for row in rows for key in row))
    for head in heads:
        grid.add_column(head)
    for row in rows:
        grid.add_row(*[f"{row[h]:.4g}" if isinstance(row.get(h), float) else str(row.get(h, "")) for h in heads])
    console = Console()
    console.print(grid)
    if note:
        console.print(note, style="dim")
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    result = {"name": name, "rows": rows, "note": note, "machine": machine(), "versions": versions()}
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
