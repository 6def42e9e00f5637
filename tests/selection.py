"""Which quick reproductions a change calls for: those of the methods that it touches, or a rotation of eight where it
touches a floor. And which long pages of the docs: those that it touches, and the next in turn.

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
    chosen = set()
    for slug in names if changed else ():
        own = files_of(slug)
        stems = {path.removesuffix(".py").removesuffix("/__init__") for path in changed}
        if stems & own:
            chosen.add(slug)
    floors = tuple(f"src/everytoken/{name}/" for name in floor_names())
    if changed is None or any(path.startswith(floors) for path in changed):
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
