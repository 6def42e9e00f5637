"""What ``try`` and ``compare`` share: building a request, printing figures and plots."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..catalog.cards import Card, find_card
from ..core.errors import BadInputError, UnknownNameError
from ..core.progress import Report
from ..core.settings import check_file, parse_settings, settable
from ..decoding.trial import Trial, TrialResult
from .output import print_json

if TYPE_CHECKING:
    from rich.progress import Progress

WEIGHTS_HELP = "Decoders: how linear layers run: auto (the fastest that changes no result), 'as they come', packed, "
WEIGHTS_HELP += "bfloat16 or int4."
PEER_HELP = "Decoders: llama.cpp, another engine, beside them on the same GGUF file: auto (where installed), none or "
PEER_HELP += "llama.cpp."
Weights = Annotated[str, typer.Option(help=WEIGHTS_HELP)]
Calibrate = Annotated[
    bool,
    typer.Option(help="Measure on first use which way is the fastest here (a few seconds, kept), or measure nothing."),
]
Peer = Annotated[str, typer.Option(help=PEER_HELP)]
"""Options of several commands."""


def method_names(incomplete: str) -> list[str]:
    """Names of runnable methods, for shell completion."""
    from ..catalog.cards import load_catalog

    return [card.slug for card in load_catalog().values() if card.implementation and card.slug.startswith(incomplete)]


def build_trial(card: Card, pairs: list[str], name: str | None = None, extra: dict[str, Any] | None = None) -> Trial:
    """A card, its ``--set`` pairs and further settings as a trial; all are checked before anything is loaded."""
    factory = card.load()
    if not settable(factory):
        raise BadInputError(
            f"{card.slug} is not a method that can be tried.",
            "`everytoken papers --status implemented` lists what runs.",
        )
    settings = parse_settings(card.slug, factory, pairs)
    for key, value in (extra or {}).items():
        if key not in {item.name for item in dataclasses.fields(factory)}:
            raise BadInputError(f"{card.slug} takes no --{key}.", "Constraints (xgrammar, awrs) do.")
        settings[key] = value
    needed = [item for item in dataclasses.fields(factory) if item.init and item.default is item.default_factory]
    if not needed:  # nothing but settings (some methods are built around a tokenizer)
        factory(**settings)  # out-of-range values are refused now, not after the model has loaded
    return Trial(name or card.slug, factory, settings)


def build_settings(name: str, pairs: list[str]) -> dict[str, Any]:
    """``--set`` pairs of a method, typed."""
    return parse_settings(name, find_card(name).load(), pairs)


def check_image(card: Card, image: Path | None) -> None:
    """Refuses an image for methods that read none, and a file that is not there, before anything is loaded."""
    if image is None:
        return
    if not getattr(sys.modules[card.load_trial().__module__], "READS_IMAGES", False):
        raise BadInputError(f"{card.slug} takes no --image.", "Reducers of visual tokens do.")
    check_file(image)


def check_column(card: Card, trials: list[Trial], column: str | None) -> None:
    """Refuses a trace column that none of the methods fills, before anything is loaded.

    Raises:
        UnknownNameError: none of the columns that the methods declare; suggests the nearest.
    """
    if column is None:
        return
    asked = getattr(sys.modules[card.load_trial().__module__], "trace_columns", None)
    known: dict[str, None] = {}
    for item in trials:
        declared = asked(item) if asked is not None else getattr(item.factory, "trace_columns", None)
        if not isinstance(declared, tuple):  # a method from outside that does not say: its traces will
            return
        known |= dict.fromkeys(declared)
    if column not in known:
        raise UnknownNameError(f"trace column of {card.slug}", column, known)


def first_process() -> bool:
    """Whether this is the first process of ``accelerate launch``, or the only one: it alone speaks."""
    return os.environ.get("RANK", "0") == "0"


def leave_processes() -> None:
    """Ends the process group of ``accelerate launch``, where there is one, while Python still runs.

    gloo's threads let go of a collective's tensors after the collective has ended (of the last barrier's too) and need
    the interpreter for it. Where it is shutting down already they abort the process, and the launcher calls a finished
    training failed.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    distributed.destroy_process_group()
    time.sleep(0.2)  # the threads cannot be joined: this lets them take the interpreter's lock, which they wait for


def _live(console: Console, **options: Any) -> Progress:
    """A bar that is taken away at the end, with what is done and the time. Where no total is known, it says neither a
    count nor what is left.
    """
    from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn

    class Told(ProgressColumn):
        def render(self, task: Task) -> Text:
            spent = timedelta(seconds=int(task.elapsed or 0))
            if task.total is None:
                return Text(str(spent), "progress.elapsed")
            left = "" if task.time_remaining is None else f", {timedelta(seconds=int(task.time_remaining))} left"
            return Text(f"{task.completed:,.0f}/{task.total:,.0f}, {spent}{left}", "progress.elapsed")

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), Told())
    return Progress(*columns, console=console, transient=True, **options)


@contextlib.contextmanager
def stages(console: Console) -> Iterator[Report]:
    """A progress bar for work in stages: yields ``report(stage, done, total)``.

    What follows a comma in the stage may change.

    Under ``accelerate launch`` only the first process shows it.
    """
    with _live(console, disable=not first_process()) as progress:
        task = progress.add_task("starting", total=None)
        stage = [""]

        def report(text: str, done: int, total: int) -> None:
            if text.split(",")[0] != stage[0]:  # a new stage: its time is estimated anew
                stage[0] = text.split(",")[0]
                progress.reset(task)
            progress.update(task, description=text, completed=done, total=total or None)

        yield report


def lines(console: Console) -> Report:
    """A report that prints a line a stage, when the stage begins."""
    stage = [""]

    def report(text: str, _done: int, _total: int) -> None:
        if text.split(",")[0] != stage[0]:
            stage[0] = text.split(",")[0]
            console.print(f"{text} ...", style="dim", highlight=False)

    return report


@contextlib.contextmanager
def watched(console: Console, silence: bool = False) -> Iterator[tuple[Report, Callable[[], None]]]:
    """A report for work that may print text of its own: a live bar on a terminal, else a line a stage.

    Yields ``(report, quiet)``: ``quiet()`` takes the bar away before anything else is printed beside it; the next stage
    brings it back. The bar counts what is done, and says how long the rest will take where the total is known.

    Args:
        silence: show nothing live even on a terminal.
    """
    if silence or not console.is_terminal:
        yield lines(console), lambda: None
        return
    progress = _live(console, refresh_per_second=4)
    task = progress.add_task("starting", total=None)
    stage, hidden = "", False

    def report(text: str, done: int, total: int) -> None:
        nonlocal stage, hidden
        head = text.split(",")[0]
        if head != stage:
            stage, hidden = head, False
            progress.reset(task)
            progress.start()
        if not hidden:
            progress.update(task, description=text, completed=done, total=total or None)

    def quiet() -> None:
        nonlocal hidden
        if not hidden:
            hidden = True
            progress.stop()

    progress.start()
    try:
        yield report, quiet
    finally:
        progress.stop()


def print_outcome(figures: dict[str, float], files: Iterable[Path], console: Console) -> None:
    """Figures in a column, then the files that were written."""
    width = max(map(len, figures), default=0)
    for label, value in figures.items():
        console.print(f"{label:<{width}}  {figure(value)}", highlight=False)
    for path in files:
        console.print(f"written: {path}", highlight=False)


def options_from(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def figure(value: float) -> str:
    return (
        f"{value:,.0f}"
        if float(value).is_integer() and abs(value) >= 1
        else f"{value:.3g}"
        if abs(value) < 100
        else f"{value:,.1f}"
    )


def results_table(result: TrialResult) -> Table:
    """All figures: one row a metric, one column a method (methods are few, metrics are many)."""
    metrics = list(dict.fromkeys(metric for row in result.rows.values() for metric in row))
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    grid.add_column("")
    for name in result.rows:
        grid.add_column(name, justify="right", overflow="fold")
    for metric in metrics:
        cells = [figure(row[metric]) if metric in row else "" for row in result.rows.values()]
        grid.add_row(metric, *cells, style="bold" if metric == result.headline else "")
        if metric == result.headline:
            ratios = ["" if name == result.baseline else f"{result.ratio(name):.2f}x" for name in result.rows]
            grid.add_row(f"  ratio to {result.baseline}", *ratios, style="bold green")
    return grid


def bars(result: TrialResult, console: Console, width: int = 40) -> None:
    """The headline metric as bars in the terminal."""
    values = {name: row.get(result.headline, 0.0) for name, row in result.rows.items()}
    top = max([abs(value) for value in values.values()] or [0.0]) or 1.0
    label = max(map(len, values))
    console.print(f"\n[bold]{result.headline}[/]", highlight=False)
    for name, value in values.items():
        length = abs(value) / top * width
        bar = "█" * int(length) + ("▌" if length - int(length) >= 0.5 else "")
        console.print(
            f"{name:<{label}}  [{'dim' if name == result.baseline else 'cyan'}]{bar}[/] {figure(value)}",
            highlight=False,
        )


def svg_bars(result: TrialResult) -> str:
    """The headline metric as a bar chart in one self-contained SVG."""
    from ..core.charts import bars_svg

    values = {name: row.get(result.headline, 0.0) for name, row in result.rows.items()}
    notes = {
        name: figure(value) + ("" if name == result.baseline else f"  ({result.ratio(name):.2f}x)")
        for name, value in values.items()
    }
    drawn = {name: value if isfinite(value) else 0.0 for name, value in values.items()}  # its note says what it is
    return bars_svg(drawn, result.headline, baseline=result.baseline, notes=notes)


def emit_json(result: TrialResult, **extra: Any) -> None:
    payload = {
        "headline": result.headline,
        "baseline": result.baseline,
        "rows": result.rows,
        "notes": result.notes,
    } | extra
    print_json(payload | {"texts": result.texts})


def cards_of(names: list[str]) -> list[Card]:
    return [find_card(name) for name in names]
