"""Every public name of the package, as floors, stations and cards declare it."""

from __future__ import annotations

from functools import lru_cache

from .cards import load_catalog
from .house import CardError, load_house


@lru_cache(maxsize=1)
def public_names() -> dict[str, str]:
    """Every name that ``everytoken`` exports, with its module: what floors, stations and this package's methods export.

    Raises:
        CardError: two of them export the same name from different modules.
    """
    paths = [path for place in load_house().values() for path in place.exports]
    for card in load_catalog().values():
        if card.implementation.startswith("everytoken."):
            paths += [card.implementation, *card.exports]
    names: dict[str, str] = {}
    for path in paths:
        module, _, name = path.partition(":")
        if names.setdefault(name, module) != module:
            raise CardError(f"{name} is exported from {names[name]} and from {module}.", "Drop one of them.")
    return dict(sorted(names.items()))
