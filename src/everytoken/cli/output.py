"""What commands write: to any terminal's encoding, and to files and folders that are checked before any work."""

from __future__ import annotations

import codecs
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import typer

from ..core.errors import BadInputError, extra_of, require

PLAIN = {"✓": "+", "✗": "x", "█": "#", "▌": "", "·": ".", "⏎": "\\n", "…": "...", "–": "-", "’": "'"}
"""What stands for our own marks where the output cannot show them."""
HANDLER = "everytoken.plain"
TRACES = (".html", ".htm", ".jsonl", ".parquet")


def _plain(error: UnicodeError) -> tuple[str, int]:
    """An encoding error's handler: our marks in ASCII, every other character as an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    shown = [PLAIN.get(letter) for letter in text]
    return "".join(
        letter.encode("ascii", "backslashreplace").decode() if mark is None else mark
        for letter, mark in zip(text, shown, strict=True)
    ), error.end


def any_encoding() -> None:
    """Lets both outputs take every text: what their encoding lacks is shown plainly, not raised."""
    codecs.register_error(HANDLER, _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where something else stands for the stream, as in tests
            stream.reconfigure(errors=HANDLER)


def print_json(value: object) -> None:
    """JSON that any encoding can carry: escapes where the output is not UTF-8."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    wide = encoding.lower().replace("-", "") == "utf8"
    text = json.dumps(value, indent=1, ensure_ascii=not wide)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON itself can spell it
        text = json.dumps(value, indent=1)
    typer.echo(text)


def check_files(*paths: Path | None) -> None:
    """Refuses output files that cannot be written, before any work.

    Raises:
        BadInputError: the folder does not exist or cannot be written, or the path is a folder.
    """
    for path in paths:
        if path is None:
            continue
        folder = path.resolve().parent
        if path.is_dir():
            raise BadInputError(f"{path} is a folder.", "Name a file.")
        if not folder.is_dir():
            raise BadInputError(f"The folder {folder} does not exist.", "Create it, or write elsewhere.")
        _probe(folder)


def check_folder(path: Path, new: bool = False) -> None:
    """Refuses an output folder that cannot be made or written, before any work. Missing parents are no fault.

    Args:
        new: nothing may lie in it yet.

    Raises:
        BadInputError: it is a file, lies below one, cannot be written, or is not empty where it must be.
    """
    here = path.resolve()
    if new and here.is_dir() and any(here.iterdir()):
        raise BadInputError(f"{path} exists already.", "Choose a new folder.")
    nearest = next(place for place in (here, *here.parents) if place.exists())
    if not nearest.is_dir():
        raise BadInputError(f"{nearest} is a file, not a folder.", "Choose another folder.")
    _probe(nearest)


def _probe(folder: Path) -> None:
    """Writes into a folder what vanishes again; permissions alone do not tell (read-only file systems, quotas)."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        raise BadInputError(
            f"The folder {folder} cannot be written: {error.strerror or error}.", "Choose another place."
        ) from error


def check_ending(path: Path | None, what: str, endings: Iterable[str]) -> None:
    """Refuses a file whose ending asks for a kind that is not written, before any work.

    Raises:
        BadInputError: another ending.
        MissingExtraError: ``.parquet`` without pyarrow.
    """
    known = tuple(endings)
    if path is None:
        return
    if path.suffix.lower() not in known:
        named = path.suffix or "no ending"
        raise BadInputError(f"{what} is written as {' or '.join(known)}; {path.name} has {named}.")
    if path.suffix.lower() == ".parquet":
        require("pyarrow", extra_of("pyarrow"), "Saving a trace as Parquet")
