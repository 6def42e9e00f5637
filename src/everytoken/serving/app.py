"""The HTTP side: routes, limits, the line of waiting requests, streams, metrics.

One thread writes (``engine``); this side takes requests while there is room in the line, and says 429 where there is
none. A client that goes away cancels its request. Grammars are compiled beside the event loop.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ..core.errors import BadInputError, EverytokenError, require
from ..core.rate import body_within
from .engine import Choice, Engine, Job
from .requests import Ask, RequestError, read_chat, read_completion
from .text import Pieces

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger(__name__)
BODY = 4_000_000
"""Bytes that a request may bring."""
WATCH = 0.25
"""Seconds between two looks at whether the client of a request without a stream is still there."""


class Server:
    """What routes share: the engine, its line, and what is counted.

    Args:
        engine: writes.
        name: the model's name as clients see it.
        waiting: requests that may be in the line and at work together.
        key: clients must send it as a bearer token; None asks for none.

    Raises:
        BadInputError: no room for any request, or an empty key.
        MissingExtraError: the extra ``serve`` is not installed.
    """

    def __init__(self, engine: Engine, name: str, waiting: int = 256, key: str | None = None):
        require("starlette", "serve", "everytoken serve")
        if waiting < 1:
            raise BadInputError(f"The line has room for at least one request; got {waiting}.")
        if key is not None and not key.strip():
            raise BadInputError("The key is empty.", "Leave the variable out, or give it a long random text.")
        self.engine, self.name, self.waiting, self.key = engine, name, waiting, key
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="everytoken-writer")
        self.compilers = ThreadPoolExecutor(2, thread_name_prefix="everytoken-compiler")
        self.inside = 0
        self.counts: Counter[tuple[str, str]] = Counter()
        self.started = int(time.time())

    # -- requests ------------------------------------------------------------------------------------------------------
    def allowed(self, request: Request) -> bool:
        if self.key is None:
            return True
        kind, _, sent = request.headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(sent.strip().encode(), self.key.encode())

    async def answer(self, request: Request, read: Callable[[Any], Ask]) -> Response:
        """One request, from its body to its response."""
        if not self.allowed(request):
            return self.refused(401, "The key is missing or wrong.", kind="authentication_error")
        if self.inside >= self.waiting:
            return self.refused(429, "The line is full; try again.", kind="rate_limit_error", retry=1)
        self.inside += 1
        kept = False
        try:
            data = await body_within(request, BODY)
            if data is None:
                return self.refused(413, f"A request has at most {BODY:,} bytes.")
            try:
                body = json.loads(data)
                json.dumps(body, ensure_ascii=False).encode()  # half of a pair of surrogates is no text
                ask = read(body)
            except (ValueError, RecursionError) as error:
                if isinstance(error, EverytokenError):
                    raise
                return self.refused(400, "A request must be JSON.")
            if ask.model not in (None, self.name):
                return self.refused(404, f"This server has the model {self.name!r}.", "model", code="model_not_found")
            loop = asyncio.get_running_loop()
            # a decoder may load a model, which nothing else may run beside
            thread = self.compilers if ask.decoder is None else self.writer
            job = await loop.run_in_executor(thread, self.engine.prepare, ask)
            if not ask.stream:
                return await self._whole(request, job)
            kept = True
            return self._stream(job)
        except RequestError as error:
            return self.refused(400, error.message, error.param)
        except EverytokenError as error:
            return self.refused(400, f"{error.message} {error.hint or ''}".strip())
        except Exception:
            log.exception("a request failed")
            return self.refused(500, "The server failed; its log says why.", kind="server_error")
        finally:
            if not kept:
                self.inside -= 1

    def refused(
        self, status: int, message: str, param: str | None = None, kind: str = "invalid_request_error",
        code: str | None = None, retry: int | None = None,
    ) -> Response:  # fmt: skip
        from starlette.responses import JSONResponse

        self.counts["requests", str(status)] += 1
        body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        return JSONResponse(body, status, {} if retry is None else {"Retry-After": str(retry)})

    async def _whole(self, request: Request, job: Job) -> Response:
        from starlette.responses import JSONResponse

        cancelled = threading.Event()
        written = asyncio.get_running_loop().run_in_executor(self.writer, self.engine.run, job, cancelled)
        try:
            while not (await asyncio.wait({written}, timeout=WATCH))[0]:
                if await request.is_disconnected():
                    written.cancel()  # one that waits is never begun, one that runs ends at its next token
                    self.counts["requests", "499"] += 1
                    return JSONResponse({"error": {"message": "The client left."}}, 499)
            choices = await written
        finally:
            cancelled.set()
        self._count(job, choices)
        chat = job.ask.chat
        body = self._head(chat) | {
            "choices": [self._message(choice) if chat else self._text(job, choice) for choice in choices],
            "usage": usage(job, choices),
        }
        return JSONResponse(body)

    def _stream(self, job: Job) -> Response:
        from starlette.responses import StreamingResponse

        server = self

        class Stream(StreamingResponse):
            """Gives its place back however it ends, also where its client left before the first event."""

            async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
                try:
                    await super().__call__(scope, receive, send)
                finally:
                    server.inside -= 1

        self.counts["requests", "200"] += 1
        return Stream(self._events(job), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _events(self, job: Job) -> AsyncIterator[str]:
        loop, cancelled = asyncio.get_running_loop(), threading.Event()
        pieces: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
        buffered = bool(job.ask.tools)  # a call is told when it is whole

        def say(index: int, text: str) -> None:
            if not buffered:
                loop.call_soon_threadsafe(pieces.put_nowait, (index, text))

        def write() -> list[Choice]:
            try:
                return self.engine.run(job, cancelled, say)
            finally:
                loop.call_soon_threadsafe(pieces.put_nowait, None)

        head = self._head(job.ask.chat, chunk=True)
        written = loop.run_in_executor(self.writer, write)
        try:
            if job.ask.chat:
                for index in range(job.ask.n):
                    yield event(head | {"choices": [delta(index, {"role": "assistant", "content": ""})]})
            while (piece := await pieces.get()) is not None:
                yield event(head | {"choices": [self._piece(job, *piece)]})
            try:
                choices = await written
            except EverytokenError as error:
                yield event({"error": {"message": error.message, "type": "invalid_request_error"}})
                return
            except Exception:
                log.exception("a stream failed")
                yield event({"error": {"message": "The server failed; its log says why.", "type": "server_error"}})
                return
            for choice in choices:
                yield event(head | {"choices": [self._last(job, choice, buffered)]})
            self._count(job, choices, counted=True)
            if job.ask.include_usage:
                yield event(head | {"choices": [], "usage": usage(job, choices)})
            yield "data: [DONE]\n\n"
        finally:  # also where the client has left
            cancelled.set()

    # -- answers -------------------------------------------------------------------------------------------------------
    def _head(self, chat: bool, chunk: bool = False) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if chat else "text_completion"
        mark = "chatcmpl" if chat else "cmpl"
        return {
            "id": f"{mark}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
        }

    def _piece(self, job: Job, index: int, text: str) -> dict[str, Any]:
        if job.ask.chat:
            return delta(index, {"content": text})
        return {"index": index, "text": text, "finish_reason": None, "logprobs": None}

    def _last(self, job: Job, choice: Choice, buffered: bool) -> dict[str, Any]:
        if not job.ask.chat:
            return {"index": choice.index, "text": "", "finish_reason": choice.finish, "logprobs": None}
        told: dict[str, Any] = {"content": choice.text} if buffered and choice.text else {}
        if choice.tool_calls:
            told["tool_calls"] = [{"index": place, **call} for place, call in enumerate(choice.tool_calls)]
        return delta(choice.index, told, choice.finish)

    def _message(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text or (None if choice.tool_calls else "")}
        if choice.tool_calls:
            message["tool_calls"] = choice.tool_calls
        told = None
        if choice.logprobs is not None:
            told = {"content": [self._token(token, logp) | {"top_logprobs": [self._token(*item) for item in top]}
                                for token, logp, top in choice.logprobs]}  # fmt: skip
        return {"index": choice.index, "message": message, "finish_reason": choice.finish, "logprobs": told}

    def _token(self, token: int, logp: float) -> dict[str, Any]:
        text, spelt = self.engine.spelt(token)
        return {"token": text, "logprob": max(logp, -9999.0), "bytes": spelt}

    def _text(self, job: Job, choice: Choice) -> dict[str, Any]:
        told = None
        if choice.logprobs is not None:
            texts = [self.engine.spelt(token)[0] for token, *_ in choice.logprobs]
            pieces, offsets, written = Pieces(self.engine.tokenizer), [], 0
            for token, *_ in choice.logprobs:
                offsets.append(written)
                written += len(pieces.add([token]))
            told = {
                "tokens": texts,
                "token_logprobs": [max(logp, -9999.0) for _, logp, _ in choice.logprobs],
                "top_logprobs": [
                    {self.engine.spelt(token)[0]: max(logp, -9999.0) for token, logp in top}
                    for *_, top in choice.logprobs
                ],
                "text_offset": offsets,
            }
        shown = job.texts[choice.index // job.ask.n] if job.ask.echo else ""
        return {"index": choice.index, "text": shown + choice.text, "finish_reason": choice.finish, "logprobs": told}

    # -- what is counted -----------------------------------------------------------------------------------------------
    def _count(self, job: Job, choices: list[Choice], counted: bool = False) -> None:
        if not counted:
            self.counts["requests", "200"] += 1
        self.counts["tokens", "prompt"] += job.prompt_tokens
        self.counts["tokens", "completion"] += sum(len(choice.tokens) for choice in choices)

    def metrics(self) -> str:
        """Prometheus' text format."""
        lines: list[str] = []
        for what, label in (("requests", "status"), ("tokens", "kind")):
            lines.append(f"# TYPE everytoken_{what}_total counter")
            counted = sorted((value, count) for (name, value), count in self.counts.items() if name == what)
            lines += [f'everytoken_{what}_total{{{label}="{value}"}} {count}' for value, count in counted]
        lines += ["# TYPE everytoken_requests_inside gauge", f"everytoken_requests_inside {self.inside}"]
        return "\n".join(lines) + "\n"


def usage(job: Job, choices: list[Choice]) -> dict[str, int]:
    """Tokens of the prompts (each once) and of all choices."""
    written = sum(len(choice.tokens) for choice in choices)
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": job.prompt_tokens + written,
    }


def delta(index: int, told: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": told, "finish_reason": finish, "logprobs": None}


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def make_app(server: Server) -> Starlette:
    """The application: ``/v1/chat/completions``, ``/v1/completions``, ``/v1/models``, ``/health`` and ``/metrics``."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, PlainTextResponse
    from starlette.routing import Route

    async def chat(request: Request) -> Response:
        return await server.answer(request, read_chat)

    async def completion(request: Request) -> Response:
        return await server.answer(request, read_completion)

    async def models(request: Request) -> Response:
        if not server.allowed(request):
            return server.refused(401, "The key is missing or wrong.", kind="authentication_error")
        one = {"id": server.name, "object": "model", "created": server.started, "owned_by": "everytoken"}
        return JSONResponse({"object": "list", "data": [one]})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "inside": server.inside, "room": server.waiting})

    async def metrics(request: Request) -> Response:
        if not server.allowed(request):
            return server.refused(401, "The key is missing or wrong.", kind="authentication_error")
        return PlainTextResponse(server.metrics(), media_type="text/plain; version=0.0.4")

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completion, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
            Route("/metrics", metrics),
        ]
    )
