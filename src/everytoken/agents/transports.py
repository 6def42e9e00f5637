"""Sessions with servers of tools that may be slow, huge or hostile: time, bytes and addresses are limited here.

The SDK's client waits for ever on a server that says nothing, and reads a line of any length. So its streams are ours:
a child process whose lines and bytes are counted and which is killed at once, and an HTTP connection to the one address
that was checked, whose bytes are counted too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..core.errors import EverytokenError, require
from .base import ServerError, ToolSpec, canonical_json
from .safety import TOOLS, Access, Resolve, check_command, check_url, filled, resolve, without_secrets
from .servers import ServerEntry

if TYPE_CHECKING:
    from mcp import Client

KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "APPDATA", "LOCALAPPDATA")
"""What a server's process inherits; all else is left out, for it may be a secret."""
PAGES = 100


@dataclass(frozen=True)
class Limits:
    """What one session may cost.

    Attributes:
        seconds: from the start of the connection to its last answer.
        bytes: of all that a server sends.
        tools: of one list.
    """

    seconds: float = 10.0
    bytes: int = 8_000_000
    tools: int = TOOLS


class TooLarge(ServerError):
    """A server sent more than the session may read."""


@dataclass
class _Budget:
    """Bytes that may still come, and why a stream was ended."""

    left: int
    problem: EverytokenError | None = field(default=None)

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            self.problem = TooLarge("The server sent more bytes than a session may read.")
            raise self.problem


@contextlib.asynccontextmanager
async def connect(
    entry: ServerEntry, access: Access | None = None, limits: Limits | None = None, resolver: Resolve = resolve
) -> AsyncIterator[Client]:
    """A session of the SDK with a server.

    The caller limits the time: ``async with asyncio.timeout(limits.seconds)`` around it.

    Raises:
        BadInputError: a command or URL that is not allowed, before anything is started or sent.
        MissingExtraError: the extra ``agents`` is not installed.
        ServerError: the server failed; no secret of the entry stands in the message.
    """
    require("mcp", "agents", "Talking to servers of tools")
    from mcp import Client

    access, limits = access or Access(), limits or Limits()
    budget, secrets = _Budget(limits.bytes), [*filled(entry.env).values(), *filled(entry.headers).values()]
    if entry.command is not None:
        if entry.registry and not access.registry:
            raise ServerError(
                f"{entry.id} would run a program that a registry names.", "Allow it with --allow-registry."
            )
        check_command(entry.command, entry.args, access)
        source: Any = _stdio(entry.command, entry.args, filled(entry.env), budget)
    elif entry.url is not None:
        await asyncio.to_thread(check_url, entry.url, access, resolver)
        source = _http(entry.url, filled(entry.headers), access, budget, limits, resolver)
    else:
        source = entry.target
    inside = False
    try:
        async with Client(source, cache=None) as client:
            inside = True
            yield client
    except (asyncio.CancelledError, GeneratorExit):
        raise
    except BaseException as error:
        cause = budget.problem or _first(error)
        if isinstance(cause, asyncio.CancelledError):
            raise cause from None
        if isinstance(cause, EverytokenError):
            raise cause from None
        if inside and not _is_of_sdk(cause):  # what the caller's own block raised
            raise
        raise ServerError(f"{entry.id}: {without_secrets(f'{type(cause).__name__}: {cause}', secrets)}") from None


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    return error


def _is_of_sdk(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in ("mcp", "anyio", "httpx2", "httpcore2", "pydantic_core")


async def list_tools(client: Client, server: str, limits: Limits | None = None) -> tuple[list[ToolSpec], float]:
    """All tools of a server, page by page, as it sent them.

    Returns:
        The tools, and for how many seconds the list stays fresh (0 where the server does not say).

    Raises:
        ServerError: more pages or tools than allowed, or a cursor that comes again.
        TooLarge: more bytes than a session may read (servers in this process; others are stopped while they send).
    """
    limits = limits or Limits()
    found: list[ToolSpec] = []
    cursor, seen, size, fresh = None, set(), 0, float("inf")
    for _ in range(PAGES):
        page = await client.list_tools(cursor=cursor)
        fresh = min(fresh, page.ttl_ms / 1000)
        for tool in page.tools:
            spec = ToolSpec.from_document(server, tool.model_dump(by_alias=True, exclude_none=True))
            size += len(canonical_json(spec.document()))
            found.append(spec)
        if size > limits.bytes:
            raise TooLarge(f"{server} lists more than {limits.bytes:,} bytes.")
        if len(found) > limits.tools:
            raise ServerError(f"{server} lists more than {limits.tools:,} tools.")
        cursor = page.next_cursor
        if not cursor:
            return found, fresh
        if cursor in seen:
            raise ServerError(f"{server} sends the same page again and again.")
        seen.add(cursor)
    raise ServerError(f"{server} lists more than {PAGES} pages.")


@contextlib.asynccontextmanager
async def _stdio(command: str, args: Sequence[str], env: Mapping[str, str], budget: _Budget) -> AsyncIterator[Any]:
    """The streams of a child process without a shell; it and its children are killed at the end."""
    import anyio
    import mcp_types as types
    from mcp.shared.message import SessionMessage

    minimal = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ} | dict(env)
    process = await asyncio.create_subprocess_exec(
        command,
        *args,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,  # it may print what must not be logged
        env=minimal,
        limit=budget.left,
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout
    to_client, incoming = anyio.create_memory_object_stream[Any](0)
    outgoing, from_client = anyio.create_memory_object_stream[Any](0)

    async def read() -> None:
        async with to_client:
            with contextlib.suppress(anyio.ClosedResourceError, anyio.BrokenResourceError, ServerError):
                while True:
                    try:
                        line = await stdout.readline()
                    except ValueError:  # a line longer than the limit
                        budget.problem = TooLarge("The server sent more bytes than a session may read.")
                        return
                    if not line:
                        return
                    budget.spend(len(line))
                    try:
                        message = types.jsonrpc_message_adapter.validate_json(line, by_name=False)
                    except ValueError:  # stray text on stdout is no message
                        continue
                    await to_client.send(SessionMessage(message))

    async def write() -> None:
        with contextlib.suppress(anyio.ClosedResourceError, anyio.BrokenResourceError, OSError):
            async for item in from_client:
                stdin.write(item.message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n")
                await stdin.drain()

    tasks = [asyncio.create_task(read()), asyncio.create_task(write())]
    try:
        yield incoming, outgoing
        stdin.close()  # a session that ended well: the server may end by itself
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), 1)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
        for task in tasks:
            task.cancel()
        for stream in (incoming, outgoing, to_client, from_client):
            stream.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.shield(asyncio.wait_for(process.wait(), 5))


@contextlib.asynccontextmanager
async def _http(
    url: str, headers: Mapping[str, str], access: Access, budget: _Budget, limits: Limits, resolver: Resolve
) -> AsyncIterator[Any]:
    """The streams of a streamable HTTP connection; no proxies, no redirects to elsewhere, pinned addresses."""
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    transport = _pinned_transport(access, budget, resolver)
    async with httpx2.AsyncClient(
        transport=transport, headers=dict(headers), timeout=limits.seconds, trust_env=False
    ) as web:
        async with streamable_http_client(url, http_client=web, max_sse_event_size=limits.bytes) as streams:
            yield streams


def _pinned_transport(access: Access, budget: _Budget, resolver: Resolve) -> Any:
    """An httpx2 transport that checks every request's address, connects to that address and counts what comes."""
    import httpx2

    class Counted(httpx2.AsyncByteStream):
        def __init__(self, stream: Any):
            self.stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for chunk in self.stream:
                budget.spend(len(chunk))
                yield chunk

        async def aclose(self) -> None:
            await self.stream.aclose()

    class Pinned(httpx2.AsyncBaseTransport):
        def __init__(self) -> None:
            self.inner = httpx2.AsyncHTTPTransport(trust_env=False)

        async def handle_async_request(self, request: Any) -> Any:
            host = request.url.host
            try:
                address = await asyncio.to_thread(check_url, str(request.url), access, resolver)
            except EverytokenError as error:
                budget.problem = error
                raise
            request.extensions = {**request.extensions, "sni_hostname": host}  # the certificate is the name's
            request.headers["accept-encoding"] = "identity"  # a small compressed answer can be a large text
            request.url = request.url.copy_with(host=address)  # the Host header keeps the name
            answer = await self.inner.handle_async_request(request)
            return httpx2.Response(
                answer.status_code,
                headers=answer.headers,
                stream=Counted(answer.stream),
                extensions=answer.extensions,
            )

        async def aclose(self) -> None:
            await self.inner.aclose()

    return Pinned()
