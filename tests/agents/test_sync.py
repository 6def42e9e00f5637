"""Sync with real servers: in this process, as programs, over HTTP; silent, huge, flapping and lying ones."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("mcp")

from hypothesis import given, settings
from hypothesis import strategies as st
from mcp.server.lowlevel import Server
from mcp.server.mcpserver import MCPServer
from mcp.server.subscriptions import InMemorySubscriptionBus
from mcp.shared.subscriptions import ToolsListChanged
from mcp_types import ListToolsResult, Tool

from everytoken.agents.base import Key
from everytoken.agents.metric_tools import companies, metric_queries, metric_server, metric_tools
from everytoken.agents.safety import Access
from everytoken.agents.scalemcp import Retriever, ScaleMCP
from everytoken.agents.servers import ServerEntry
from everytoken.agents.store import SQLiteStore
from everytoken.agents.sync import SyncSettings, sync, watch
from everytoken.agents.transports import Limits
from everytoken.core.errors import BadInputError

from .common import embed, over_http, program

FAST = SyncSettings(limits=Limits(seconds=1.5, bytes=100_000, tools=50), parallel=64, max_loss=1.0, force=True)


def listing(pages, ttl=0, wait=0.0):
    """A low-level server that lists what a test wants: ``pages`` is cursor -> (tools, next cursor)."""

    async def answer(_context, params):
        if wait:
            await asyncio.sleep(wait)
        cursor = params.cursor if params is not None else None
        tools, following = pages(cursor) if callable(pages) else pages[cursor]
        return ListToolsResult(tools=tools, next_cursor=following, ttl_ms=ttl)

    return Server("s", on_list_tools=answer)


def tool(name, description=""):
    return Tool(name=name, description=description, input_schema={"type": "object"})


def run(entries, store, settings=FAST, **more):
    return asyncio.run(sync(entries, store, settings=settings, **more))


def keys(store):
    return {item.spec.key for item in store.tools()}


def test_generated_servers_are_what_the_generator_says():
    names = companies(3)
    entries = [ServerEntry(name.lower().replace(" ", "_"), target=metric_server(name)) for name in names]
    with SQLiteStore() as store:
        report = run(entries, store)
        assert keys(store) == {item.key for item in metric_tools(names)} and report.writes == 15
        documents = {item.spec.key: item.spec.description for item in store.tools()}
        assert documents == {item.key: item.description for item in metric_tools(names)}
    assert all(asked.relevant <= set(documents) for asked in metric_queries(names, 50))


EDITS = st.lists(
    st.tuples(st.sampled_from("abc"), st.dictionaries(st.sampled_from("pqr"), st.sampled_from("xy"), max_size=3)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=6, deadline=None)
@given(EDITS)
def test_the_store_equals_the_union_of_live_servers(edits):
    """After every edit; a second sync writes nothing and embeds nothing."""
    live = {name: {} for name in "abc"}
    servers = {
        name: listing(lambda _c, name=name: ([tool(*item) for item in live[name].items()], None)) for name in live
    }
    entries = [ServerEntry(name, target=server) for name, server in servers.items()]
    with SQLiteStore() as store:
        found = Retriever(store, ScaleMCP(), embed, "words")
        for name, tools in edits:
            live[name] = tools
            run(entries, store, prepare=found.prepare)
            assert {item.spec.key: item.spec.description for item in store.tools()} == {
                Key(server, name): text for server, tools in live.items() for name, text in tools.items()
            }
            found.refresh()
            before = found.embedded, store.generation
            again = run(entries, store, prepare=found.prepare)
            found.refresh()
            assert (again.writes, again.made) == (0, 0)
            assert (found.embedded, store.generation) == before


def test_pages_lies_and_limits():
    def endless(cursor):
        return [tool(f"t{cursor or 0}")], str(int(cursor or 0) + 1)

    entries = {
        "paged": listing({None: ([tool("a")], "2"), "2": ([tool("b")], None)}),
        "circle": listing({None: ([tool("a")], "2"), "2": ([tool("b")], "2")}),
        "endless": listing(endless),
        "many": listing({None: ([tool(f"t{n}") for n in range(51)], None)}),
        "huge": listing({None: ([tool("h", "x" * 200_000)], None)}),
        "odd": listing({None: ([tool("ok"), tool("s\u0435arch"), tool("ok", "twice"), tool("x" * 65)], None)}),
        "slow": listing({None: ([], None)}, wait=30),
    }
    with SQLiteStore() as store:
        report = run([ServerEntry(name, target=server) for name, server in entries.items()], store)
        assert keys(store) == {Key("paged", "a"), Key("paged", "b"), Key("odd", "ok")}
        assert "same page" in report.failed["circle"]
        assert "more than 50 tools" in report.failed["endless"]
        assert "more than 50 tools" in report.failed["many"]
        assert "more than 100,000 bytes" in report.failed["huge"]
        assert "did not answer within 1.5 s" in report.failed["slow"]
        assert len(report.refused) == 3
        assert "listed before" in report.refused[Key("odd", "ok")]
    with SQLiteStore() as store:
        wide = SyncSettings(limits=Limits(seconds=5.0))
        assert "more than 100 pages" in run([ServerEntry("e", target=listing(endless))], store, wide).failed["e"]


@pytest.mark.slow
def test_fresh_lists_and_failed_servers_are_not_asked_again():
    now = [0.0]
    polite = SyncSettings(limits=FAST.limits)
    with SQLiteStore(clock=lambda: now[0]) as store:
        entries = [
            ServerEntry("cached", target=listing({None: ([tool("a")], None)}, ttl=60_000)),
            ServerEntry("slow", target=listing({None: ([], None)}, wait=30)),
        ]
        run(entries, store, polite)
        assert run(entries, store, polite).skipped == {"cached": "fresh", "slow": "backing off"}
        now[0] = 61.0
        assert run(entries, store, polite).unchanged == 1
        report = run(entries[1:], store, polite)
        assert report.deleted == [Key("cached", "a")]  # its server is no longer listed
    with pytest.raises(BadInputError, match="same id"):
        run(entries[:1] * 2, SQLiteStore())
    for bad in ({"parallel": 0}, {"connections": 0}, {"grace": -1.0}, {"max_loss": 2.0}, {"limits": Limits(seconds=0)}):
        with pytest.raises(BadInputError, match="A sync needs"):
            SyncSettings(**bad)


def test_what_is_not_allowed_is_not_reached():
    entries = [
        ServerEntry("local", url="http://127.0.0.1:9/mcp"),
        ServerEntry("shell", "sh", ("-c", "true")),
        ServerEntry("registry", "true", registry=True),
        ServerEntry("secret", "true", env={"TOKEN": "${NO_SUCH_VARIABLE}"}),
        ServerEntry("missing", "/no/such/program"),
    ]
    with SQLiteStore() as store:
        failed = run(entries, store).failed
    assert "private" in failed["local"]
    assert "shell" in failed["shell"]
    assert "--allow-registry" in failed["registry"]
    assert "NO_SUCH_VARIABLE" in failed["secret"]
    assert "FileNotFoundError" in failed["missing"]


@pytest.mark.slow
def test_real_programs_and_real_http(monkeypatch):
    """Silent, crashing, noisy and huge ones beside good ones (about 15 s)."""
    monkeypatch.setenv("VERY_SECRET", "hunter2-hunter2")
    entries = [program(kind) for kind in ("good", "silent", "crash", "noisy", "huge")]
    names = {"add", "environment", "hang"}
    with over_http() as port, SQLiteStore() as store:
        entries.append(ServerEntry("web", url=f"http://127.0.0.1:{port}/mcp"))
        settings = SyncSettings(Access(private=True), Limits(seconds=10.0))
        began = time.monotonic()
        report = run(entries, store, settings)
        assert time.monotonic() - began < 60
        assert keys(store) == {Key(server, name) for server in ("good", "noisy", "web") for name in names}
        assert "did not answer" in report.failed["silent"]
        assert "more bytes" in report.failed["huge"]
        assert "crash" in report.failed
        again = run(
            entries[:1] + entries[5:], store, SyncSettings(Access(private=True), Limits(seconds=10.0), prune=False)
        )
        assert (again.writes, again.unchanged) == (0, 6)
        alone = run(entries[5:], store, SyncSettings(Access(hosts=frozenset({"x"})), force=True))
        assert "allowed hosts" in alone.failed["web"]
        tiny = run(entries[5:], store, SyncSettings(Access(private=True), Limits(seconds=10.0, bytes=300), force=True))
        assert "more bytes" in tiny.failed["web"]


@pytest.mark.slow
def test_five_hundred_servers():
    """200 healthy, 200 that hang, 100 that fail every other time: all healthy ones are in, in one sync (about 12 s)."""
    tries = {}

    def flapping(name):
        async def answer(_context, _params):
            tries[name] = tries.get(name, 0) + 1
            if tries[name] % 2:
                raise RuntimeError("flap")
            return ListToolsResult(tools=[tool("t")])

        return Server(name, on_list_tools=answer)

    servers = {f"h{n}": listing({None: ([tool("t")], None)}) for n in range(200)}
    servers |= {f"x{n}": listing({None: ([], None)}, wait=60) for n in range(200)}
    servers |= {f"f{n}": flapping(f"f{n}") for n in range(100)}
    entries = [ServerEntry(name, target=server) for name, server in servers.items()]
    with SQLiteStore() as store:
        patient = SyncSettings(limits=Limits(seconds=5.0), force=True)
        first = run(entries, store, patient)
        assert {key.server for key in keys(store)} == {f"h{n}" for n in range(200)}
        assert len(first.failed) == 300
        second = run(entries, store, patient)
        assert len(second.created) == 100 and len(second.failed) == 200
        assert len(keys(store)) == 300


@pytest.mark.slow
def test_two_syncs_at_once_and_a_crash_half_way(tmp_path):
    """Two stores on one file: the transaction and the unique key decide (about 1 s)."""
    file = tmp_path / "tools.db"
    entries = [ServerEntry(f"s{n}", target=listing({None: ([tool("a"), tool("b")], None)})) for n in range(30)]

    async def both():
        with SQLiteStore(file) as one, SQLiteStore(file) as two:
            reports = await asyncio.gather(*(sync(entries, store, settings=FAST) for store in (one, two)))
            assert sum(report.writes for report in reports) == 60
            assert len(one.tools()) == len(two.tools()) == 60

    asyncio.run(both())


def test_a_notice_of_a_change_brings_a_new_list():
    """Subscriptions of the revision 2026-07-28, in this process."""
    bus = InMemorySubscriptionBus()
    server = MCPServer("s", subscriptions=bus)

    def first() -> str:
        return ""

    def second() -> str:
        return ""

    server.add_tool(first)
    told = []

    async def follow():
        with SQLiteStore() as store:
            heard = asyncio.Event()

            def note(name, report):
                told.append((name, [key.name for key in report.created]))
                heard.set()

            task = asyncio.create_task(watch([ServerEntry("s", target=server)], store, told=note, retry=0.1))
            await asyncio.wait_for(heard.wait(), 10)
            heard.clear()
            server.add_tool(second)
            await bus.publish(ToolsListChanged())
            await asyncio.wait_for(heard.wait(), 10)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return keys(store)

    assert asyncio.run(follow()) == {Key("s", "first"), Key("s", "second")}
    assert ("s", ["second"]) in told


def test_no_child_is_left_behind():
    """A silent program is killed with its children when its time is up."""
    mark = f"everytoken-{secrets.token_hex(8)}"
    sleeper = f"import time; time.sleep(99)  # {mark}"
    code = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {sleeper!r}])\n{sleeper}"
    entry = ServerEntry("quiet", sys.executable, ("-c", code))
    with SQLiteStore() as store:
        run([entry], store, SyncSettings(limits=Limits(seconds=0.6)))
    if Path("/proc").is_dir():
        time.sleep(0.2)
        mine = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                mine.append(mark.encode() in path.read_bytes())
        assert mine and not any(mine)
