"""``everytoken train NAME``: trains what a method needs, from a typed configuration."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..catalog.cards import find_card
from ..catalog.house import load_house
from .common import first_process, leave_processes, print_outcome, stages
from .output import check_folder, print_json

EXAMPLES = (
    "Examples:  everytoken train tgdpo --data pairs/train.jsonl --set steps=50  ·  "
    "everytoken train r2r --data prompts.txt --out router  ·  "
    "everytoken train r2r --model large/ --set small=small/ --set verifier=checks:final_number --config r2r.yaml"
)


def combined() -> dict[str, str]:
    """What trains several methods together, by the files of the stations: name -> ``module:attribute``."""
    return {name: path for place in load_house().values() for name, path in place.trainings.items()}


def trainable(incomplete: str) -> list[str]:
    """Names of methods that can be trained, for shell completion."""
    from ..catalog.cards import load_catalog

    names = [*combined(), *(card.slug for card in load_catalog().values() if card.trainable)]
    return [name for name in names if name.startswith(incomplete)]


def train(
    name: Annotated[str, typer.Argument(help="A method's name or arXiv id.", autocompletion=trainable)],
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder or .gguf file; default: the embedded model.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Your data; default: the method's own example.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings as YAML, one `key: value` a line.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting, key=value; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default: the method's name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Train a method's router, loss or model; an unknown --set names those there are."""
    from ..core.errors import require
    from ..training.base import TrainingContext, read_config

    wanted = name.strip().lower()
    if wanted in (others := combined()):
        require("trl", "train", f"Training {wanted}")
        module, _, attribute = others[wanted].partition(":")
        slug, training = wanted, getattr(import_module(module), attribute)
    else:
        card = find_card(name)
        slug, training = card.slug, card.load_training()
    chosen = read_config(training, config, settings or [])
    folder = out or Path(slug)
    check_folder(folder)
    if training.extra is not None:
        require(training.extra[1], training.extra[0], f"Training {slug}")
    status = Console(stderr=True)
    if first_process():
        status.print(f"[bold]{slug}[/]: {training.summary}", highlight=False)
    with stages(status) as report:
        result = training.run(chosen, TrainingContext(model, str(data) if data is not None else None, folder, report))
    leave_processes()
    if not first_process():
        return
    if as_json:
        print_json({"figures": result.figures, "files": [str(path) for path in result.files]})
        return
    console = Console()
    print_outcome(result.figures, result.files, console)
    for note in result.notes:
        console.print(note, style="dim", highlight=False)
