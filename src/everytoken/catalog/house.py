"""The house: its floors and stations, one TOML file each.

A floor is shared code (``core``, ``decoding``, ``training``); a station is a folder of methods. Their files stand
beside the cards of the methods and are read the same way. Together they are the registry: the names that ``everytoken``
exports, the pages of the reference and the order of every list follow from them.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields
from functools import lru_cache
from importlib.resources import files

from ..core.errors import EverytokenError

KINDS = ("floor", "station")


class CardError(EverytokenError, ValueError):
    """A card, or a file of the house, that cannot be read; names the file and what is wrong."""

    exit_code = 2


@dataclass(frozen=True)
class Place:
    """A floor or a station.

    Attributes:
        name: its folder in the package.
        kind: ``"floor"`` or ``"station"``.
        order: its place in every list; tokens pass the stations in this order.
        flow: what it does, in a few words.
        exports: public names that belong to it and to no method, each ``module:Name``.
        trial: ``module:attribute`` of what tries a station's methods; empty where its own module ``trial`` does.
        trainings: what trains several methods together and so has no card: name -> ``module:attribute``.
    """

    name: str
    kind: str
    order: int
    flow: str
    exports: tuple[str, ...] = ()
    trial: str = ""
    trainings: dict[str, str] = field(default_factory=dict)


def parse_place(text: str, source: str) -> Place:
    """A floor or station from TOML.

    Raises:
        CardError: broken TOML, or a field that is missing, unknown or of the wrong kind.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CardError(f"{source} is not valid TOML: {error}.") from error
    known = {item.name for item in fields(Place)}
    needed = {item.name for item in fields(Place) if item.default is item.default_factory}
    wrong = sorted((set(raw) - known) | (needed - set(raw)))
    if wrong:
        raise CardError(f"{source} lacks or does not know: {', '.join(wrong)}.", f"Fields: {', '.join(sorted(known))}.")
    if raw["kind"] not in KINDS or not isinstance(raw["order"], int) or source != f"{raw['name']}.toml":
        raise CardError(f"{source} must be named after its place, with a number as order and a kind of {KINDS}.")
    raw["exports"] = tuple(raw.get("exports", ()))
    return Place(**raw)


@lru_cache(maxsize=1)
def load_house() -> dict[str, Place]:
    """All floors and stations by name, in order.

    Raises:
        CardError: a file is broken.
    """
    folder = files("everytoken.catalog") / "house"
    places = [
        parse_place(item.read_text(encoding="utf-8"), item.name)
        for item in folder.iterdir()
        if item.name.endswith(".toml")
    ]
    return {place.name: place for place in sorted(places, key=lambda place: place.order)}


def stations() -> dict[str, str]:
    """The stations in order: name -> what it does."""
    return {place.name: place.flow for place in load_house().values() if place.kind == "station"}
