"""Provider and auditor as HTTP services, and the provider behind HTTP as an auditor sees it.

Bodies are limited, requests are counted, redirects are not followed, and an auditor reaches only the providers that its
operator named: a request says a provider's name and never a URL.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..core.errors import BadInputError, EverytokenError, require
from ..core.rate import RateLimit, body_within
from .base import MOST_TOKENS, VERSION, AuditError, checked, from_hex
from .coin import Auditor
from .provider import NONCE, Source

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

REQUEST, TEXTS, ANSWER = 16_000, 4_000_000, 100 * MOST_TOKENS
"""Bytes at most: of a request to a provider, of one to an auditor (it holds texts), of an answer."""


async def read_body(request: Request, limit: int) -> Any:
    """A request's JSON.

    Raises:
        AuditError: more bytes than ``limit``, or no JSON.
    """
    data = await body_within(request, limit)
    if data is None:
        raise AuditError(f"A request has at most {limit:,} bytes.")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AuditError("A request must be JSON.") from error


def _service(routes: Mapping[str, tuple[int, Callable[[Any], Any]]], rate: RateLimit) -> Starlette:
    """An application of POST routes: path -> (bytes of a request, function of its JSON)."""
    require("starlette", "agents", "Audit services")
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    def route(path: str, limit: int, function: Callable[[Any], Any]) -> Route:
        async def answer(request: Request) -> Response:
            if not rate.allow():
                return JSONResponse({"error": "Too many requests."}, 429)
            try:
                body = await read_body(request, limit)
                return JSONResponse(await asyncio.to_thread(function, body))
            except EverytokenError as error:
                return JSONResponse({"error": error.message}, 400)

        return Route(path, answer, methods=["POST"])

    return Starlette(routes=[route(path, limit, function) for path, (limit, function) in routes.items()])


def provider_service(provider: Source, rate: RateLimit | None = None) -> Starlette:
    """A provider's answers to audits under ``/v1/statement``, ``/v1/leaves`` and ``/v1/open``.

    Args:
        rate: of all requests together; default 600 a minute.
    """

    def job_of(body: Any, names: set[str]) -> str:
        checked(body, {"job", *names})
        if not isinstance(body["job"], str):
            raise AuditError("A job's id is text.")
        job: str = body["job"]
        return job

    return _service(
        {
            "/v1/statement": (REQUEST, lambda body: provider.statement(job_of(body, set()))),
            "/v1/leaves": (REQUEST, lambda body: provider.leaves(job_of(body, set()))),
            "/v1/open": (
                REQUEST,
                lambda body: provider.reveal(
                    job_of(body, {"nonce", "wanted"}), from_hex(body["nonce"], NONCE), body["wanted"]
                ),
            ),
        },
        rate or RateLimit(600, 60.0),
    )


def auditor_service(auditors: Mapping[str, tuple[Auditor, Source]], rate: RateLimit | None = None) -> Starlette:
    """An auditor under ``/v1/audits``: asked with a provider's name, job, prompt and answer, it answers a report.

    Args:
        auditors: provider's name -> its auditor and the provider.
        rate: of all requests; default 600 a minute.
    """

    def audit(body: Any) -> dict[str, Any]:
        checked(body, {"provider", "job", "prompt", "answer"})
        if not all(isinstance(body[name], str) for name in ("provider", "job", "prompt", "answer")):
            raise AuditError("Provider, job, prompt and answer are texts.")
        if body["provider"] not in auditors:
            raise AuditError("This auditor knows no such provider.")
        auditor, source = auditors[body["provider"]]
        return auditor.audit(source, body["job"], body["prompt"], body["answer"]).message()

    return _service({"/v1/audits": (TEXTS, audit)}, rate or RateLimit(600, 60.0))


class RemoteProvider:
    """A provider behind HTTP.

    Args:
        url: where its service is; named by the auditor's operator.
        hosts: the hosts that may be reached; None is that of ``url``.
        seconds: time limit of one answer.

    Raises:
        BadInputError: no http or https URL, one with a user or a path in it, or a host that is not allowed.
        MissingExtraError: the extra ``agents`` is not installed.
    """

    def __init__(self, url: str, hosts: frozenset[str] | None = None, seconds: float = 30.0):
        require("httpx2", "agents", "Auditing over HTTP")
        try:
            parts = urlsplit(url)
            host = parts.hostname
        except ValueError as error:
            raise BadInputError(f"This is no URL: {url[:200]!r}.") from error
        if parts.scheme not in ("http", "https") or not host or parts.username or parts.path not in ("", "/"):
            raise BadInputError(f"A provider's URL is https://host:port; got {url[:200]!r}.")
        if hosts is not None and host not in hosts:
            raise BadInputError(f"The host {host} is not allowed.")
        self.url, self.seconds = url.rstrip("/"), seconds

    def _ask(self, path: str, **body: Any) -> Any:
        import httpx2

        data = bytearray()
        late = time.monotonic() + self.seconds  # the client's own limit is for each piece alone
        try:
            with (
                httpx2.Client(timeout=self.seconds, follow_redirects=False, trust_env=False) as web,
                web.stream("POST", self.url + path, json={"version": VERSION, **body}) as answer,
            ):
                for chunk in answer.iter_bytes():
                    data += chunk
                    if len(data) > ANSWER:
                        raise AuditError(f"The provider sent more than {ANSWER:,} bytes.")
                    if time.monotonic() > late:
                        raise AuditError(f"The provider did not answer within {self.seconds:g} s.")
                status = answer.status_code
        except httpx2.HTTPError as error:
            raise AuditError(f"The provider did not answer ({type(error).__name__}).") from error
        if status != 200:
            raise AuditError(f"The provider refused ({status}).")
        try:
            return json.loads(bytes(data))
        except (ValueError, RecursionError) as error:
            raise AuditError("The provider's answer is not JSON.") from error

    def statement(self, job: str) -> Any:
        return self._ask("/v1/statement", job=job)

    def leaves(self, job: str) -> Any:
        return self._ask("/v1/leaves", job=job)

    def reveal(self, job: str, nonce: bytes, wanted: int) -> Any:
        return self._ask("/v1/open", job=job, nonce=nonce.hex(), wanted=wanted)
