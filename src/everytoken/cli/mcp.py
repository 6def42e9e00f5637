"""``everytoken mcp``: tools of many servers in one store, searched, and served as two tools."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..core.errors import BadInputError
from .common import build_settings, stages
from .output import print_json

if TYPE_CHECKING:
    from ..agents.safety import Access
    from ..agents.scalemcp import Retriever
    from ..agents.sync import SyncSettings

app = typer.Typer(
    no_args_is_help=True,
    help="Keep the tools of many MCP servers in one store, search them, and serve the search as two tools.",
    epilog="Examples:  everytoken mcp sync --servers servers.json  ·  everytoken mcp search 'rain tomorrow'  ·  "
    "everytoken mcp serve --servers servers.json",
)
Servers = Annotated[Path, typer.Option(help="A map mcpServers (Claude, VS Code), or a registry's server.json.")]
Store = Annotated[Path, typer.Option(help="The store, an SQLite file.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="A setting of scalemcp, key=value; repeatable.")]
Private = Annotated[bool, typer.Option("--allow-private", help="Reach private and loopback addresses, by http too.")]
Hosts = Annotated[list[str] | None, typer.Option("--allow-host", help="Reach this host and no other; repeatable.")]
Registry = Annotated[bool, typer.Option("--allow-registry", help="Run the packages that a server.json names.")]
Seconds = Annotated[float, typer.Option(min=0.1, help="Time limit of one server, in seconds.")]
Parallel = Annotated[int, typer.Option(min=1, help="Programs that run at once.")]
Connections = Annotated[int, typer.Option(min=1, help="Servers with a URL that are asked at once.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
STORE = Path("tools.db")


def _access(private: bool, hosts: list[str] | None, registry: bool) -> Access:
    from ..agents.safety import Access

    return Access(private, frozenset(hosts) if hosts else None, registry)


def _retriever(store: Any, pairs: list[str] | None) -> Retriever:
    from ..agents.scalemcp import Retriever, ScaleMCP
    from ..core.embedding import require_embedder

    settings = ScaleMCP(**build_settings("scalemcp", pairs or []))
    if settings.retriever != "bm25":
        require_embedder("Finding tools by meaning (all but --set retriever=bm25)")
    return Retriever(store, settings)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise BadInputError(f"There is no store {path}.", "Make it: everytoken mcp sync --servers servers.json")
    return path


@app.command()
def sync(
    servers: Servers,
    store: Store = STORE,
    settings: Settings = None,
    allow_private: Private = False,
    allow_host: Hosts = None,
    allow_registry: Registry = False,
    timeout: Seconds = 10.0,
    parallel: Parallel = 8,
    connections: Connections = 512,
    force: Annotated[bool, typer.Option(help="Ask servers too whose list is fresh or that failed lately.")] = False,
    keep_others: Annotated[bool, typer.Option(help="Keep tools of servers that the file does not name.")] = False,
    watch: Annotated[bool, typer.Option(help="Go on and follow notices of changes until interrupted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Bring the store in step with the servers of a file."""
    from ..agents.servers import read_servers
    from ..agents.store import SQLiteStore
    from ..agents.sync import SyncSettings
    from ..agents.sync import sync as run
    from ..agents.transports import Limits

    entries = read_servers(servers)
    access = _access(allow_private, allow_host, allow_registry)
    how = SyncSettings(
        access, Limits(seconds=timeout), parallel, connections=connections, force=force, prune=not keep_others
    )
    console = Console()
    with SQLiteStore(store) as opened:
        retriever = _retriever(opened, settings)
        with stages(Console(stderr=True)) as report:
            done = asyncio.run(run(entries, opened, retriever.prepare, how, report))
        if as_json:
            print_json({**done.figures(), "failures": done.failed})
        else:
            for name, value in done.figures().items():
                if value:
                    console.print(f"{name:<15}{value:,.6g}", highlight=False)
            for server, why in done.failed.items():
                console.print(f"failed: {server}: {why}", style="yellow", highlight=False, markup=False)
            for key, why in done.refused.items():
                console.print(
                    f"refused: {key.server}, {key.name!r}: {why}", style="yellow", highlight=False, markup=False
                )
            for key in done.quarantined:
                console.print(f"changed since it was approved: {key.server} {key.name}", style="red", markup=False)
        if watch:
            with contextlib.suppress(KeyboardInterrupt):
                asyncio.run(_follow(entries, opened, retriever, how, console))


async def _follow(entries: Any, store: Any, retriever: Retriever, how: SyncSettings, console: Console) -> None:
    from ..agents.sync import watch

    def told(server: str, report: Any) -> None:
        if report.writes or report.failed:
            console.print(f"{server}: {report.writes} tools changed {' '.join(report.failed.values())}", markup=False)

    await watch(entries, store, retriever.prepare, how, told)


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="What the tool should do.")],
    store: Store = STORE,
    k: Annotated[int, typer.Option(min=1, max=100, help="How many tools.")] = 5,
    server: Annotated[str | None, typer.Option(help="Only tools of this server.")] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Find tools in the store."""
    from ..agents.safety import clean, shown
    from ..agents.store import SQLiteStore

    with SQLiteStore(_existing(store)) as opened:
        hits = _retriever(opened, settings).search(query, k, server)
    if as_json:
        print_json({"tools": [shown(hit.spec) | {"score": hit.score, "stale": hit.stale} for hit in hits]})
        return
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for head in ("score", "server", "tool", "description"):
        grid.add_column(head, overflow="fold")
    for hit in hits:
        told = clean(hit.spec.description.replace("\n", " "), 100)
        cells = [f"{hit.score:.4f}", hit.spec.server, hit.spec.name + (" (stale)" if hit.stale else ""), told]
        grid.add_row(*[cell.replace("[", "\\[") for cell in cells])
    Console().print(grid)


@app.command()
def approve(
    server: Annotated[str, typer.Argument()], name: Annotated[str, typer.Argument()], store: Store = STORE
) -> None:
    """Trust a tool as it is now: once it changes, it is held back until it is approved again."""
    from ..agents.base import Key, canonical_json
    from ..agents.safety import clean
    from ..agents.store import SQLiteStore

    with SQLiteStore(_existing(store)) as opened:
        for field, (before, after) in opened.difference(Key(server, name)).items():
            for word, value in (("was", before), ("is", after)):
                print(f"{field} {word}: {clean(canonical_json(value))}")
        opened.approve(Key(server, name))
    print(f"approved: {server} {name}")


@app.command()
def serve(
    servers: Servers,
    store: Store = STORE,
    settings: Settings = None,
    allow_private: Private = False,
    allow_host: Hosts = None,
    allow_registry: Registry = False,
    timeout: Seconds = 60.0,
    port: Annotated[
        int | None, typer.Option(help="Serve streamable HTTP on 127.0.0.1; default: standard streams.")
    ] = None,
    calls: Annotated[int, typer.Option(min=1, help="Calls a minute at most.")] = 120,
) -> None:
    """Serve search_tools and call_tool as an MCP server."""
    from ..agents.serve import Caller, RateLimit, mcp_server
    from ..agents.servers import read_servers
    from ..agents.store import SQLiteStore
    from ..agents.transports import Limits

    caller = Caller(read_servers(servers), _access(allow_private, allow_host, allow_registry), Limits(seconds=timeout))
    with SQLiteStore(_existing(store)) as opened:
        served = mcp_server(_retriever(opened, settings).search, caller, RateLimit(calls, 60.0))
        if port is None:
            served.run()
            return
        import uvicorn

        uvicorn.run(served.streamable_http_app(), host="127.0.0.1", port=port, log_level="warning")
