"""Which quick reproductions a change calls for: those of the methods that it touches, or a rotation of eight where it
touches a floor, or what more than eight methods share. Which long pages of the docs: those that it touches, and the
next in turn. And which of the rotating tests: those of the sources that it touches, and a third of the others in turn.

Files are found from the cards and the import graph, so a new method is covered by its card alone.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from everytoken.catalog import load_catalog
from everytoken.catalog.house import load_house

from .test_imports import graph, place_of

ROOT = Path(__file__).resolve().parents[1]
ROTATION = 8
THIRDS = 3


def reproducible():
    """Names of this package's methods that have an experiment, in order."""
    return sorted(
        card.slug for card in load_catalog().values() if card.reproduction.startswith("everytoken.reproduce.")
    )


def closure(module):
    """A module of this package and all that it imports, at any depth."""
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph().get(name, ())
    return found


def files_of(slug):
    """What belongs to a method: its card, and the modules of its implementation and experiment but for the floors."""
    card, floors = load_catalog()[slug], floor_names()
    starts = [path.partition(":")[0] for path in (card.implementation, card.reproduction, card.training) if path]
    modules = set().union(*map(closure, starts))
    kept = {name.replace(".", "/") for name in modules if place_of(name) not in {*floors, "catalog", ""}}
    return {f"src/{name}" for name in kept} | {f"src/everytoken/catalog/cards/{slug}.toml"}


def floor_names():
    return [place.name for place in load_house().values() if place.kind == "floor"]


def changed_since(revision):
    """Files that differ from a revision, as git names them; None where git does not know it."""
    command = ["git", "diff", "--name-only", revision, "--"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return done.stdout.split() if done.returncode == 0 else None


def commits():
    """How many commits there are: what turns the rotation."""
    done = subprocess.run(["git", "rev-list", "--count", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    return int(done.stdout or 0)


def select(changed, turn, names=None):
    """The methods whose quick reproductions run.

    Args:
        changed: files that changed; None where that is not known, which counts as a change to a floor.
        turn: any number; the next one continues the rotation where this one ends.
    """
    names = reproducible() if names is None else names
    chosen, shared = set(), changed is None
    own = {slug: files_of(slug) for slug in names}
    floors = tuple(f"src/everytoken/{name}/" for name in floor_names())
    for path in changed or ():
        stem = path.removesuffix(".py").removesuffix("/__init__")
        touched = {slug for slug in names if stem in own[slug]}
        if path.startswith(floors) or len(touched) > ROTATION:
            shared = True
        else:
            chosen |= touched
    if shared:
        first = turn * ROTATION % len(names)
        chosen.update((names + names)[first : first + min(ROTATION, len(names))])
    return chosen


def long_pages(changed, turn, names):
    """The long pages that run: those that changed, and one that did not, so that each has its turn.

    Args:
        changed: files that changed; None where that is not known.
        turn: any number; the next one continues the rotation where this one ends.
        names: all long pages, as paths.
    """
    touched = set(names) & set(changed or ())
    others = sorted(set(names) - touched)
    return touched | ({others[turn % len(others)]} if others else set())


def source_of(path):
    """What the test in ``tests/a/test_b.py`` is about: ``src/everytoken/a/b``, a module or a folder."""
    folder, _, name = path.removeprefix("tests/").rpartition("/")
    return "/".join(part for part in ("src/everytoken", folder, name.removeprefix("test_").removesuffix(".py")) if part)


def rotating(changed, turn, tests):
    """The rotating tests that run: those whose file or source changed, and a third of the others.

    Args:
        changed: files that changed; None where that is not known.
        turn: any number; the next one takes the next third.
        tests: ids of all rotating tests, ``tests/a/test_b.py::test_c[case]``.
    """
    changed = changed or ()

    def touched(test):
        path = test.partition("::")[0]
        source = source_of(path)
        return any(name == path or name.startswith((f"{source}.", f"{source}/")) for name in changed)

    own = {test for test in tests if touched(test)}
    others = sorted(set(tests) - own)
    return own | set(others[turn % THIRDS :: THIRDS])
