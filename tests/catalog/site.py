"""What the tests of the site share: hostile entries, a mail server on loopback, a served application, a browser."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import ssl
import subprocess
import threading
import time
from dataclasses import replace

import pytest

from everytoken.catalog import load_catalog
from everytoken.catalog.page.entries import entries

HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>\u2028{{ 7 * 7 }} \"'&$x$"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def hostile_entries(number=3):
    """Papers without results, the first with a title that attacks whatever shows it."""
    cards = list(load_catalog().values())[:number]
    cards[0] = replace(cards[0], title=HOSTILE, summary=HOSTILE, code="javascript:alert(3)")
    return entries(lambda card: None, cards=cards, pictures=False)


class Mailbox:
    """What a mail server does with mails: takes them, or answers as told.

    Attributes:
        answers: what it says next to RCPT ("rcpt") or DATA ("data"); "drop" breaks the line once the mail is taken.
    """

    def __init__(self):
        self.mails, self.answers, self.secure = [], [], []

    async def handle_RCPT(self, server, session, envelope, address, options):
        if self.answers and self.answers[0][0] == "rcpt":
            return self.answers.pop(0)[1]
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):
        if self.answers and self.answers[0][0] == "data":
            return self.answers.pop(0)[1]
        self.mails.append((list(envelope.rcpt_tos), bytes(envelope.content)))
        self.secure.append(session.ssl is not None)
        if self.answers and self.answers[0][0] == "drop":
            self.answers.pop(0)
            server.transport.abort()
        return "250 taken"


@contextlib.contextmanager
def mail_server(context=None):
    """A real SMTP server on loopback, with STARTTLS where it has a context; yields ``(mailbox, port)``."""
    pytest.importorskip("aiosmtpd")
    from aiosmtpd.controller import Controller

    box = Mailbox()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    more = {"tls_context": context, "require_starttls": True} if context else {}
    controller = Controller(box, hostname="127.0.0.1", port=port, **more)
    controller.start()
    try:
        yield box, port
    finally:
        controller.stop()


def certificate(folder):
    """A certificate of 127.0.0.1 that signs itself: ``(path, server's context)``."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    key, path = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", path],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, key)
    return path, context


@contextlib.contextmanager
def served(app):
    """The application on a free port of loopback; yields the port."""
    uvicorn = pytest.importorskip("uvicorn")
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started and time.monotonic() < end:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)


def ask(port, method, path, body=None, **headers):
    """A request: ``(status, headers, text)``."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    kinds = {name.replace("_", "-"): value for name, value in headers.items()}
    if isinstance(body, str):
        kinds.setdefault("content-type", "application/x-www-form-urlencoded")
    connection.request(method, path, body, kinds)
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read().decode()
    connection.close()
    return found


@contextlib.contextmanager
def browser(**context):
    """A page of a real headless browser: ``(page, complaints)``; complaints are console errors and requests that leave
    the machine.
    """
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        engine = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = engine.new_context(**context).new_page()
        complaints = []
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        near = ("file:", "http://127.0.0.1:", "data:")
        page.on("request", lambda asked: None if asked.url.startswith(near) else complaints.append(asked.url))
        page.on("requestfailed", lambda asked: complaints.append(f"failed: {asked.url}"))
        try:
            yield page, complaints
        finally:
            engine.close()
