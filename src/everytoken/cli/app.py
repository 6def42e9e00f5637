"""The command line's entry: verbs, errors and exit codes.

Exit codes: 0 done, 1 failed, 2 bad input, 3 a missing extra, 4 the cache cannot be used, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer
from rich.console import Console

from ..core.errors import EverytokenError
from . import audit, compare, data, doctor, mcp, papers, papers_site, reproduce, serve, tokenizer, train, try_
from .output import any_encoding

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


papers.app.command("build", epilog=papers_site.BUILD_EXAMPLES)(papers_site.build)
papers.app.command("serve", epilog=papers_site.SERVE_EXAMPLES)(papers_site.serve)
papers.app.command("daily", epilog=papers_site.DAILY_EXAMPLES)(papers_site.daily)
papers.app.command("digest", epilog=papers_site.DIGEST_EXAMPLES)(papers_site.digest)
papers.app.command("subscribers")(papers_site.subscribers)
app.add_typer(papers.app, name="papers")
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(data.app, name="data")
app.add_typer(mcp.app, name="mcp")
app.add_typer(audit.app, name="audit")
app.command("try", epilog=try_.EXAMPLES)(try_.try_method)
app.command("compare", epilog=compare.EXAMPLES)(compare.compare)
app.command("train", epilog=train.EXAMPLES)(train.train)
app.command("reproduce", epilog=reproduce.EXAMPLES)(reproduce.reproduce)
app.command("serve", epilog=serve.EXAMPLES)(serve.serve)
app.command("scoreboard", epilog=reproduce.SCOREBOARD_EXAMPLES)(reproduce.scoreboard)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)


def main() -> None:
    """Runs the command line; prints errors of this library and of the file system as sentences, not tracebacks."""
    any_encoding()
    errors = Console(stderr=True)

    def told(message: str, hint: str | None, code: int) -> NoReturn:
        errors.print("error", style="bold red", end=" ")
        errors.print(message, markup=False, highlight=False, soft_wrap=True)
        if hint:
            errors.print(hint, style="yellow", markup=False, highlight=False, soft_wrap=True)
        sys.exit(code)

    try:
        app()
    except EverytokenError as error:
        told(error.message, error.hint, error.exit_code)
    except BrokenPipeError:  # whoever read the output has gone: `everytoken papers | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
        sys.exit(1)
    except OSError as error:  # a disk that fills up, a folder that may no longer be written
        if error.filename is None:
            raise
        told(f"{error.filename}: {error.strerror or error}.", "Check the path, its permissions and the free space.", 1)
    except KeyboardInterrupt:
        errors.print("interrupted", style="yellow")
        sys.exit(130)


if __name__ == "__main__":
    main()
