"""``everytoken try NAME``: one method on your own prompt or data, beside its baseline, with its trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..catalog.cards import find_card
from ..decoding.trial import TrialRequest
from .common import (
    build_trial,
    check_outputs,
    emit_json,
    lines,
    method_names,
    options_from,
    results_table,
)

EXAMPLES = (
    "Examples:  everytoken try dyspec  ·  everytoken try dyspec --prompt 'Tell me about owls' --set budget=12 "
    "--trace owls.html  ·  "
    "everytoken try stochastok --prompt 'unbelievable strawberries' --set expand_prop=0.5  ·  everytoken try tdpo "
    "--data pairs.jsonl  ·  "
    "everytoken try xgrammar --schema person.json  ·  everytoken try awrs --constraint checks:is_sql"
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
    steps: Annotated[int, typer.Option(min=1, help="Training steps (preference losses).")] = 6,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Try a method on your own prompt or data, next to its baseline."""
    card = find_card(name)
    given = {"schema": schema, "regex": regex, "grammar": grammar, "constraint": constraint}
    item = build_trial(card, settings or [], extra={key: value for key, value in given.items() if value is not None})
    check_outputs(trace)
    console = Console()
    status = Console(stderr=True)
    streamed: list[str] = []

    def stream(text: str) -> None:
        streamed.append(text)
        if not as_json:
            print(text, end="", flush=True)

    options = options_from(max_new_tokens=max_new_tokens, temperature=temperature, dtype=dtype, steps=steps, seed=seed)
    request = TrialRequest(
        [item], model, prompt, str(data) if data is not None else None, options, stream, lines(status)
    )
    result = card.load_trial()(request)
    if trace is not None:
        if trace.suffix in (".jsonl", ".parquet"):
            result.traces[0].save(trace)
        else:
            from ..core.trace_html import render_html

            render_html(result.traces, trace, column or result.column, title=f"everytoken try {card.slug}")
    if as_json:
        emit_json(result, trace=str(trace) if trace is not None else None)
        return
    if streamed:
        print()
    console.print()
    for item_trace in result.traces:
        item_trace.print(column or result.column, console)
        console.print()
    console.print(results_table(result))
    for note in result.notes:
        console.print(note, style="dim", highlight=False)
    if trace is not None:
        console.print(f"trace written to {trace}", highlight=False)
