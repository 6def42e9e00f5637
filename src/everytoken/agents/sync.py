"""Many servers and one store in step: each server in a task of its own, under a time limit, and none waits for another.

A server that answers gets its tools written in one transaction. One that does not has its tools marked stale, is asked
again later and later, and loses them after a grace. ``watch`` keeps sessions open and follows notices of changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..core.errors import BadInputError, EverytokenError
from ..core.progress import Report as Progress
from ..core.progress import silent
from .base import Key, ToolSpec
from .safety import Access, refusal
from .servers import ServerEntry
from .store import Changes, SQLiteStore
from .transports import Limits, connect, list_tools

Prepare = Callable[[Sequence[ToolSpec]], int]
"""What is made for tools before they are written (embeddings); returns how much was made."""
CHANGES = ("created", "updated", "deleted", "stale", "quarantined")


@dataclass
class Report:
    """What a sync did.

    Attributes:
        created, updated, deleted, stale, quarantined: tools.
        unchanged: how many tools were as before.
        failed: server -> why it gave no list.
        skipped: server -> why it was not asked.
        refused: tool -> why it was not taken.
        made: how many texts were embedded.
        seconds: how long all of it took.
    """

    created: list[Key] = field(default_factory=list)
    updated: list[Key] = field(default_factory=list)
    deleted: list[Key] = field(default_factory=list)
    stale: list[Key] = field(default_factory=list)
    quarantined: list[Key] = field(default_factory=list)
    unchanged: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    refused: dict[Key, str] = field(default_factory=dict)
    made: int = 0
    seconds: float = 0.0

    @property
    def writes(self) -> int:
        """Rows of tools that were written or deleted."""
        return sum(len(getattr(self, name)) for name in CHANGES)

    def add(self, server: str, changes: Changes) -> None:
        """Adds what happened to one server's tools."""
        for name in CHANGES:
            getattr(self, name).extend(Key(server, tool) for tool in getattr(changes, name))
        self.unchanged += changes.unchanged

    def figures(self) -> dict[str, float]:
        """Counts by name."""
        counted = {name: len(getattr(self, name)) for name in (*CHANGES, "failed", "skipped", "refused")}
        return {**counted, "unchanged": self.unchanged, "texts embedded": self.made, "seconds": self.seconds}


@dataclass(frozen=True)
class SyncSettings:
    """How a sync goes.

    Attributes:
        access: what may be reached and started.
        limits: of one server's session.
        parallel: how many programs run at once.
        connections: how many other servers are asked at once; one that hangs costs no more than a connection.
        grace: seconds for which tools of a server that is down are kept.
        max_loss: see ``SQLiteStore.apply``.
        force: ask servers too whose list is fresh or that failed lately.
        prune: delete tools of servers that are not among those of this sync.

    Raises:
        BadInputError: numbers out of range.
    """

    access: Access = field(default_factory=Access)
    limits: Limits = field(default_factory=Limits)
    parallel: int = 8
    grace: float = 86_400.0
    max_loss: float = 0.5
    force: bool = False
    prune: bool = True
    connections: int = 512

    def __post_init__(self) -> None:
        if (
            min(self.parallel, self.connections) < 1
            or self.grace < 0
            or not 0 <= self.max_loss <= 1
            or self.limits.seconds <= 0
        ):
            raise BadInputError(
                "A sync needs one server or more at once, a time limit above 0, a grace from 0 on and a loss in 0..1."
            )


async def sync(
    entries: Sequence[ServerEntry],
    store: SQLiteStore,
    prepare: Prepare = len,
    settings: SyncSettings | None = None,
    progress: Progress = silent,
) -> Report:
    """Brings the store in step with the servers.

    Args:
        prepare: called with a server's tools before they are written, in a thread; makes their embeddings.
        progress: in servers.

    Raises:
        BadInputError: two servers of one id, before any is asked.
    """
    settings = settings or SyncSettings()
    ids = [entry.id for entry in entries]
    if len(set(ids)) != len(ids):
        raise BadInputError("Two servers have the same id.", "Ids are what tells their tools apart.")
    report, began = Report(), time.perf_counter()
    if settings.prune:
        for server, changes in store.forget_others(ids).items():
            report.add(server, changes)
    failures = store.failures()
    turn = asyncio.Lock()
    programs, connections = asyncio.Semaphore(settings.parallel), asyncio.Semaphore(settings.connections)
    done = 0

    async def one(entry: ServerEntry) -> None:
        nonlocal done
        async with connections if entry.command is None else programs:
            await sync_server(entry, store, report, prepare, settings, turn)
        done += 1
        progress("asking servers", done, len(entries))

    ordered = sorted(entries, key=lambda entry: failures.get(entry.id, 0))  # those that failed before come last
    await asyncio.gather(*(one(entry) for entry in ordered))
    report.seconds = time.perf_counter() - began
    return report


async def sync_server(
    entry: ServerEntry,
    store: SQLiteStore,
    report: Report,
    prepare: Prepare,
    settings: SyncSettings,
    turn: asyncio.Lock,
) -> None:
    """One server of a sync; what happened is added to the report."""
    waiting = None if settings.force else store.waiting(entry.id)
    if waiting is not None:
        report.skipped[entry.id] = waiting
        return
    try:
        async with asyncio.timeout(settings.limits.seconds):
            async with connect(entry, settings.access, settings.limits) as client:
                specs, fresh = await list_tools(client, entry.id, settings.limits)
    except (TimeoutError, EverytokenError) as error:
        report.failed[entry.id] = _told(error, entry, settings)
        report.add(entry.id, store.mark_down(entry.id, report.failed[entry.id], settings.grace))
        return
    await _take(entry.id, specs, fresh, store, report, prepare, settings, turn)


def _told(error: Exception, entry: ServerEntry, settings: SyncSettings) -> str:
    """Why a server failed, in one line."""
    if isinstance(error, EverytokenError):
        return " ".join(filter(None, (error.message, error.hint)))
    return f"{entry.id} did not answer within {settings.limits.seconds:g} s."


async def _take(
    server: str,
    specs: Sequence[ToolSpec],
    fresh: float,
    store: SQLiteStore,
    report: Report,
    prepare: Prepare,
    settings: SyncSettings,
    turn: asyncio.Lock,
) -> None:
    """Checks a list, embeds it and writes it."""
    good: dict[str, ToolSpec] = {}
    for spec in specs:
        why = refusal(spec) or ("its name was listed before" if spec.name in good else None)
        if why is None:
            good[spec.name] = spec
        else:
            report.refused[Key(server, str(spec.name)[:80])] = why
    async with turn:  # embeddings are made by one thread at a time, while other servers are listed
        made = await asyncio.to_thread(prepare, list(good.values()))
        report.made += 0 if prepare is len else made
        report.add(server, store.apply(server, list(good.values()), fresh, settings.grace, settings.max_loss))


async def watch(
    entries: Sequence[ServerEntry],
    store: SQLiteStore,
    prepare: Prepare = len,
    settings: SyncSettings | None = None,
    told: Callable[[str, Report], None] = lambda _server, _report: None,
    retry: float = 5.0,
) -> None:
    """Follows servers until it is cancelled: one session each, a new list at every notice of a change.

    Servers of the revision 2026-07-28 are listened to. Older ones, and sessions that break, are asked again after
    ``retry`` seconds, twice as many with every failure in a row, five minutes at most.

    Args:
        told: called with a server's id and what changed, after every list.
        retry: seconds.
    """
    settings = settings or SyncSettings()
    turn = asyncio.Lock()

    async def list_once(client: object, entry: ServerEntry) -> None:
        report = Report()
        async with asyncio.timeout(settings.limits.seconds):
            specs, fresh = await list_tools(client, entry.id, settings.limits)  # type: ignore[arg-type]
        await _take(entry.id, specs, fresh, store, report, prepare, settings, turn)
        told(entry.id, report)

    async def follow(entry: ServerEntry) -> None:
        from mcp.client.subscriptions import ListenNotSupportedError, SubscriptionLost
        from mcp.shared.exceptions import MCPError

        wait = retry
        while True:
            try:
                async with contextlib.AsyncExitStack() as stack:
                    async with asyncio.timeout(settings.limits.seconds):
                        client = await stack.enter_async_context(connect(entry, settings.access, settings.limits))
                    with contextlib.suppress(ListenNotSupportedError, SubscriptionLost, MCPError):
                        async with client.listen(tools_list_changed=True) as notices:
                            await list_once(client, entry)  # after the subscription began: no change falls between
                            wait = retry
                            async for _ in notices:
                                await list_once(client, entry)
                    await list_once(client, entry)
                    wait = retry
            except (TimeoutError, EverytokenError) as error:
                report, reason = Report(), _told(error, entry, settings)
                report.failed[entry.id] = reason
                report.add(entry.id, store.mark_down(entry.id, reason, settings.grace))
                told(entry.id, report)
                wait = min(2 * wait, 300.0)
            await asyncio.sleep(wait)

    await asyncio.gather(*(follow(entry) for entry in entries))
