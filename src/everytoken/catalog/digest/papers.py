"""What a digest could hold: the cards that run, and what the daily list brings to a station."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..daily import DailyPaper
from ..page.entries import Entry
from ..page.feed import address, check_base, told
from .mail import Paper


def from_entries(entries: Iterable[Entry], base: str) -> list[Paper]:
    """The methods that run, the latest first; one that is only planned becomes new when it runs."""
    base = check_base(base)
    running = [entry for entry in entries if entry.card.status != "planned"]
    running.sort(key=lambda entry: entry.updated, reverse=True)
    return [
        Paper(
            f"card:{entry.card.slug}",
            entry.card.title,
            f"{entry.card.summary} {told(entry)}",
            address(base, f"papers/{entry.card.slug}.html"),
            (entry.card.station,),
        )
        for entry in running
    ]


def from_daily(papers: Iterable[DailyPaper], entries: Sequence[Entry]) -> list[Paper]:
    """What on a daily list belongs to a station and is none of the catalogue's own papers."""
    own = {entry.card.arxiv for entry in entries}
    found = {}
    for paper in papers:
        name = paper.arxiv.partition("v")[0]  # a later version is no new paper
        if paper.station and name not in own:
            text = f"Near to {paper.nearest}. {paper.summary}"
            found[name] = Paper(f"arxiv:{name}", paper.title, text, paper.url, (paper.station,))
    return list(found.values())
