"""``everytoken data``: preference data that a model makes of itself, and tasks with checkable answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..core.settings import parse_settings, settable
from ..training.datasets.base import DataKind
from ..training.datasets.make_dataset import data_kinds, make_dataset
from .common import print_outcome, stages
from .output import check_folder, print_json

app = typer.Typer(
    no_args_is_help=True,
    help="Make data offline: a model's own texts, ranked by a program, or tasks whose answers a program checks.",
    epilog="Examples:  everytoken data sentiment --out pairs  ·  "
    "everytoken data arithmetic --set task=gcd --set samples=16  ·  everytoken data tasks --set task=countdown",
)

Model = Annotated[str | None, typer.Option(help="Hub id, folder or .gguf file; default: the embedded model.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="A setting, key=value; repeatable.")]
Out = Annotated[Path | None, typer.Option(help="Folder to write to; default: the name of the data.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]


def _command(kind: DataKind) -> Callable[..., None]:
    def make(model: Model = None, settings: Settings = None, out: Out = None, as_json: AsJson = False) -> None:
        chosen = kind.settings(**parse_settings(kind.name, kind.settings, settings or []))
        folder = out or Path(kind.name)
        check_folder(folder)
        status = Console(stderr=True)
        with stages(status) as report:
            made = make_dataset(kind.name, chosen, model, report, folder)
        if as_json:
            files = [str(path) for path in made.files]
            print_json({"figures": made.figures, "files": files, "kept": made.kept})
            return
        if made.kept:
            status.print("taken from the cache: the same settings were made before", style="dim")
        print_outcome(made.figures, made.files, Console())

    return make


for _kind in data_kinds().values():
    _names = ", ".join(settable(_kind.settings))
    app.command(_kind.name, help=_kind.summary, epilog=f"Settings: {_names}.")(_command(_kind))
