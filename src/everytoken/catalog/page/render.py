"""Pages from entries: templates that escape everything, and the files of a whole site."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import BadInputError
from ...core.files import write_whole
from ...core.progress import Report, silent
from ..cards import STATUSES
from ..house import stations
from .entries import NO_RESULT, Entry
from .feed import atom, check_base
from .index import as_data, search_index, word_meanings

if TYPE_CHECKING:
    from jinja2 import Environment

POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'"
)
"""What a page may load: files of its own site, no script inside the page."""
STATIC = ("site.css", "site.js", "icon.svg")
MEANING = "meaning.js"
"""The table of words by meaning."""
LIVE = "live.js"
"""The script of what only a server can keep; static sites do without it."""
MARK = "everytoken-papers"
"""A file that says a folder was written by ``build``, so that it may be written again."""


def static(name: str) -> bytes:
    """A file of the site that is the same for all."""
    return (files("everytoken.catalog.page") / "static" / name).read_bytes()


@lru_cache(maxsize=1)
def environment() -> Environment:
    """The templates. Everything is escaped, whatever a template's name ends with."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("everytoken.catalog.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals.update(no_result=NO_RESULT, policy=POLICY)
    made.filters["web"] = web
    return made


def web(link: str) -> str:
    """A link where it is an https address with a host, else nothing: ``javascript:`` and its like lead nowhere."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(link)
        return link if parts.scheme == "https" and parts.hostname and link.isprintable() else ""
    except ValueError:
        return ""


def page(name: str, root: str = "", live: bool = False, **values: Any) -> str:
    """A page by a template.

    Args:
        root: the way to the site's first page, such as ``"../"``.
        live: whether a server keeps votes, notes and subscriptions.
    """
    return environment().get_template(name).render(root=root, live=live, **values)


def list_page(
    entries: Sequence[Entry],
    index: Any,
    *,
    meaning: bool = False,
    live: bool = False,
    query: str = "",
    found: Sequence[str] | None = None,
) -> str:
    """The list.

    Args:
        index: the search index; it stands inside the page, for browsers fetch nothing for a page that lies on a disk.
        meaning: whether ``meaning.js`` lies beside the page.
        query, found: what a server has searched for, and the slugs that it found, best first.
    """
    shown = list(entries)
    if found is not None:
        places = {slug: place for place, slug in enumerate(found)}
        shown = sorted((e for e in entries if e.card.slug in places), key=lambda e: places[e.card.slug])
    return page(
        "index.html",
        live=live,
        entries=shown,
        stations=stations(),
        years=sorted({entry.card.year for entry in entries}, reverse=True),
        statuses=STATUSES,
        # built by as_data, which escapes what could end the block
        index=_markup(as_data(index)),
        query=query,
        meaning=meaning,
    )


def paper_page(entry: Entry, *, live: bool = False) -> str:
    """A paper's page."""
    return page("paper.html", "../", live=live, entry=entry, card=entry.card, flow=stations()[entry.card.station])


def _write(data: bytes, path: Path) -> None:
    path.write_bytes(data)


def _markup(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)


def site_files(
    entries: Sequence[Entry], base: str = "", meaning: bool = True, *, live: bool = False, report: Report = silent
) -> dict[str, bytes]:
    """All files of the site: path -> bytes; the same input gives the same bytes.

    Args:
        base: the site's address, for the feed; relative links without one.
        meaning: whether the page itself can search by meaning; a server does it with the encoder.
        live: for a server that keeps votes, notes and subscriptions.

    Raises:
        BadInputError: ``base`` is no address.
        MissingExtraError: ``meaning`` without the ``search`` extra.
    """
    base = check_base(base)
    index = search_index([entry.card for entry in entries])
    made = {name: static(name) for name in (*STATIC, *([LIVE] if live else []))}
    if (
        meaning
    ):  # a file of its own, so that the list stays small; a classic script, for browsers fetch nothing from disks
        table = as_data(word_meanings([entry.card for entry in entries], report))
        made[MEANING] = f"window.everytokenMeaning = {table};\n".encode()
    made["index.html"] = list_page(entries, index, meaning=meaning, live=live).encode()
    made["search.json"] = as_data(index).encode()
    made["feed.atom"] = atom(entries, base)
    for entry in entries:
        slug = entry.card.slug
        made[f"papers/{slug}.html"] = paper_page(entry, live=live).encode()
        if entry.picture:
            made[f"pictures/{slug}.svg"] = entry.picture.encode()
        if entry.trace is not None:
            made[f"traces/{slug}.html"] = entry.trace.read_bytes()
    return made


def write_site(
    folder: Path, entries: Sequence[Entry], base: str = "", meaning: bool = True, report: Report = silent
) -> list[str]:
    """Writes the static site; pages of an earlier site that are no longer part of it are taken away.

    Returns the paths that were written, within the folder.

    Raises:
        BadInputError: the folder holds something that this has not written; and as ``site_files`` does.
        OSError: the folder cannot be written.
    """
    mark = folder / MARK
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not mark.is_file())):
        raise BadInputError(f"{folder} holds other things.", "Choose a new folder.")
    made = site_files(entries, base, meaning, report=report)
    before = mark.read_text(encoding="utf-8").splitlines() if mark.is_file() else []
    listed = "".join(f"{name}\n" for name in sorted({*made, *before}))
    write_whole(
        mark, lambda path: path.write_text(listed, encoding="utf-8")
    )  # first: a build that breaks off can be repeated
    for name, data in made.items():
        write_whole(folder / name, functools.partial(_write, data))
    root = folder.resolve()
    for name in set(before) - set(made):
        if (old := (folder / name).resolve()).is_relative_to(root):
            old.unlink(missing_ok=True)
    listed = "".join(f"{name}\n" for name in sorted(made))
    write_whole(mark, lambda path: path.write_text(listed, encoding="utf-8"))
    return sorted(made)
