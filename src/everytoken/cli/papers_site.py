"""``everytoken papers build``, ``serve``, ``daily``, ``digest`` and ``subscribers``: the catalogue for others."""

from __future__ import annotations

import email
import email.policy
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..core.errors import BadInputError, EverytokenError, extra_of, require
from .common import stages
from .output import check_folder, print_json

if TYPE_CHECKING:
    from ..catalog.cards import Card
    from ..catalog.digest.mail import MailServer, Sender
    from ..catalog.page.entries import Entry

BUILD_EXAMPLES = (
    "Examples:  everytoken papers build site  ·  everytoken papers build site --base-url https://example.org/papers"
)
SERVE_EXAMPLES = "Examples:  everytoken papers serve  ·  everytoken papers serve --port 9000 --words"
DAILY_EXAMPLES = "Examples:  everytoken papers daily  ·  everytoken papers daily --date 2026-11-27 --json"
DIGEST_EXAMPLES = (
    "Examples:  everytoken papers digest --base-url https://papers.example.org --from digest@example.org "
    "--contact 'Example Street 1' (shows what would be sent)  ·  the same with --smtp relay.example.org:587 --send"
)
USER, PASSWORD = "EVERYTOKEN_SMTP_USER", "EVERYTOKEN_SMTP_PASSWORD"

Base = Annotated[str, typer.Option("--base-url", help="The public address of the site.")]
Words = Annotated[bool, typer.Option("--words", help="Search by words only, even if search by meaning is installed.")]
Traces = Annotated[
    Path | None,
    typer.Option(help="A folder with NAME.html for papers that have a trace (`everytoken try NAME --trace`)."),
]
Data = Annotated[Path | None, typer.Option(help="The SQLite file of subscribers, votes and notes.")]
From = Annotated[str, typer.Option("--from", help="The address that mails come from.")]
Contact = Annotated[str, typer.Option(help="A postal address or another line by which the sender is reached.")]
Smtp = Annotated[str, typer.Option(help=f"The relay as host:port. User and password come from {USER} and {PASSWORD}.")]
Authority = Annotated[
    Path | None, typer.Option("--ca-file", help="Certificates to trust for the relay, beside the system's.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def site_entries(traces: Path | None = None, pictures: bool = True) -> list[Entry]:
    """All papers with their results brought up to date."""
    from ..catalog.page.entries import entries
    from ..reproduce.files import up_to_date

    def result_of(card: Card) -> dict[str, Any] | None:
        result = card.result()
        return None if result is None else dict(up_to_date(result))

    return entries(result_of, traces, pictures=pictures)


def _meaning(words_only: bool) -> bool:
    from ..catalog.search import can_search_by_meaning

    return not words_only and can_search_by_meaning()


def build(
    folder: Annotated[Path, typer.Argument(help="Where the site goes; new, or one that this command wrote.")],
    base: Base = "",
    traces: Traces = None,
    words_only: Words = False,
) -> None:
    """Write the papers as a static site: list with search, a page a paper, an Atom feed, a search index.

    It needs no server: the pages work from a disk and load nothing from elsewhere.
    """
    from ..catalog.page.feed import check_base
    from ..catalog.page.render import write_site

    check_folder(folder)
    check_base(base)
    console = Console(stderr=True)
    meaning = _meaning(words_only)
    with stages(console) as report:
        report("drawing what was measured", 0, 0)
        written = write_site(folder, site_entries(traces), base, meaning, report)
    Console().print(
        f"written: {folder / 'index.html'} ({len(written)} files)", highlight=False, markup=False, soft_wrap=True
    )
    if not meaning and not words_only:
        console.print("Its search is by words: the search extra is not installed.", style="yellow")


def serve(
    host: Annotated[
        str, typer.Option(help="The address to listen on; others than loopback are reachable by others.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8765,
    base: Base = "",
    traces: Traces = None,
    data: Data = None,
    words_only: Words = False,
    sender: From = "",
    contact: Contact = "",
    smtp: Smtp = "",
    authority: Authority = None,
) -> None:
    """Serve the papers: the site with search by meaning, upvotes, notes and subscriptions. No account is needed.

    Subscriptions need --smtp, --from, --contact and --base-url; without them they are off.
    """
    from ..catalog.digest.send import default_path
    from ..catalog.digest.store import Store
    from ..catalog.server import make_app

    for library in ("starlette", "uvicorn"):
        require(library, extra_of(library) or "serve", "The server of the papers")
    import uvicorn

    given = {"--smtp": smtp, "--from": sender, "--contact": contact, "--base-url": base}
    mailing = bool(smtp or sender or contact)
    if mailing and (missing := [name for name, value in given.items() if not value]):
        raise BadInputError(f"Subscriptions need {', '.join(missing)} too.")
    by = _sender(sender, base, contact) if mailing else None
    relay = _relay(smtp, authority) if mailing else None
    with stages(Console(stderr=True)) as report:
        report("drawing what was measured", 0, 0)
        found = site_entries(traces)
        report("making the pages", 0, 0)
        app = make_app(found, Store(data or default_path()), base, [host], _meaning(words_only), by, relay)
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", server_header=False, limit_concurrency=200)
    server = uvicorn.Server(config)
    try:
        socket = config.bind_socket()
    except SystemExit as error:  # uvicorn's answer to an address that is taken
        raise EverytokenError(f"Nothing can listen on {host}:{port}.", "Choose another --port.") from error
    name, number = socket.getsockname()[:2]
    shown = f"[{name}]" if ":" in name else name
    typer.echo(f"http://{shown}:{number}/")
    sys.stdout.flush()
    server.run(sockets=[socket])


def daily(
    date: Annotated[str, typer.Option(help="The day, as 2026-11-27; default the latest list.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many.")] = None,
    as_json: AsJson = False,
) -> None:
    """The public daily list of papers; without a network the last answer. Marks what belongs to a station."""
    from ..catalog.daily import daily_papers
    from ..catalog.search import can_search_by_meaning

    found = daily_papers(date)
    papers = found.papers[:limit]
    if as_json:
        told = {"date": found.date, "read": found.read.isoformat(), "cached": found.cached}
        print_json(told | {"papers": [paper.as_dict() for paper in papers]})
        return
    console = Console()
    if found.cached:
        when = found.read.strftime("%Y-%m-%d %H:%M UTC")
        console.print(f"There is no network: this is what was read on {when}.", style="yellow", highlight=False)
    if not papers:
        console.print("The list is empty; there may be none at weekends.", highlight=False)
        return
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for head in ("arXiv", "listed", "station", "title"):
        grid.add_column(head, no_wrap=head != "title", overflow="fold")
    for paper in papers:  # Text: a title is never markup
        near = f"{paper.station} ({paper.nearest})" if paper.station else ""
        grid.add_row(paper.arxiv, paper.listed, near, Text(paper.title))
    console.print(grid)
    if not can_search_by_meaning():
        console.print("What belongs to a station is not marked: the search extra is not installed.", style="dim")


def digest(
    base: Base = "",
    sender: From = "",
    contact: Contact = "",
    smtp: Smtp = "",
    send: Annotated[bool, typer.Option("--send/--dry-run", help="Send, or only show what would be sent.")] = False,
    date: Annotated[str, typer.Option(help="The day of the daily list; default the latest.")] = "",
    with_daily: Annotated[bool, typer.Option("--daily/--no-daily", help="With what the daily list brings.")] = True,
    data: Data = None,
    out: Annotated[Path | None, typer.Option(help="A new folder for the mails of a dry run, as .eml files.")] = None,
    authority: Authority = None,
    check: Annotated[
        Path | None,
        typer.Option(help="Only check a mail that has arrived: does its DKIM signature cover what it must?"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Mail every subscriber what is new on their topics; nothing is sent where nothing is new, and nothing twice."""
    from ..catalog.daily import check_date, daily_papers
    from ..catalog.digest.papers import from_daily, from_entries
    from ..catalog.digest.send import default_path, run_digest
    from ..catalog.digest.store import Store

    if check is not None:
        _check_mail(check)
        return
    if date:
        check_date(date)
    by = _sender(sender, base, contact)
    if send and not smtp:
        raise BadInputError("Sending needs a relay.", "Give --smtp host:port.")
    if out is not None:
        if send:
            raise BadInputError("--out is for a dry run.", "Leave out --send or --out.")
        check_folder(out, new=True)
    relay = _relay(smtp, authority) if send else None
    errors = Console(stderr=True)
    found = site_entries(pictures=False)
    papers = from_entries(found, base)
    if with_daily:
        try:
            papers += from_daily(daily_papers(date).papers, found)
        except EverytokenError as error:
            if date:  # what was asked for by name is not left out
                raise
            errors.print(f"Without the daily list: {error.message}", style="yellow", markup=False, highlight=False)
    report = run_digest(Store(data or default_path()), by, papers, datetime.now(UTC), relay)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for number, message in enumerate(report.mails, 1):
            (out / f"{number:05}.eml").write_bytes(bytes(message))
    figures = {name: value for name, value in vars(report).items() if name != "mails"}
    if not send:
        figures = {"would_send": len(report.mails), "nothing_new": report.nothing_new, "not_due": report.not_due}
    if as_json:
        print_json(figures)
        return
    for name, value in figures.items():
        typer.echo(f"{name.replace('_', ' '):<12} {value}")
    if not send:
        typer.echo("Nothing was sent; --send sends.")


def subscribers(
    address: Annotated[str, typer.Argument(help="An address; without one, only numbers are told.")] = "",
    remove: Annotated[bool, typer.Option("--remove", help="Delete everything that is kept of the address.")] = False,
    data: Data = None,
) -> None:
    """What is kept of an address, as JSON, or its deletion: for those who ask for it."""
    from ..catalog.digest.send import default_path
    from ..catalog.digest.store import Store, clean_address

    store = Store(data or default_path())
    if not address:
        if remove:
            raise BadInputError("--remove needs an address.")
        counts = {
            str(state): number for state, number in store.rows("SELECT state, count(*) FROM subscribers GROUP BY state")
        }
        print_json({state: counts.get(state, 0) for state in ("wait", "on", "off")})
        return
    name = clean_address(address)
    kept = store.export(name)
    if kept is None:
        raise BadInputError("Nothing is kept of that address.")
    if remove:
        store.remove(name, datetime.now(UTC))
        typer.echo("Deleted.")
        return
    print_json(kept)


def _sender(address: str, base: str, contact: str) -> Sender:
    from ..catalog.digest.mail import Sender

    if not address:
        raise BadInputError("Mails need an address that they come from.", "Give --from digest@example.org.")
    return Sender(address, base, contact)


def _relay(text: str, authority: Path | None) -> MailServer:
    import os
    import ssl

    from ..catalog.digest.mail import MailServer

    host, colon, port = text.rpartition(":")
    if not colon:
        host, port = text, "587"
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise BadInputError(f"{text!r} is no relay.", "Example: relay.example.org:587")
    context = ssl.create_default_context()
    if authority is not None:
        try:
            context.load_verify_locations(authority)
        except (OSError, ssl.SSLError) as error:
            raise BadInputError(f"{authority} holds no certificates: {error}.") from error
    user, password = os.environ.get(USER, ""), os.environ.get(PASSWORD, "")
    return MailServer(host.strip("[]"), int(port), user, password, context)


def _check_mail(path: Path) -> None:
    from ..catalog.digest.mail import uncovered
    from ..core.settings import check_file

    check_file(path)
    message = email.message_from_bytes(path.read_bytes(), policy=email.policy.default)
    missing = uncovered(message)
    if missing:
        raise EverytokenError(
            f"No DKIM signature of this mail covers {' and '.join(missing)}.",
            "Let the relay sign both, or mail services will not offer one-click unsubscribing.",
        )
    typer.echo("A DKIM signature covers both headers of one-click unsubscribing; the signature itself was not checked.")
