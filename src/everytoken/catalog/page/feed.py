"""The catalogue as an Atom feed (RFC 4287): the same entries give the same bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from ...core.errors import BadInputError
from .entries import NO_RESULT, Entry

ATOM = "http://www.w3.org/2005/Atom"
AUTHORITY = "tag:everytoken.github.io,2026:papers"
"""What ids begin with (RFC 4151): a name that stays the same wherever the site lies."""
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot carry."""


def plain(text: str, most: int = 2000) -> str:
    """Text that every format can carry: no control characters, no half characters, one line, at most ``most`` long."""
    text = " ".join(_FORBIDDEN.sub(" ", text).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def address(base: str, path: str) -> str:
    """A path below the site's address, or relative where it has none."""
    return f"{base}/{path}" if base else path


def check_base(base: str) -> str:
    """The site's address without its last slash.

    Raises:
        BadInputError: it is no http or https address with a host.
    """
    from urllib.parse import urlsplit

    if not base:
        return ""
    try:
        parts = urlsplit(base)
        host = parts.hostname
        parts.port  # raises where it is no number
    except ValueError as error:
        raise BadInputError(f"{base!r} is not an address: {error}.") from error
    if (
        parts.scheme not in ("http", "https")
        or not host
        or parts.query
        or parts.fragment
        or re.search(r"\s|[\x00-\x1f\"<>]", base)
    ):
        raise BadInputError(f"{base!r} is not the address of a site.", "Example: https://example.org/papers")
    return base.rstrip("/")


def atom(entries: Sequence[Entry], base: str = "") -> bytes:
    """The feed, the newest entry first.

    Args:
        base: the site's address; without one, links are relative to the feed.
    """
    ElementTree.register_namespace("", ATOM)

    def add(parent: ElementTree.Element, name: str, text: str = "", **attributes: str) -> ElementTree.Element:
        made = ElementTree.SubElement(parent, f"{{{ATOM}}}{name}", attributes)
        if text:
            made.text = plain(text)
        return made

    feed = ElementTree.Element(f"{{{ATOM}}}feed", {"{http://www.w3.org/XML/1998/namespace}lang": "en"})
    newest = sorted(entries, key=lambda entry: (entry.updated, entry.card.slug), reverse=True)
    add(feed, "id", AUTHORITY)
    add(feed, "title", "everytoken: the papers")
    add(
        feed,
        "subtitle",
        "Methods that treat each token of a language model as a decision, and what was measured of them.",
    )
    add(feed, "updated", f"{newest[0].updated if newest else '2026-01-01'}T00:00:00Z")
    add(add(feed, "author"), "name", "everytoken")
    add(feed, "link", rel="self", type="application/atom+xml", href=address(base, "feed.atom"))
    add(feed, "link", rel="alternate", type="text/html", href=address(base, "index.html"))
    for entry in newest:
        card = entry.card
        item = add(feed, "entry")
        add(item, "id", f"{AUTHORITY}/{card.slug}")
        add(item, "title", card.title)
        add(item, "updated", f"{entry.updated}T00:00:00Z")
        add(item, "link", rel="alternate", type="text/html", href=address(base, f"papers/{card.slug}.html"))
        if card.arxiv:
            add(item, "link", rel="related", href=card.url)
        add(item, "category", term=card.station)
        add(item, "summary", f"{card.summary} Claim: {card.claim}: {card.figure}. {told(entry)}")
    ElementTree.indent(feed)
    return b'<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(feed, encoding="utf-8") + b"\n"


def told(entry: Entry) -> str:
    """What was measured first, in a sentence."""
    if not entry.measured:
        return NO_RESULT
    first = entry.measured[0]
    return f"Measured: {first.metric} {first.value} ({first.interval}). {first.told}"
