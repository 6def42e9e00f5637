"""``everytoken data``: preference data that a model makes of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .common import check_outputs, print_outcome, stages

app = typer.Typer(
    no_args_is_help=True,
    help="Make preference data offline: a model's own texts, ranked by a program.",
    epilog="Examples:  everytoken data sentiment --out pairs  ·  everytoken data arithmetic --set task=gcd --set samples=16",
)

Model = Annotated[str | None, typer.Option(help="Hub id, folder or .gguf file; default: the embedded model.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="A setting, key=value; repeatable.")]
Out = Annotated[Path | None, typer.Option(help="Folder to write to; default: the name of the data.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]


@app.command(epilog="Settings: count, seed, margin, max_new_tokens, prompts (a file of openings, one a line).")
def sentiment(model: Model = None, settings: Settings = None, out: Out = None, as_json: AsJson = False) -> None:
    """Continuations of openings, the better of two by a sentiment lexicon preferred."""
    _build("sentiment", model, settings or [], out, as_json)


@app.command(epilog="Settings: task, count, seed, samples, temperature, max_new_tokens, per_question.")
def arithmetic(model: Model = None, settings: Settings = None, out: Out = None, as_json: AsJson = False) -> None:
    """A model's own correct and incorrect answers to tasks that can be checked."""
    _build("arithmetic", model, settings or [], out, as_json)


def _build(kind: str, model: str | None, pairs: list[str], out: Path | None, as_json: bool) -> None:
    from ..core.settings import parse_settings
    from ..training.datasets.make_dataset import KINDS, build

    settings = KINDS[kind](**parse_settings(kind, KINDS[kind], pairs))
    folder = out or Path(kind)
    check_outputs(folder)
    status = Console(stderr=True)
    with stages(status) as report:
        built = build(kind, settings, model, report, folder)
    if as_json:
        typer.echo(
            json.dumps(
                {"figures": built.figures, "files": [str(path) for path in built.files], "kept": built.kept}, indent=1
            )
        )
        return
    console = Console()
    if built.kept:
        status.print("taken from the cache: the same settings were made before", style="dim")
    print_outcome(built.figures, built.files, console)
