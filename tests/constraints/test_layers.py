"""What modules of constraints import, at any depth of their code: nothing above them, and nothing in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import everytoken

ROOT = Path(everytoken.__file__).parent
FOLDER = ROOT / "constraints"


def name_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    package = name_of(path).split(".")
    if path.stem != "__init__":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def graph():
    names = {name_of(path): path for path in sorted(FOLDER.rglob("*.py"))}

    def module(imported):
        while imported not in names and "." in imported:
            imported = imported.rpartition(".")[0]
        return imported if imported in names else None

    found = {name: {module(other) for other in imports_of(path)} - {None} for name, path in names.items()}
    return {name: others for name, others in found.items() if name != "everytoken.constraints"}


def test_there_is_no_circle():
    order = list(TopologicalSorter(graph()).static_order())  # raises CycleError, naming the circle
    assert len(order) > 30


def test_grammars_do_not_know_the_engine_and_the_engine_no_method():
    for name, found in graph().items():
        others = found - {"everytoken.constraints.jit"}  # how kernels are compiled, for both
        if ".grammar" in name:
            assert all(".constraints.grammar" in other for other in others), (name, others)
        if ".engine" in name:
            assert all(".constraints.grammar" in other or ".constraints.engine" in other for other in others), (
                name,
                others,
            )


def test_constraints_import_the_floors_only():
    for path in FOLDER.rglob("*.py"):
        ours = [other for other in imports_of(path) if other.startswith("everytoken")]
        assert all(other.split(".")[1] in ("core", "decoding", "constraints") for other in ours), (path, ours)
