"""The command line's entry: verbs, errors and exit codes.

Exit codes: 0 done, 1 failed, 2 bad input, 3 a missing extra, 4 the cache cannot be used, 130 interrupted.
"""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from ..core.errors import EverytokenError
from . import compare, data, doctor, papers, reproduce, tokenizer, train, try_

app = typer.Typer(
    name="everytoken",
    help="Try, compare and reproduce methods that treat each token of a language model as a decision.",
    epilog="First steps:  everytoken papers  ·  everytoken try dyspec  ·  everytoken doctor",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        from .. import __version__

        typer.echo(f"everytoken {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


app.add_typer(papers.app, name="papers")
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(data.app, name="data")
app.command("try", epilog=try_.EXAMPLES)(try_.try_method)
app.command("compare", epilog=compare.EXAMPLES)(compare.compare)
app.command("train", epilog=train.EXAMPLES)(train.train)
app.command("reproduce", epilog=reproduce.EXAMPLES)(reproduce.reproduce)
app.command("scoreboard", epilog=reproduce.SCOREBOARD_EXAMPLES)(reproduce.scoreboard)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)


def main() -> None:
    """Runs the command line; prints errors of this library as sentences, not tracebacks."""
    errors = Console(stderr=True)
    try:
        app()
    except EverytokenError as error:
        errors.print("error", style="bold red", end=" ")
        errors.print(error.message, markup=False, highlight=False, soft_wrap=True)
        if error.hint:
            errors.print(error.hint, style="yellow", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        errors.print("interrupted", style="yellow")
        sys.exit(130)


if __name__ == "__main__":
    main()
