"""``everytoken reproduce NAME`` runs a paper's experiment; ``everytoken scoreboard`` writes the page of all results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..catalog.cards import find_card
from .common import check_outputs, method_names

EXAMPLES = "Examples:  everytoken reproduce dyspec --quick  ·  everytoken reproduce tdpo --seeds 1 --out results"
SCOREBOARD_EXAMPLES = "Example:  everytoken scoreboard --results results --out docs/scoreboard.md"


def reproduce(
    name: Annotated[str, typer.Argument(help="A method's name or arXiv id.", autocompletion=method_names)],
    quick: Annotated[bool, typer.Option("--quick", help="A small version that takes a minute or two.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder or .gguf file; default: the embedded model.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds; default: the experiment's own.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the result file.")] = Path("results"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore seeds that an interrupted run has finished.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run baseline and method on the same work and compare with the paper's figure."""
    experiment = find_card(name).load_reproduction()
    check_outputs(out)
    from ..reproduce.base import execute, table, write

    result = execute(experiment, quick, model, seeds, Console(stderr=True), fresh)
    path = write(result, out)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    console = Console()
    console.print(table(result))
    for why in dict.fromkeys(claim["why"] for claim in result["claims"] if claim["why"]):
        console.print(f"Why it differs from the paper: {why}", style="dim", highlight=False)
    console.print(f"result written to {path}", highlight=False)


def scoreboard(
    results: Annotated[Path, typer.Option(help="Folder of result files.")] = Path("results"),
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("docs/scoreboard.md"),
) -> None:
    """Write the scoreboard page from the result files."""
    from ..reproduce.base import load_results
    from ..reproduce.base import scoreboard as render

    check_outputs(out)
    found = load_results(results)
    out.write_text(render(found), encoding="utf-8")
    Console().print(f"{len(found)} result(s) -> {out}", highlight=False)
