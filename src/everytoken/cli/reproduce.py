"""``everytoken reproduce NAME`` runs a paper's experiment; ``everytoken scoreboard`` writes the page of all results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..catalog.cards import find_card, load_catalog
from ..core.errors import BadInputError
from .common import WEIGHTS_HELP, Calibrate, method_names
from .output import check_files, check_folder, print_json

if TYPE_CHECKING:
    from ..reproduce.base import Reproduction
    from ..reproduce.files import Result, Scale

EXAMPLES = (
    "Examples:  everytoken reproduce dyspec --scale quick  ·  everytoken reproduce tdpo --seeds 1 --out results  ·  "
    "everytoken reproduce sums --control"
)
SCOREBOARD_EXAMPLES = "Example:  everytoken scoreboard --results results --out docs/scoreboard.md"


def reproduce(
    name: Annotated[
        str,
        typer.Argument(help="A method's name or arXiv id; with --control, a test bed's.", autocompletion=method_names),
    ],
    scale: Annotated[
        str | None,
        typer.Option(help="quick (a minute or two), cpu (the default: hours at most, on two cores) or gpu."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The same as --scale quick.")] = False,
    control: Annotated[
        bool, typer.Option("--control", help="Run a test bed's positive control: can the bed decide anything?")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder or .gguf file; default: the embedded model.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help=f"{WEIGHTS_HELP} Default: the experiment's own; it refuses others by name.")
    ] = None,
    calibrate: Calibrate = True,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds; default: the experiment's own.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the result file.")] = Path("results"),
    resume: Annotated[
        bool,
        typer.Option("--resume/--fresh", help="Go on where an interrupted run stopped, or run everything anew."),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run baseline and method on the same work and compare with the paper's figure."""
    chosen = _scale(scale, quick)
    experiment = _control(name) if control else find_card(name).load_reproduction()
    check_folder(out)
    from ..reproduce.base import execute, table
    from ..reproduce.files import write

    result = execute(
        experiment,
        chosen,
        model=model,
        seeds=seeds,
        console=Console(stderr=True),
        fresh=not resume,
        weights=weights,
        calibrate=calibrate,
    )
    path = write(result, out / "beds" if control else out)
    if as_json:
        print_json(result)
        return
    console = Console()
    console.print(table(result))
    for why in dict.fromkeys(claim["why"] for claim in result["claims"] if claim["why"]):
        console.print(f"Why it differs from the paper: {why}", style="dim", highlight=False)
    ways = dict.fromkeys(kept["weights"] for kept in result["artifacts"].values() if "weights" in kept)
    if ways:
        console.print(f"Weights: {', '.join(ways)} (choose with --weights).", style="dim", highlight=False)
    console.print(_conclusion(result, control), highlight=False)
    console.print(f"result written to {path}", highlight=False)


def scoreboard(
    results: Annotated[Path, typer.Option(help="Folder of result files.")] = Path("results"),
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("docs/scoreboard.md"),
    remeasure: Annotated[
        bool,
        typer.Option(
            "--remeasure", help="First write the files' claims anew: today's claims over the runs that the files hold."
        ),
    ] = False,
) -> None:
    """Write the scoreboard page from the result files."""
    from ..reproduce.base import measured_claims
    from ..reproduce.files import load_results, write
    from ..reproduce.scoreboard import scoreboard as render

    check_files(out)
    found = load_results(results)
    if remeasure:
        catalog = load_catalog()
        for result in found:
            card = catalog.get(result["name"])
            if card is not None and card.reproduction:
                result["claims"] = measured_claims(card.load_reproduction(), result["runs"])
            write(result, results)
    out.write_text(render(found, load_results(results / "beds")), encoding="utf-8")
    Console().print(f"{len(found)} result(s) -> {out}", highlight=False)


def _scale(scale: str | None, quick: bool) -> Scale:
    """The scale that two options name.

    Raises:
        BadInputError: an unknown one, or two that differ.
    """
    from ..reproduce.files import SCALES

    if quick and scale not in (None, "quick"):
        raise BadInputError(f"--quick and --scale {scale} ask for different runs.", "Give one of them.")
    wanted = "quick" if quick else scale or "cpu"
    for known in SCALES:
        if known == wanted:
            return known
    raise BadInputError(f"There is no scale {wanted!r}.", f"Scales: {', '.join(SCALES)}.")


def _control(name: str) -> Reproduction:
    """The positive control of a bed, or of the bed that a method's experiment stands on."""
    from ..reproduce.beds.base import BEDS, control, find_bed

    if name in BEDS:
        return control(find_bed(name))
    if name not in load_catalog():
        find_bed(name)  # raises, and names what is near
    bed = find_card(name).load_reproduction().bed
    if not bed:
        raise BadInputError(f"{name} stands on no shared test bed.", f"Test beds: {', '.join(BEDS)}.")
    return control(find_bed(bed))


def _conclusion(result: Result, control: bool) -> str:
    """What may be said after a run, in one line."""
    if control:
        from ..reproduce.beds.base import can_decide

        verdict = "can decide" if can_decide(result) else "cannot decide at this scale and with these seeds"
        return f"The bed {result['name'].removeprefix('bed-')} {verdict}."
    verdicts = [claim["verdict"] for claim in result["claims"]]
    if "ran" in verdicts:
        return "Claims marked 'ran' say only that both arms ran: a quick run's interval does not tell them apart."
    return f"{verdicts.count('holds')} of {len(verdicts)} claims hold."
