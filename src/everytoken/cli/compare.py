"""``everytoken compare NAME NAME...``: several methods of a station in one run on the same work, with a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..core.errors import BadInputError
from ..decoding.trial import TrialRequest
from .common import (
    Calibrate,
    Peer,
    Weights,
    bars,
    build_trial,
    cards_of,
    check_image,
    emit_json,
    method_names,
    options_from,
    results_table,
    svg_bars,
    watched,
)
from .output import check_ending, check_files

EXAMPLES = (
    "Examples:  everytoken compare dyspec dyspec:threshold=none dyspec:budget=4  ·  "
    "everytoken compare tdpo tdpo:variant=tdpo1 --plot tdpo.svg  ·  everytoken compare stochastok:expand_prop=0.1 "
    "stochastok:expand_prop=0.5"
)


def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Methods; settings may follow a colon: dyspec:budget=8,threshold=none.", autocompletion=method_names
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder or .gguf file; default: the embedded model.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Your text; default: an example.")] = None,
    data: Annotated[Path | None, typer.Option(help="Your data, as for `everytoken try`.")] = None,
    image: Annotated[Path | None, typer.Option(help="Reducers: your image, as for `everytoken try`.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the plot as an SVG file.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write all traces as one HTML file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    dtype: Annotated[str, typer.Option()] = "auto",
    weights: Weights = "auto",
    calibrate: Calibrate = True,
    peer: Peer = "auto",
    steps: Annotated[int, typer.Option(min=1)] = 6,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Compare methods of one station: one run, the same work, a table and a plot."""
    split = [name.partition(":") for name in names]
    cards = cards_of([slug for slug, _, _ in split])
    trial = cards[0].load_trial()
    if any(card.load_trial() is not trial for card in cards):
        stations = sorted({card.station for card in cards})
        raise BadInputError(
            f"These methods do different work ({', '.join(stations)}) and cannot be compared.",
            "Name methods of one station that share a baseline.",
        )
    if len(set(names)) < len(names):
        raise BadInputError("A method is named twice.", "Give it other settings: dyspec:budget=8 dyspec:budget=32")
    trials = [
        build_trial(card, pairs.split(",") if pairs else [], name)
        for card, (_, _, pairs), name in zip(cards, split, names, strict=True)
    ]
    check_image(cards[0], image)
    check_ending(plot, "A plot", (".svg",))
    check_ending(trace, "Traces of several methods", (".html", ".htm"))
    check_files(plot, trace)
    options = options_from(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        dtype=dtype,
        weights=weights,
        calibrate=calibrate,
        peer=peer,
        steps=steps,
        seed=seed,
        image=None if image is None else str(image),
    )
    with watched(Console(stderr=True)) as (report, _):
        request = TrialRequest(trials, model, prompt, str(data) if data is not None else None, options, report=report)
        result = trial(request)
    if plot is not None:
        plot.write_text(svg_bars(result), encoding="utf-8")
    if trace is not None:
        from ..core.trace_html import render_html

        render_html(result.traces, trace, result.column, "everytoken compare", before="".join(result.pictures))
    if as_json:
        emit_json(result)
        return
    console = Console()
    console.print(results_table(result))
    bars(result, console)
    for note in result.notes:
        console.print(note, style="dim", highlight=False)
    for label, path in (("plot", plot), ("traces", trace)):
        if path is not None:
            console.print(f"{label} written to {path}", highlight=False)
