"""Compiled kernels are kept between processes, and compiled again when any kernel's source has changed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import everytoken.constraints.jit as jit

FOLDER = Path(jit.__file__).parent
CALLER = """from .callee import number
from .jit import kernel


@kernel
def twice():
    return 2 * number()
"""
CALLEE = """from .jit import kernel


@kernel
def number():
    return {}
"""
ASK = "from kernels.caller import twice; print(twice(), sum(twice.stats.cache_hits.values()))"


def ask(folder, **settings):
    done = subprocess.run(
        [sys.executable, "-c", ASK], cwd=folder, env=os.environ | settings, capture_output=True, text=True, check=True
    )
    return tuple(map(int, done.stdout.split()))


def package(folder, number):
    inside = folder / "kernels"
    inside.mkdir(exist_ok=True)
    source = (FOLDER / "jit.py").read_text(encoding="utf-8")
    source, found = re.subn(r"(?m)^SOURCES = .*$", 'SOURCES = ("callee", "caller", "jit")', source)
    assert found == 1
    files = {"__init__": "", "jit": source, "caller": CALLER, "callee": CALLEE.format(number)}
    for name, text in files.items():
        (inside / f"{name}.py").write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_compiled_code_is_kept_and_never_stale(tmp_path):
    settings = {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    package(tmp_path, 3)
    assert ask(tmp_path, **settings) == (6, 0)
    assert ask(tmp_path, **settings) == (6, 1)  # from the disk
    package(tmp_path, 4)  # the file of the function that is asked has not changed
    assert ask(tmp_path, **settings) == (8, 0)


def test_every_module_with_kernels_counts():
    marked = re.compile(r"^@(kernel|inlined)$", re.MULTILINE)
    files = {str(path.relative_to(FOLDER).with_suffix("")): path for path in FOLDER.rglob("*.py")}
    users = {name for name, path in files.items() if marked.search(path.read_text(encoding="utf-8"))}
    assert users < set(jit.SOURCES) and all((FOLDER / f"{name}.py").is_file() for name in jit.SOURCES)
