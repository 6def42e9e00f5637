"""Two real HTTP services: whole audits, limits, refusals, and 200 requests at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("cryptography")
httpx2 = pytest.importorskip("httpx2")
from typer.testing import CliRunner

from everytoken.audit.attacks import example_documents, jobs_of
from everytoken.audit.base import HashedWords
from everytoken.audit.coin import Auditor, CoIn
from everytoken.audit.provider import Provider
from everytoken.audit.services import RemoteProvider, auditor_service, provider_service
from everytoken.cli.app import app
from everytoken.core.errors import BadInputError, EverytokenError
from everytoken.core.rate import RateLimit

from ..loopback import served

SETTINGS = CoIn(block=16, round_size=16)
JOBS = jobs_of(example_documents(), 3, 64)


def committed(count=1):
    provider = Provider(HashedWords(64), block=16)
    for job in JOBS[:count]:
        provider.commit(job.id, job.prompt, job.answer, job.tokens)
    return provider


def test_an_audit_through_two_services():
    provider, job = committed(), JOBS[0]
    with served(provider_service(provider)) as url:
        auditor = Auditor(HashedWords(64), provider.public_key, settings=SETTINGS)
        with served(auditor_service({"theirs": (auditor, RemoteProvider(url))})) as mine:
            asked = {"version": 1, "provider": "theirs", "job": job.id, "prompt": job.prompt, "answer": job.answer}
            report = httpx2.post(f"{mine}/v1/audits", json=asked).json()
            assert (report["verdict"], report["count"], report["opened"]) == ("undecided", 64, 25)
            for change in ({"provider": "http://169.254.169.254/"}, {"version": 2}, {"job": 3}, {"more": 1}):
                answer = httpx2.post(f"{mine}/v1/audits", json=asked | change)
                assert answer.status_code == 400 and "error" in answer.json()


def test_what_a_provider_refuses():
    provider = committed()
    with served(provider_service(provider, RateLimit(8, 60.0))) as url:
        ask = lambda path, **more: httpx2.post(url + path, timeout=10, **more)  # noqa: E731
        good = {"version": 1, "job": JOBS[0].id}
        assert ask("/v1/statement", json=good).status_code == 200
        assert "no such job" in ask("/v1/statement", json={**good, "job": "x"}).json()["error"]
        assert "16,000 bytes" in ask("/v1/statement", content=b" " * 16_001).json()["error"]
        assert "must be JSON" in ask("/v1/leaves", content=b"[" * 15_000).json()["error"]
        for wanted, nonce in (("3", "00" * 32), (3, "00" * 31), (10**9, "00" * 32)):
            assert ask("/v1/open", json={**good, "nonce": nonce, "wanted": wanted}).status_code == 400
        assert httpx2.get(url + "/v1/statement").status_code == 405
        assert ask("/v1/statement", json=good).status_code == 200
        assert ask("/v1/statement", json=good).status_code == 429


@pytest.mark.slow
def test_providers_that_misbehave_over_http():
    """Redirects, other formats, errors, silence (about 4 s)."""
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse, RedirectResponse, StreamingResponse
    from starlette.routing import Route

    auditor = Auditor(HashedWords(64), committed().public_key, settings=SETTINGS)
    job = JOBS[0]

    async def hang(_request):
        await asyncio.sleep(3)
        return PlainTextResponse("")

    async def drops():
        for _ in range(40):
            yield b"1"
            await asyncio.sleep(0.1)

    answers = {
        "within 0.5 s": lambda _request: StreamingResponse(drops()),
        "refused (307)": lambda _request: RedirectResponse("http://127.0.0.1:1/"),
        "not JSON": lambda _request: PlainTextResponse("<html>"),
        "refused (500)": lambda _request: PlainTextResponse("", 500),
        "did not answer": hang,
    }
    for reason, endpoint in answers.items():
        with served(Starlette(routes=[Route("/v1/statement", endpoint, methods=["POST"])])) as url:
            report = auditor.audit(RemoteProvider(url, seconds=0.5), job.id, job.prompt, job.answer)
        assert report.verdict == "failed" and reason in report.reason
    gone = auditor.audit(RemoteProvider("http://127.0.0.1:9"), job.id, job.prompt, job.answer)
    assert gone.verdict == "failed" and "did not answer" in gone.reason
    for url in ("file:///x", "http://u:p@h", "http://h/path", "http://[", "nothing"):
        with pytest.raises(BadInputError):
            RemoteProvider(url)
    with pytest.raises(BadInputError, match="not allowed"):
        RemoteProvider("http://127.0.0.1:9", frozenset({"other"}))


@pytest.mark.slow
def test_two_hundred_requests_at_once_lose_none():
    """The provider's service, one connection each (about 3 s)."""
    provider = committed(3)
    with served(provider_service(provider, RateLimit(1000, 60.0))) as url:

        async def all_of_them():
            limits = httpx2.Limits(max_connections=200)
            async with httpx2.AsyncClient(limits=limits, timeout=60) as web:

                async def one(number):
                    job = JOBS[number % 3]
                    path = ("/v1/statement", "/v1/leaves")[number % 2]
                    answer = await web.post(url + path, json={"version": 1, "job": job.id})
                    found = answer.json()
                    return answer.status_code, found.get("job", found.get("statement", {}).get("job")) == job.id

                return await asyncio.gather(*(one(number) for number in range(200)))

        assert asyncio.run(all_of_them()) == [(200, True)] * 200


@pytest.mark.slow
def test_the_commands(tmp_path):
    """train, provide in a process of its own, verify, recheck (about 10 s)."""
    job = JOBS[0]
    row = {"job": job.id, "prompt": job.prompt, "answer": job.answer}
    (tmp_path / "jobs.jsonl").write_text(json.dumps({**row, "tokens": list(job.tokens)}))
    (tmp_path / "texts.json").write_text(json.dumps(row))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--jobs", tmp_path / "jobs.jsonl", "--key", tmp_path / "key", "--port", port, "--set", "block=16"]
    command = [sys.executable, "-m", "everytoken", "audit", "provide", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(item for item in sys.path if item)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def invoke(*words):
        done = CliRunner().invoke(app, ["audit", *map(str, words)])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.output

    try:
        key = process.stdout.readline().split()[-1]
        assert (tmp_path / "key").stat().st_mode & 0o077 == 0
        verifier = tmp_path / "verifier.json"
        assert "linear verifier" in invoke(
            "train", "--out", verifier, "--jobs", 16, "--length", 64, "--set", "block=16"
        )
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        same = ["--public-key", key, "--verifier", verifier, "--set", "block=16"]
        url = f"http://127.0.0.1:{port}"
        given = ["--job", job.id, "--texts", tmp_path / "texts.json", "--out", tmp_path / "report.json"]
        told = invoke("verify", url, *given, *same)
        assert "64 hidden tokens billed" in told
        assert invoke("recheck", tmp_path / "report.json", *same).split()[0] == told.split()[0]
        with pytest.raises(EverytokenError, match="ended as failed"):
            invoke("verify", url, *given, "--public-key", "00" * 32, "--set", "block=16")
        with pytest.raises(EverytokenError, match="64 hexadecimal"):
            invoke("verify", url, *given, "--public-key", "zz")
    finally:
        process.kill()
        process.wait()
