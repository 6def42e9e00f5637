"""Files that readers see whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has ``write`` write a file beside its place and moves it there; where it fails, what was there stays.

    Args:
        path: the place; its folder is made if it is missing.
        write: gets the path to write to, in the same folder and with the same ending.

    Raises:
        OSError: the folder cannot be written; and whatever ``write`` raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text_whole(path: Path, text: str) -> None:
    """``write_whole`` for UTF-8 text."""
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))
