"""What the scripts that train shipped weights share: their options, progress, and the copy into the package."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterable
from pathlib import Path


def options(doc: str | None) -> argparse.ArgumentParser:
    """``--out``, ``--set`` and ``--ship``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--ship", action="store_true", help="copy the weights into the package when they are trained")
    return parser


def report(stage: str, done: int, total: int) -> None:
    """A line for every tenth of a stage, and for its end."""
    if total and (done % max(total // 10, 1) == 0 or done == total):
        print(f"{time.strftime('%H:%M:%S')} {stage}: {done} of {total}", flush=True)


def ship(files: Iterable[Path], place: Path) -> None:
    """Copies files to where they ship."""
    for path in files:
        shutil.copyfile(path, place / path.name)
    print(f"Copied into {place}.")
