"""What an import costs, measured in modules and not in time; and the layering rules of the house."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "everytoken"
HEAVY = {
    "torch",
    "transformers",
    "trl",
    "numba",
    "datasets",
    "sentence_transformers",
    "matplotlib",
    "pandas",
    "scipy",
    "mcp",
}


def loaded_by(statement):
    code = f"import sys; {statement}; print(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_import_everytoken_loads_nothing_heavy():
    assert not loaded_by("import everytoken") & (HEAVY | {"numpy", "typer", "rich"})


def test_the_command_line_and_the_catalogue_load_nothing_heavy():
    assert not loaded_by("import everytoken.cli.app") & HEAVY
    assert not loaded_by("from everytoken.catalog import load_catalog; load_catalog()") & HEAVY


def test_exports_resolve():
    import everytoken

    for name in everytoken.__all__:
        assert getattr(everytoken, name) is not None
    assert "DySpec" in dir(everytoken)
    with pytest.raises(AttributeError, match="nonsense"):
        everytoken.nonsense


def imports_of(path):
    """Absolute names of all modules that a file imports, at any depth."""
    package = ("everytoken", *path.relative_to(SOURCE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join([*base, *([node.module] if node.module else [])])


STATIONS = ("tokenization", "generation", "preference", "constraints")
SHARED = {"base", "byte_view", "trial", "trainer", "traces", "sentiment", "drafts", "drafting", "trees"}
SHARED |= {"loop", "rows", "routers", "r2r_training"}  # loops, rows of a batch, R2R's network and its training
SHARED |= {
    "scored",
    "columns",
    "critic",
    "data",
    "guides",
    "arithmetic",
    "build",
    "training",
    "configs",
    "session",
    "distributed",
    "failures",
}  # of preference
SHARED |= {"merging", "hyper", "byte_lm", "dynamic_tokenization"}  # pair merges, embeddings of new tokens, models over bytes
SHARED |= {"grammar", "kernels", "matcher", "pushdown", "sources", "vocabulary"}  # the grammar engine


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_layering(path):
    """core imports no station, and a method imports core, its station's shared pieces, and the base of any station only."""
    parts = path.relative_to(SOURCE).parts
    names = [name for name in imports_of(path) if name.startswith("everytoken.")]
    if parts[0] == "core":
        assert all(name.startswith("everytoken.core") for name in names), names
    if parts[0] in STATIONS and len(parts) == 2 and path.stem not in SHARED | {"__init__"}:
        for name in names:
            pieces = name.split(".")
            same = pieces[1] == parts[0] and (len(pieces) == 2 or pieces[2] in SHARED)
            assert pieces[1] == "core" or same or pieces[2:3] == ["base"], name


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_module_says_what_it_is(path):
    if path.name != "__main__.py":
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
