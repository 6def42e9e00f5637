"""Cards: the facts about each paper, one TOML file a paper, and how to reach its code.

A card's status is not written in it but derived from what exists: ``measured`` if a result file carries its name,
``implemented`` if its implementation can be found, else ``planned``.

Packages outside this one add methods through the entry point group ``everytoken.cards``: each entry point names a
folder of TOML cards inside its package (``mymethods = "mymethods.cards"``); the implementation paths in them are
imported like ours.
"""

from __future__ import annotations

import importlib
import json
import re
import tomllib
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib.metadata import entry_points
from importlib.resources import files
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..core.errors import BadInputError, UnknownNameError
from .house import CardError, load_house, stations

STATUSES = ("measured", "implemented", "planned")
ENTRY_POINTS = "everytoken.cards"
EXPECTED: dict[str, tuple[type, str]] = {
    "year": (int, "a number"),
    "authors": (int, "a number"),
    "exports": (list, "a list"),
}


@dataclass(frozen=True)
class Card:
    """One paper.

    Attributes:
        slug: the method's name on the command line.
        title, arxiv: of the paper; ``arxiv`` is empty for what is not on arXiv.
        year: in which a venue published it; the preprint's where none has. ``preprint_year`` follows from ``arxiv``.
        station: where it lives in the house.
        summary: what it does, in our words.
        claim, figure: the claimed effect and its number.
        code: the authors' repository, or empty.
        authors: how many there are; None where not known for sure.
        implementation, reproduction, training, trial: ``module:attribute``, empty while there is none. Training and
            trial are needed only where the contract that the implementation keeps does not provide them.
        exports: further public names of the method, each ``module:Name``; the implementation itself is always one.
    """

    slug: str
    title: str
    arxiv: str
    year: int
    station: str
    summary: str
    claim: str
    figure: str
    code: str = ""
    authors: int | None = None
    implementation: str = ""
    reproduction: str = ""
    training: str = ""
    trial: str = ""
    exports: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else "https://huggingface.co/papers"

    @property
    def preprint_year(self) -> int | None:
        """The year of the first version on arXiv; None for what is not there."""
        return 2000 + int(self.arxiv[:2]) if self.arxiv else None

    @property
    def status(self) -> str:
        """``measured``, ``implemented`` or ``planned``, by what exists."""
        if not self.implementation or find_spec(self.implementation.split(":")[0]) is None:
            return "planned"
        return "measured" if self.result() is not None else "implemented"

    def result(self) -> dict[str, Any] | None:
        """The method's result file, if there is one (``results/`` of the current folder, else those that ship)."""
        for folder in result_folders():
            path = folder / f"{self.slug}.json"
            if path.is_file():
                try:
                    return json.loads(path.read_text(encoding="utf-8"))
                except ValueError:
                    continue
        return None

    @property
    def headline(self) -> str:
        """The first measured claim, for example ``1.83x tokens per second``; empty without a result."""
        result = self.result()
        if not result or not result.get("claims"):
            return ""
        from ..core.results import formatted

        claim = result["claims"][0]
        return f"{formatted(claim)} {claim['metric']}"

    def load(self) -> Any:
        """The implementation itself.

        Raises:
            BadInputError: the method is not implemented yet.
            CardError: its path leads nowhere.
        """
        if not self.implementation:
            raise BadInputError(
                f"{self.slug} is on the list but not implemented yet.",
                "`everytoken papers --status implemented` lists those that run.",
            )
        return _attribute(self, self.implementation)

    def load_reproduction(self) -> Any:
        """The experiment; raises as ``load`` does."""
        if not self.reproduction:
            able = ", ".join(card.slug for card in load_catalog().values() if card.reproduction)
            raise BadInputError(f"{self.slug} has no experiment yet.", f"These have: {able}.")
        return _attribute(self, self.reproduction)

    @property
    def trainable(self) -> bool:
        """Whether ``everytoken train`` may know it: by its own ``training``, or by its station's contract."""
        if self.training or not self.implementation:
            return bool(self.training)
        try:
            return find_spec(f"everytoken.{self.station}.training") is not None
        except ModuleNotFoundError:  # a station without a package yet
            return False

    def load_training(self) -> Any:
        """How it is trained: as the card names it, else as its station does; raises as ``load`` does."""
        found = None
        if self.training:
            found = _attribute(self, self.training)
        elif self.trainable:
            station = importlib.import_module(f"everytoken.{self.station}.training")
            found = station.training_for(self.slug, self.load())
        if found is None:
            able = ", ".join(card.slug for card in load_catalog().values() if card.trainable)
            raise BadInputError(f"{self.slug} has nothing to train from the command line.", f"These have: {able}.")
        return found

    def load_trial(self) -> Any:
        """What runs the method beside its baseline for ``try`` and ``compare``: the card's own trial, or its station's.

        A station's is what its file in the house names, or else its module ``trial``.

        Raises:
            BadInputError: there is neither.
        """
        named = self.trial or load_house()[self.station].trial
        if named:
            return _attribute(self, named)
        try:
            return importlib.import_module(f"everytoken.{self.station}.trial").trial
        except ModuleNotFoundError as error:
            raise BadInputError(f"The station {self.station} has nothing to try yet.") from error

    def as_dict(self) -> dict[str, Any]:
        derived = {"preprint_year": self.preprint_year, "status": self.status, "measured": self.headline}
        return asdict(self) | {"url": self.url} | derived


def _attribute(card: Card, path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name and not module.startswith(error.name) and not error.name.startswith("everytoken"):
            from ..core.errors import MissingExtraError, extra_of

            raise MissingExtraError(error.name, extra_of(error.name), card.slug) from error
        raise CardError(f"The card {card.slug} names {path}, which does not exist ({error}).") from error
    except AttributeError as error:
        raise CardError(f"The card {card.slug} names {path}, but {module} has no {name}.") from error


def result_folders() -> list[Path]:
    """Where result files are looked for: ``results/`` here, that of a source checkout, and those inside the package."""
    here = Path(__file__).resolve()
    return [Path.cwd() / "results", here.parents[3] / "results", here.parents[1] / "results"]


def parse_card(text: str, source: str) -> Card:
    """A card from TOML.

    Raises:
        CardError: broken TOML, a missing, unknown or mistyped field, or an unknown station.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CardError(f"{source} is not valid TOML: {error}.") from error
    known = {item.name: item for item in fields(Card)}
    if unknown := sorted(set(raw) - set(known)):
        raise CardError(f"{source} has unknown fields: {', '.join(unknown)}.", f"Known: {', '.join(known)}.")
    required = [
        name for name in ("slug", "title", "arxiv", "year", "station", "summary", "claim", "figure") if name not in raw
    ]
    if required:
        raise CardError(f"{source} lacks {', '.join(required)}.")
    for name, value in raw.items():
        expected, word = EXPECTED.get(name, (str, "text"))
        if not isinstance(value, expected) or isinstance(value, bool):
            raise CardError(f"{source}: {name} must be {word}; got {value!r}.")
    if raw["station"] not in stations():
        raise CardError(f"{source}: there is no station {raw['station']!r}.", f"Stations: {', '.join(stations())}.")
    if raw["arxiv"] and not re.fullmatch(r"\d{4}\.\d{4,5}", raw["arxiv"]):
        raise CardError(f"{source}: {raw['arxiv']!r} is not an arXiv id such as 2410.11744.")
    raw["exports"] = tuple(raw.get("exports", ()))
    paths = [(name, raw[name]) for name in ("implementation", "reproduction", "training", "trial") if raw.get(name)]
    for name, path in [*paths, *(("exports", path) for path in raw["exports"])]:
        if not isinstance(path, str) or not re.fullmatch(r"[\w.]+:\w+", path):
            raise CardError(f"{source}: {name} must read module:attribute; got {path!r}.")
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", raw["slug"]):
        raise CardError(f"{source}: the slug {raw['slug']!r} must be lower-case letters, digits and hyphens.")
    return Card(**raw)


def _folder_cards(folder: Traversable) -> list[Card]:
    cards = []
    for item in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if item.name.endswith(".toml"):
            card = parse_card(item.read_text(encoding="utf-8"), item.name)
            if item.name != f"{card.slug}.toml":
                raise CardError(f"{item.name} holds the card of {card.slug!r}.", f"Name it {card.slug}.toml.")
            cards.append(card)
    return cards


@lru_cache(maxsize=1)
def load_catalog() -> dict[str, Card]:
    """All cards by slug: those of this package, then those of installed packages.

    Raises:
        CardError: a card is broken, or two share a slug.
    """
    folders: list[tuple[str, Traversable]] = [("everytoken", files("everytoken.catalog") / "cards")]
    for point in entry_points(group=ENTRY_POINTS):
        try:
            folders.append((point.name, files(point.value)))
        except (ModuleNotFoundError, TypeError) as error:
            raise CardError(
                f"The entry point {point.name} ({ENTRY_POINTS}) names {point.value}, which is no package."
            ) from error
    catalog: dict[str, Card] = {}
    for owner, folder in folders:
        for card in _folder_cards(folder):
            if card.slug in catalog:
                raise CardError(f"{owner} adds a card {card.slug!r}, which exists already.", "Choose another slug.")
            catalog[card.slug] = card
    return catalog


def find_card(name: str) -> Card:
    """The card of a method, by slug (case and underscores do not matter) or arXiv id.

    Raises:
        UnknownNameError: no such card; suggests the nearest.
    """
    catalog = load_catalog()
    wanted = name.strip().lower().replace("_", "-")
    if wanted in catalog:
        return catalog[wanted]
    for card in catalog.values():
        if card.arxiv and card.arxiv == wanted:
            return card
    raise UnknownNameError("method", name, catalog, "`everytoken papers`")
