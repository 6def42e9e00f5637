"""``everytoken try NAME``: one method on your own prompt or data, beside its baseline, with its trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..catalog.cards import find_card
from ..core.errors import UnknownNameError
from ..core.trace import TokenTrace
from ..decoding.trial import TrialRequest
from .common import (
    Calibrate,
    Peer,
    Weights,
    build_trial,
    check_column,
    check_image,
    emit_json,
    method_names,
    options_from,
    results_table,
    watched,
)
from .output import TRACES, check_ending, check_files

EXAMPLES = (
    "Examples:  everytoken try dyspec  ·  everytoken try dyspec --prompt 'Tell me about owls' --set budget=12 "
    "--trace owls.html  ·  "
    "everytoken try stochastok --prompt 'unbelievable strawberries' --set expand_prop=0.5  ·  everytoken try tdpo "
    "--data pairs.jsonl  ·  "
    "everytoken try xgrammar --schema person.json  ·  everytoken try awrs --constraint examples.checks:is_sql"
)


def try_method(
    name: Annotated[str, typer.Argument(help="A method's name or arXiv id.", autocompletion=method_names)],
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder or .gguf file; default: the embedded model.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Your text; default: an example.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Your data: text for tokenizers, JSONL pairs for preference losses.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Reducers: your image; default: scenes with questions.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the method, key=value; repeatable.")
    ] = None,
    schema: Annotated[str | None, typer.Option(help="Constraints: a JSON Schema, as a file or as text.")] = None,
    regex: Annotated[str | None, typer.Option(help="Constraints: a regular expression for the whole text.")] = None,
    grammar: Annotated[str | None, typer.Option(help="Constraints: an EBNF grammar, as a file or as text.")] = None,
    constraint: Annotated[
        str | None, typer.Option(help="Constraints: a Python function text -> bool, module:function.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Write the trace as one HTML file (or .jsonl, .parquet).")] = None,
    column: Annotated[str | None, typer.Option(help="The trace's column to colour by.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    weights: Weights = "auto",
    calibrate: Calibrate = True,
    peer: Peer = "none",
    steps: Annotated[int, typer.Option(min=1, help="Training steps (preference losses).")] = 6,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Try a method on your own prompt or data, next to its baseline."""
    card = find_card(name)
    given = {"schema": schema, "regex": regex, "grammar": grammar, "constraint": constraint}
    item = build_trial(card, settings or [], extra={key: value for key, value in given.items() if value is not None})
    check_column(card, [item], column)
    check_image(card, image)
    check_ending(trace, "A trace", TRACES)
    check_files(trace)
    console = Console()
    streamed: list[str] = []
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
    with watched(Console(stderr=True)) as (report, quiet):

        def stream(text: str) -> None:
            streamed.append(text)
            if not as_json:
                quiet()
                print(text, end="", flush=True)

        request = TrialRequest([item], model, prompt, str(data) if data is not None else None, options, stream, report)
        result = card.load_trial()(request)
    if column is not None and not any(column in found.columns for found in result.traces):
        known = dict.fromkeys(name for found in result.traces for name in found.columns)
        raise UnknownNameError(f"trace column of {card.slug}", column, known)
    written: list[Path] = []
    if trace is not None:
        if trace.suffix.lower() in (".jsonl", ".parquet"):
            written = _save(result.traces, trace)
        else:
            from ..core.trace_html import render_html

            title, pictures = f"everytoken try {card.slug}", "".join(result.pictures)
            render_html(result.traces, trace, column or result.column, title=title, before=pictures)
            written = [trace]
    if as_json:
        names = [str(path) for path in written]
        emit_json(result, trace=names[0] if len(names) == 1 else names or None)
        return
    if streamed:
        print()
    console.print()
    for found in result.traces:
        chosen = column or result.column
        found.print(chosen if chosen in found.columns else None, console)
        console.print()
    console.print(results_table(result))
    for note in result.notes:
        console.print(note, style="dim", highlight=False)
    for path in written:
        console.print(f"trace written to {path}", highlight=False)


def _save(traces: list[TokenTrace], path: Path) -> list[Path]:
    """Saves one trace under the path; several as ``NAME-1``, ``NAME-2``, since such a file holds one.

    Returns:
        What was written.
    """
    if len(traces) == 1:
        return [traces[0].save(path)]
    return [trace.save(path.with_stem(f"{path.stem}-{number}")) for number, trace in enumerate(traces, 1)]
