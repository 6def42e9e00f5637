"""What a page says of a paper: its card, what was measured, its picture, commands and trace."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.charts import bars_svg
from ...core.errors import BadInputError
from ...core.results import MeasuredClaim, formatted, formatted_interval
from ..cards import Card, load_catalog
from ..house import stations

VERDICTS = {
    "holds": "The direction held.",
    "contradicted": "The direction did not hold.",
    "undecided": "The direction is undecided.",
    "ran": "The quick version ran; it decides nothing.",
}
NO_RESULT = "Nothing has been measured yet."


@dataclass(frozen=True)
class Measured:
    """A measured claim as text.

    Attributes:
        metric, baseline, method, value, interval, paper, why: as in the scoreboard.
        verdict: ``holds``, ``contradicted``, ``undecided`` or ``ran``.
        told: the verdict in a sentence.
    """

    metric: str
    baseline: str
    method: str
    value: str
    interval: str
    paper: str
    why: str
    verdict: str
    told: str


@dataclass(frozen=True)
class Entry:
    """A paper on the site.

    Attributes:
        card: its facts.
        measured: its claims; empty without a result.
        experiment: what was run, in a sentence; empty without a result.
        updated: an ISO date: of the measurement, else of the preprint's month, else of the year.
        picture: an SVG of the first claim's figures, or empty.
        picture_text: what the picture shows, in words.
        trace: an HTML file that shows what the method decided for every token, or None.
    """

    card: Card
    measured: tuple[Measured, ...] = ()
    experiment: str = ""
    updated: str = ""
    picture: str = ""
    picture_text: str = ""
    trace: Path | None = None

    @property
    def verdict(self) -> str:
        """Of the first claim; empty without a result."""
        return self.measured[0].verdict if self.measured else ""

    @property
    def commands(self) -> list[str]:
        """What to type; the first tries it."""
        card = self.card
        if not card.implementation:
            return []
        if card.station == "catalog":
            return ["everytoken papers build site", "everytoken papers serve"]
        found = [f"everytoken try {card.slug}", f"everytoken try {card.slug} --trace trace.html"]
        found += [f"everytoken train {card.slug}"] if card.trainable else []
        return found + ([f"everytoken reproduce {card.slug} --quick"] if card.reproduction else [])


def entries(
    result_of: Callable[[Card], dict[str, Any] | None],
    traces: Path | None = None,
    cards: Sequence[Card] | None = None,
    pictures: bool = True,
) -> list[Entry]:
    """All papers, in the order in which a token passes their stations.

    Args:
        result_of: a card's result, brought up to date, or None.
        traces: a folder that holds ``SLUG.html`` for papers that have a trace.
        cards: default all.
        pictures: whether to draw them.

    Raises:
        BadInputError: ``traces`` is no folder, or holds a page of no paper.
    """
    cards = list(load_catalog().values()) if cards is None else list(cards)
    order = list(stations())
    cards.sort(key=lambda card: (order.index(card.station), card.slug))
    found = _traces(traces, {card.slug for card in cards}) if traces is not None else {}
    return [_entry(card, result_of(card), found.get(card.slug), pictures) for card in cards]


def _traces(folder: Path, known: Iterable[str]) -> dict[str, Path]:
    if not folder.is_dir():
        raise BadInputError(
            f"There is no folder {folder}.", "`everytoken try NAME --trace FOLDER/NAME.html` fills one."
        )
    found = {path.stem: path for path in sorted(folder.glob("*.html"))}
    if strange := sorted(set(found) - set(known)):
        raise BadInputError(f"{folder} holds traces of no paper: {', '.join(strange)}.", "Name a trace NAME.html.")
    return found


def _entry(card: Card, result: dict[str, Any] | None, trace: Path | None, pictures: bool) -> Entry:
    claims: list[MeasuredClaim] = result["claims"] if result else []
    picture, text = _picture(claims[0]) if claims and pictures else ("", "")
    return Entry(
        card,
        tuple(_measured(claim) for claim in claims),
        f"{result['summary']}; seeds: {len(result['seeds'])}; {result['date']}" if result else "",
        updated(card, result),
        picture,
        text,
        trace,
    )


def updated(card: Card, result: dict[str, Any] | None) -> str:
    """An ISO date that changes only when what is known of the paper does."""
    if result and re.fullmatch(r"\d{4}-\d{2}-\d{2}", str(result.get("date", ""))[:10]):
        return str(result["date"])[:10]
    if card.arxiv:
        return f"20{card.arxiv[:2]}-{card.arxiv[2:4]}-01"
    return f"{card.year}-01-01"


def _measured(claim: MeasuredClaim) -> Measured:
    alone = claim["kind"] == "value"
    baseline = f"bar: {claim['threshold']:.4g}" if alone else f"{claim['baseline']}: {claim['baseline_value']:.4g}"
    return Measured(
        claim["metric"],
        baseline,
        f"{claim['method']}: {claim['method_value']:.4g}",
        formatted(claim),
        formatted_interval(claim) or claim["note"],
        claim["paper"],
        claim.get("why", ""),
        claim["verdict"],
        VERDICTS[claim["verdict"]],
    )


def _picture(claim: MeasuredClaim) -> tuple[str, str]:
    """The first claim's figures as bars; nothing where one of them is no finite number."""
    other = f"bar: {claim['threshold']}" if claim["kind"] == "value" else claim["baseline"]
    reference = claim["threshold"] if claim["kind"] == "value" else claim["baseline_value"]
    values = {other: reference, claim["method"]: claim["method_value"]}
    numbers = {name: float(value) for name, value in values.items() if value is not None}
    if len(numbers) < 2:
        return "", ""
    try:
        text = f"{claim['metric']}: " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        return bars_svg(numbers, claim["metric"], baseline=other), text
    except BadInputError:
        return "", ""
