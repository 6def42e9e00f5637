"""``everytoken papers``: the catalogue in the terminal."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from ..catalog.cards import STATUSES, Card, find_card, load_catalog
from ..catalog.house import stations
from ..core.errors import UnknownNameError
from .output import print_json

EXAMPLES = (
    "Examples:  everytoken papers speculative  ·  everytoken papers --station preference --status implemented  ·  "
    "everytoken papers show tdpo  ·  everytoken papers --json | jq '.[].slug'"
)


class QueryOrCommand(TyperGroup):
    """Lets ``papers QUERY`` and ``papers show NAME`` live together: words that are no subcommand are a query."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        values = {"--station", "--year", "--status", "--limit"}
        for index, arg in enumerate(args):
            if arg.startswith("-") or (index and args[index - 1] in values):
                continue
            if arg not in self.commands:
                args = [*args[:index], "search", *args[index:]]
                # options given before the query belong to the search
                args = ["search", *args[:index], *args[index + 1 :]]
            break
        else:
            if not {"-h", "--help"} & set(args):
                args = ["search", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=QueryOrCommand,
    help="List, search and show the papers. With words it searches; without, it lists all.\n\n"
    "Options of the list: --station, --year, --status, --limit, --words, --json.",
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COLOURS = {"measured": "green", "implemented": "cyan", "planned": "dim"}


@app.command("search", hidden=True, epilog=EXAMPLES)
def search_papers(
    query: Annotated[list[str] | None, typer.Argument(help="Words to search for.")] = None,
    station: Annotated[str | None, typer.Option(help="Only this station (for example generation).")] = None,
    year: Annotated[
        int | None, typer.Option(help="Only this year: the venue's, or the preprint's where there is no venue.")
    ] = None,
    status: Annotated[
        str | None, typer.Option(help="implemented (all that run), measured (those with a result) or planned.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many; a search shows 10 by default.")] = None,
    words_only: Annotated[
        bool, typer.Option("--words", help="Search by words even if search by meaning is installed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List or search the papers."""
    if station is not None and station not in stations():
        raise UnknownNameError("station", station, stations())
    if status is not None and status not in STATUSES:
        raise UnknownNameError("status", status, STATUSES)
    cards = [
        card
        for card in load_catalog().values()
        if (station is None or card.station == station)
        and (year is None or card.year == year)
        and (status is None or card.status in _counted(status))
    ]
    text = " ".join(query or [])
    if text:
        from ..catalog.search import search

        cards = [card for card, _ in search(text, cards, meaning=False if words_only else None)]
        cards = cards[: limit or 10]
    else:
        order = list(stations())
        cards = sorted(cards, key=lambda card: (order.index(card.station), card.slug))[:limit]
    if as_json:
        print_json([card.as_dict() for card in cards])
        return
    console = Console()
    if not cards:
        wanted = [f"{text!r}"] if text else []
        given = (("station", station), ("year", year), ("status", status))
        wanted += [f"{name} {value}" for name, value in given if value is not None]
        console.print(f"No paper matches {', '.join(wanted)}.", style="yellow", markup=False, highlight=False)
        raise typer.Exit(1)
    console.print(_table(cards, console))
    count = f"{len(cards)} paper{'' if len(cards) == 1 else 's'}"
    console.print(f"{count}; everytoken papers show NAME tells more", style="dim", highlight=False)


def _counted(status: str) -> tuple[str, ...]:
    """The statuses that a filter lets through: a measured method is implemented too."""
    return ("implemented", "measured") if status == "implemented" else (status,)


def _table(cards: list[Card], console: Console) -> Table:
    """The list; narrow terminals get fewer columns, not broken words: names are there to be copied."""
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    heads = ("name", "station", "year", "status", "measured")
    rows = [(card.slug, card.station, "year", card.status, card.headline) for card in cards]
    widths = [max(len(head), *map(len, column)) for head, column in zip(heads, zip(*rows, strict=True), strict=True)]
    room = max(console.width - sum(widths[:-1]) - 2 * len(heads), 10)  # what a long figure may take, and no more
    for head, width in zip(heads[:-1], widths[:-1], strict=True):
        grid.add_column(head, no_wrap=True, min_width=width)
    widths[-1] = min(widths[-1], room)
    grid.add_column(heads[-1], no_wrap=True, overflow="ellipsis", max_width=widths[-1])
    roomy = console.width >= 110
    if roomy:
        used = sum(widths) + 2 * len(heads)
        grid.add_column("what it does", no_wrap=True, overflow="ellipsis", max_width=max(console.width - used, 20))
    for card in cards:
        colour = COLOURS[card.status]
        row = [f"[bold]{card.slug}[/]", card.station, str(card.year), f"[{colour}]{card.status}[/]", card.headline]
        grid.add_row(*row, *([card.summary] if roomy else []))
    return grid


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A method's name or arXiv id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show one paper: facts, claim, what was measured, and the command to try it."""
    card = find_card(name)
    if as_json:
        print_json(card.as_dict())
        return
    console = Console()
    console.print(f"[bold]{card.title}[/]", highlight=False)
    grid = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("paper", card.url)
    grid.add_row("authors", str(card.authors) if card.authors else "not recorded")
    earlier = f" (preprint {card.preprint_year})" if card.preprint_year not in (None, card.year) else ""
    grid.add_row("year", f"{card.year}{earlier}")
    grid.add_row("station", f"{card.station} ({stations()[card.station]})")
    grid.add_row("official code", card.code or "none known")
    grid.add_row("what it does", card.summary)
    grid.add_row("claim", f"{card.claim}: {card.figure}")
    grid.add_row("status", f"[{COLOURS[card.status]}]{card.status}[/]")
    result = card.result()
    if result is not None:
        from ..reproduce.base import STYLES, baseline_text, formatted, formatted_interval
        from ..reproduce.files import up_to_date

        for claim in up_to_date(result)["claims"]:
            style = STYLES[claim["verdict"]]
            grid.add_row(
                "measured",
                f"{claim['metric']}: [bold]{formatted(claim)}[/], [{style}]{claim['verdict']}[/] "
                f"({formatted_interval(claim) or claim['note']}; {claim['method']} {claim['method_value']:.4g} against "
                f"{baseline_text(claim)}; paper: {claim['paper']})",
            )
    if card.implementation and card.station != "catalog":
        grid.add_row("code here", card.implementation)
        grid.add_row("try it", f"everytoken try {card.slug}")
    elif card.implementation:
        grid.add_row("code here", card.implementation)
        grid.add_row("try it", "everytoken papers build site")
    if card.reproduction:
        grid.add_row("reproduce it", f"everytoken reproduce {card.slug}")
    console.print(grid)
