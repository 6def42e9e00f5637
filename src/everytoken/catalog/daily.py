"""The public daily list of papers: read where there is a network, the last answer where there is none, and what on it
belongs to a station.

The raw answer is read, for the client's own class takes the day of listing from the wrong field and leaves out what
sits inside ``paper``. No saved token is sent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..core.embedding import can_embed, embed
from ..core.errors import BadInputError, EverytokenError
from ..core.files import write_text_whole
from .cards import Card, load_catalog
from .page.feed import plain
from .page.render import web
from .search import meaning_text

ID = re.compile(r"[0-9]{4}\.[0-9]{4,5}(?:v[0-9]+)?")
RELATED = 0.45
"""Least similarity of a paper and a card for the paper to belong to the card's station."""
MOST = 100
"""Papers that are read of an answer."""
TIME_LIMIT = 20


@dataclass(frozen=True)
class DailyPaper:
    """A paper on the list; texts are plain and of limited length.

    Attributes:
        arxiv: its id.
        title, summary: as listed.
        authors: how many.
        listed: the ISO date on which it was listed; empty where the list does not say.
        upvotes: as listed.
        code: an https address, or empty.
        station, nearest, similarity: the station to which it belongs, the card that is nearest to it and how near that
            is; empty and 0 where none is near or nothing can embed.
    """

    arxiv: str
    title: str
    summary: str
    authors: int
    listed: str
    upvotes: int
    code: str
    station: str = ""
    nearest: str = ""
    similarity: float = 0.0

    @property
    def url(self) -> str:
        return f"https://huggingface.co/papers/{self.arxiv}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"url": self.url}


@dataclass(frozen=True)
class DailyList:
    """A list as it was read.

    Attributes:
        date: the day that was asked for; empty for the latest.
        read: when the network gave it, in UTC.
        cached: whether it comes from the cache because there is no network.
        papers: in the list's order.
    """

    date: str
    read: datetime
    cached: bool
    papers: tuple[DailyPaper, ...]


def check_date(text: str) -> str:
    """An ISO date.

    Raises:
        BadInputError: it is none.
    """
    try:
        if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
            raise ValueError
        datetime.fromisoformat(text)
    except ValueError as error:
        raise BadInputError(f"{text!r} is not a date.", "Example: 2026-11-27") from error
    return text


def daily_papers(date: str = "", folder: Path | None = None, related: bool | None = None) -> DailyList:
    """The list of a day, or the latest.

    Args:
        date: ISO; empty for the latest.
        folder: of the cache; default below the cache folder.
        related: whether to mark what belongs to a station; default where the ``search`` extra is installed.

    Raises:
        BadInputError: ``date`` is none.
        EverytokenError: there is no network, and no cached answer for that day.
        MissingExtraError: ``related`` without the ``search`` extra.
    """
    if date:
        check_date(date)
    if folder is None:
        from ..core.converted import cache_dir

        folder = cache_dir() / "daily"
    try:
        answer, read, cached = fetch(date), datetime.now(UTC), False
    except Offline as error:
        answer, read = _kept(folder, date, str(error))
        cached = True
    else:
        text = json.dumps({"read": read.isoformat(), "date": date, "answer": answer})
        write_text_whole(folder / f"{date or 'latest'}.json", text)
    papers = read_answer(answer)
    if can_embed() if related is None else related:
        papers = mark(papers)
    return DailyList(date, read, cached, tuple(papers))


class Offline(Exception):
    """The list cannot be read from the network now."""


def fetch(date: str = "") -> list[Any]:
    """The raw answer of the public list.

    Raises:
        Offline: no network, or the server fails.
        EverytokenError: the answer is no list.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    parameters = {"limit": str(MOST)} | ({"date": date} if date else {})
    try:
        # headers of our own: the library's would carry the machine's saved token and ask the hub for a list of agents
        answer = get_session().get(
            f"{constants.ENDPOINT}/api/daily_papers",
            params=parameters,
            headers={"user-agent": "everytoken"},
            timeout=TIME_LIMIT,
        )
        answer.raise_for_status()
    except Exception as error:
        # offline mode is an OSError; a time limit, no route and a bad status are of the client (httpx or httpx2)
        if not isinstance(error, OSError) and not type(error).__module__.startswith("httpx"):
            raise
        raise Offline(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    try:
        found = answer.json()
    except ValueError as error:
        raise Offline("the answer is not JSON") from error
    if not isinstance(found, list):
        raise EverytokenError("The daily list has another form than expected.", "A newer everytoken may read it.")
    return found


def _kept(folder: Path, date: str, why: str) -> tuple[list[Any], datetime]:
    """The cached answer for a day; for the latest, whichever was read last."""
    found: list[tuple[datetime, str, list[Any]]] = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(kept["answer"], list):
                found.append((datetime.fromisoformat(kept["read"]), kept["date"], kept["answer"]))
        except (ValueError, KeyError, TypeError, OSError):
            continue  # a damaged file is no answer
    fitting = [item for item in found if not date or item[1] == date]
    if not fitting:
        days = ", ".join(sorted(item[1] or "the latest" for item in found))
        raise EverytokenError(
            f"The daily list cannot be read ({plain(why, 200)}), and no answer is cached"
            f"{f' for {date}' if date else ''}.",
            f"Cached: {days}." if days else "Try again with a network.",
        )
    read, _, answer = max(fitting, key=lambda item: item[0])
    return answer, read


def read_answer(answer: Sequence[Any]) -> list[DailyPaper]:
    """The papers of a raw answer; elements without a valid arXiv id or title are left out."""
    papers: dict[str, DailyPaper] = {}
    for element in answer[:MOST]:
        inner = element.get("paper") if isinstance(element, dict) else None
        if not isinstance(inner, dict):
            continue
        name, title = inner.get("id"), inner.get("title") or element.get("title")
        if not isinstance(name, str) or not ID.fullmatch(name) or not isinstance(title, str) or not plain(title):
            continue
        summary, authors, upvotes = (inner.get(key) for key in ("summary", "authors", "upvotes"))
        code = inner.get("githubRepo")
        listed = re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", str(inner.get("submittedOnDailyAt") or ""))
        papers[name] = DailyPaper(
            name,
            plain(title, 300),
            plain(summary if isinstance(summary, str) else ""),
            len(authors) if isinstance(authors, list) else 0,
            listed[0] if listed else "",
            upvotes if isinstance(upvotes, int) and not isinstance(upvotes, bool) else 0,
            web(code) if isinstance(code, str) else "",
        )
    return list(papers.values())


def mark(papers: Sequence[DailyPaper], cards: Sequence[Card] | None = None) -> list[DailyPaper]:
    """The papers with station and nearest card, where a card is near enough.

    Raises:
        MissingExtraError: the ``search`` extra is not installed.
    """
    from dataclasses import replace

    if not papers:
        return []
    # the card of this page is about pages, not about a method: every list of papers would be near to it
    cards = [card for card in (load_catalog().values() if cards is None else cards) if card.arxiv]
    purpose = "Marking what belongs to a station"
    theirs = embed([f"{paper.title}. {paper.summary}" for paper in papers], purpose)
    scores = theirs @ embed([meaning_text(card) for card in cards], purpose).T
    marked = []
    for paper, row in zip(papers, scores, strict=True):
        best = int(row.argmax())
        near = float(row[best])
        card = cards[best]
        marked.append(
            replace(paper, station=card.station, nearest=card.slug, similarity=round(near, 3))
            if near >= RELATED
            else paper
        )
    return marked
