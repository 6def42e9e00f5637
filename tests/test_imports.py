"""What an import costs, measured in modules and not in time; and the rules of the house about who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from everytoken.catalog import load_catalog
from everytoken.catalog.house import load_house

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
COMPOSE = {"cli", "reproduce", "serving", "integrations"}
"""What puts stations together, by card."""


def loaded_by(statement):
    code = f"import sys; {statement}; print(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_import_everytoken_loads_nothing_heavy():
    assert not loaded_by("import everytoken") & (HEAVY | {"numpy", "typer", "rich"})


def test_the_command_line_and_the_catalogue_load_nothing_heavy():
    assert not loaded_by("import everytoken.cli.app") & HEAVY
    assert not loaded_by("from everytoken.catalog import load_catalog; load_catalog()") & HEAVY
    assert not loaded_by("import everytoken; everytoken.__all__") & HEAVY


def test_exports_resolve():
    import everytoken

    for name in everytoken.__all__:
        assert getattr(everytoken, name) is not None
    assert "DySpec" in dir(everytoken)
    with pytest.raises(AttributeError, match="nonsense"):
        everytoken.nonsense


# -- the house --------------------------------------------------------------------------------------------------------
def module_name(path):
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(["everytoken", *(parts[:-1] if parts[-1] == "__init__" else parts)])


FILES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def statements(node):
    """All nodes below one, but for what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING"):
            yield child
            yield from statements(child)


def imports_of(path):
    """The modules of this package that a file imports, at any depth."""
    package = ("everytoken", *path.relative_to(SOURCE).parts[:-1])
    found = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # "from .package import module" names a module of it, "from .module import name" does not
            names = {f"{module}.{alias.name}" for alias in node.names}
            found.update(names & set(FILES))
            if names - set(FILES):
                found.add(module)
    return {name for name in found if name in FILES}


@cache
def graph():
    """All modules of the package with what each imports; read when a test asks, for parsing them takes seconds."""
    return {name: imports_of(path) for name, path in FILES.items()}


def place_of(module):
    return module.split(".")[1] if "." in module else ""


def crossings(allowed):
    """Imports that a rule forbids, as ``importer -> imported``."""
    return sorted(f"{a} -> {b}" for a, imported in graph().items() for b in imported if not allowed(a, b))


def test_floors_import_no_station_and_core_no_floor():
    floors = [place.name for place in load_house().values() if place.kind == "floor"]

    def allowed(importer, imported):
        here, there = place_of(importer), place_of(imported)
        if here not in floors or here == there:
            return True
        if here == "testing":  # its cases are the cards, and it checks the contracts of stations
            return there in (*floors, "catalog") or imported == f"everytoken.{there}.base"
        return there in floors[: floors.index(here)]

    assert not crossings(allowed)


def test_stations_do_not_import_each_other():
    stations = {place.name for place in load_house().values() if place.kind == "station"}

    def allowed(importer, imported):
        here, there = place_of(importer), place_of(imported)
        return here not in stations or there == here or there not in stations | COMPOSE

    assert not crossings(allowed)


def methods_of(module):
    """The methods that a module belongs to: it holds what their cards name, or its folder does."""
    parts = module.split(".")
    folder = ".".join(parts[:-1]) if len(parts) > 3 else module
    return {
        card.slug
        for card in load_catalog().values()
        if card.station != "catalog"
        for path in (card.implementation, card.training, card.trial, *card.exports)
        if path and (f"{module}.".startswith(f"{path.partition(':')[0]}.") or path.startswith(f"{folder}."))
    }


def test_a_method_imports_no_other_method_and_shared_code_none():
    owners = {module: methods_of(module) for module in graph()}
    assert len(set().union(*owners.values())) > 10

    def allowed(importer, imported):
        if place_of(importer) in COMPOSE or not owners[imported]:
            return True
        return bool(owners[importer] & owners[imported]) or imported.startswith(f"{importer}.")

    assert not crossings(allowed)


def test_the_import_graph_has_no_circle():
    """Imports inside functions count too: a circle that only runs late is still a circle."""
    waiting, done = {name: set(imported) - {name} for name, imported in graph().items()}, set()
    while True:
        free = {name for name, imported in waiting.items() if not imported - done}
        if not free:
            break
        done |= free
        waiting = {name: imported for name, imported in waiting.items() if name not in free}
    tied = {name: sorted(imported - done) for name, imported in waiting.items()}
    assert not tied


@pytest.mark.slow
def test_text_files_are_utf8_whatever_the_locale():
    """Reading and writing text names its encoding: without one, Python takes the locale's."""
    silent = []
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
            owner = getattr(getattr(node.func, "value", None), "id", "") if isinstance(node, ast.Call) else ""
            if called not in ("read_text", "write_text", "open") or owner in ("os", "webbrowser", "Image"):  # PIL's
                continue
            if called == "read_text" and node.args:  # a function of ours that takes the path
                continue
            modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            binary = called == "open" and any("b" in mode for mode in modes if len(mode) <= 3)
            if not binary and not any(word.arg == "encoding" for word in node.keywords):
                silent.append(f"{name}:{node.lineno}")
    assert not silent


def test_every_module_says_what_it_is():
    silent = [
        name
        for name, path in FILES.items()
        if path.name != "__main__.py" and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent
