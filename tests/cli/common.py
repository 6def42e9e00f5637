"""Runs the command line: within this process, or as a shell does."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from unittest import mock

from everytoken.cli.app import main

SURROUNDINGS = {"COLUMNS": "120", "HF_HUB_OFFLINE": "1"}


@dataclass
class Result:
    """What a shell would see."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments, encoding="utf-8", **environment):
    """The command within this process; imports are paid once for all tests. Its outputs have the encoding."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2))
    with (
        mock.patch.object(sys, "argv", ["everytoken", *map(str, arguments)]),
        mock.patch.dict(os.environ, SURROUNDINGS | environment),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return Result(code, *(stream.buffer.getvalue().decode(encoding) for stream in (out, err)))


def process(*arguments, **environment):
    """A real process."""
    return subprocess.run(
        [sys.executable, "-m", "everytoken", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | SURROUNDINGS | environment,
    )
