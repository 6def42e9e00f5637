"""The site as a server: the static pages, search by meaning, a browser's own votes and notes, and subscriptions.

There are no accounts and no cookies. What changes something is a POST; a GET never does, for scanners of mail follow
links. Requests must name a host that the server answers for, and what a script asks for must be JSON, which other sites
cannot send.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import mimetypes
import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from ..core.errors import EverytokenError, require
from ..core.rate import body_within
from .digest.mail import MailServer, Sender, confirmation
from .digest.store import FREQUENCIES, TOKEN, Store, check_wish, clean_address
from .house import stations
from .page.entries import Entry
from .page.feed import check_base
from .page.render import POLICY, list_page, page, site_files
from .search import search

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger(__name__)
BODY = 16_384
"""Bytes that a request may bring."""
NOTE = 4000
QUERY = 400
HEADERS = {
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
TRACE_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
)
"""A trace is one file with its script inside; it runs apart from the site and may load nothing."""
ASKED = "If that address can be subscribed, a mail with a link to confirm it is on its way."
mimetypes.add_type("application/atom+xml", ".atom")


def make_app(
    entries: list[Entry],
    store: Store,
    base: str = "",
    hosts: list[str] | None = None,
    meaning: bool = True,
    sender: Sender | None = None,
    mail: MailServer | None = None,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Starlette:
    """The application.

    Args:
        base: the site's public address, for the feed.
        hosts: host names that requests may name, besides that of ``base`` and those of loopback.
        meaning: whether to search by meaning.
        sender, mail: who sends confirmations, and through which server; without them subscriptions are off.

    Raises:
        MissingExtraError: Starlette is not installed, or ``meaning`` without the ``search`` extra.
    """
    require("starlette", "serve", "The server of the papers")
    from starlette.applications import Starlette
    from starlette.background import BackgroundTask
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    made = site_files(entries, base, meaning=False, live=True)
    index = json.loads(made["search.json"])
    cards = [entry.card for entry in entries]
    known = {card.slug for card in cards}
    searching = threading.Lock()  # one encoder, one query at a time

    def found(query: str) -> list[str]:
        with searching:
            return [card.slug for card, _ in search(query, cards, meaning)]

    def html(text: str, status: int = 200, task: BackgroundTask | None = None) -> Response:
        return HTMLResponse(text, status, HEADERS | {"Cache-Control": "no-store"}, background=task)

    def said(
        heading: str,
        text: str,
        status: int = 200,
        task: BackgroundTask | None = None,
        deep: bool = False,
        form: str = "",
        action: str = "",
        **more: Any,
    ) -> Response:
        root = "../" if deep else ""
        values = {"heading": heading, "text": text, "form": form, "action": action, **more}
        return html(page("form.html", root, live=True, **values), status, task)

    async def file(request: Request) -> Response:
        name = request.path_params["path"] or "index.html"
        query = request.query_params.get("q", "").strip()[:QUERY]
        if name == "index.html" and query:
            slugs = await asyncio.to_thread(found, query)
            return html(list_page(entries, index, live=True, query=query, found=slugs))
        if name not in made:
            return said("Not found", "There is no such page.", 404, deep="/" in name)
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        more = {"Content-Security-Policy": TRACE_POLICY} if name.startswith("traces/") else {}
        return Response(made[name], media_type=kind, headers=HEADERS | more)

    async def ask(request: Request) -> Response:
        query = request.query_params.get("q", "")
        if len(query) > QUERY:
            return JSONResponse({"error": f"A query has at most {QUERY} letters."}, 400, HEADERS)
        return JSONResponse({"slugs": await asyncio.to_thread(found, query)}, headers=HEADERS)

    async def mine(request: Request) -> Response:
        body = await body_within(request, BODY)
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json" or not _same(request):
            return JSONResponse({"error": "Only the site's own script may ask this, as JSON."}, 415, HEADERS)
        if body is None:
            return JSONResponse({"error": "The request is too long."}, 413, HEADERS)
        try:
            wish = json.loads(body)
        except (ValueError, RecursionError):
            wish = None
        if not isinstance(wish, dict) or not _is_mine(wish, known):
            return JSONResponse(
                {"error": "It needs a profile of 32 hexadecimal digits and a paper's name."}, 400, HEADERS
            )
        kept = await asyncio.to_thread(store.mine, wish["profile"], wish["slug"], wish.get("vote"), wish.get("note"))
        return JSONResponse(kept, headers=HEADERS | {"Cache-Control": "no-store"})

    async def form(request: Request) -> Response:
        if sender is None or mail is None:
            return said("Subscriptions are off", "This server sends no mail.", 404)
        chosen = request.query_params.get("topic", "")
        text = "You get what is new on your topics. A mail asks you to confirm the address first."
        return said(
            "The papers by e-mail", text, form="subscribe", stations=stations(), chosen=chosen, frequencies=FREQUENCIES
        )

    async def subscribe(request: Request) -> Response:
        if sender is None or mail is None:
            return said("Subscriptions are off", "This server sends no mail.", 404)
        body = await body_within(request, BODY)
        if body is None or not _same(request):
            return said(
                "Not taken", "The request is too long or comes from another site.", 413 if body is None else 403
            )
        fields = parse_qs(body.decode("utf-8", "replace"), max_num_fields=100)

        def first(name: str, default: str = "") -> str:
            return fields.get(name, [default])[0]

        try:
            address = clean_address(first("address"))
            topics, frequency, zone = check_wish(
                fields.get("topic", []), first("frequency", "weekly"), first("zone", "UTC")
            )
        except EverytokenError as error:
            return said("Not taken", f"{error.message} {error.hint or ''}", 400)
        client = request.client.host if request.client else ""
        # the answer is the same whatever is known of the address, and comes before any of the work
        task = BackgroundTask(invite, address, topics, frequency, zone, client)
        return said("Look into your mail", ASKED, 202, task)

    def invite(address: str, topics: tuple[str, ...], frequency: str, zone: str, client: str) -> None:
        """Mails the confirmation; the log names a hash, never the address."""
        assert sender is not None and mail is not None
        now = clock()
        token = store.ask(address, topics, frequency, zone, client, now)
        if token is None:
            log.info("no confirmation to %s: too many were asked for", store.keyed(address)[:12])
            return
        try:
            with contextlib.closing(mail.connect()) as connection:
                connection.send_message(confirmation(sender, address, token, now), sender.address, [address])
        except (EverytokenError, OSError) as error:
            log.warning("no confirmation to %s: %s", store.keyed(address)[:12], type(error).__name__)

    async def confirm(request: Request) -> Response:
        token = request.path_params["token"]
        if not TOKEN.fullmatch(token):
            return said("Not found", "There is no such page.", 404, deep=True)
        if request.method != "POST":
            return said(
                "Confirm the subscription",
                "Press the button to get the digest.",
                form="Confirm",
                action=token,
                deep=True,
            )
        if not await asyncio.to_thread(store.confirm, token, clock()):
            return said("Gone", "This link has been used, or is older than 48 hours.", 410, deep=True)
        return said("Subscribed", "The next digest comes when there is something new.", deep=True)

    async def leave(request: Request) -> Response:
        token = request.path_params["token"]
        if not TOKEN.fullmatch(token):
            return said("Not found", "There is no such page.", 404, deep=True)
        if request.method != "POST":
            text = "Press the button and no further digest comes."
            return said("Unsubscribe", text, form="Unsubscribe", action=token, deep=True)
        await asyncio.to_thread(store.leave, token, clock())
        return said("Unsubscribed", "No further digest comes, and the address is deleted.", deep=True)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "papers": len(cards)}, headers=HEADERS)

    allowed = ["localhost", "127.0.0.1", "[::1]", *(hosts or [])]
    if name := urlsplit(check_base(base)).hostname:
        allowed.append(name)
    routes = [
        Route("/api/search", ask),
        Route("/api/mine", mine, methods=["POST"]),
        Route("/health", health),
        Route("/subscribe", form, methods=["GET"]),
        Route("/subscribe", subscribe, methods=["POST"]),
        Route("/confirm/{token}", confirm, methods=["GET", "POST"]),
        Route("/unsubscribe/{token}", leave, methods=["GET", "POST"]),
        Route("/{path:path}", file),
    ]
    return Starlette(
        routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=allowed, www_redirect=False)]
    )


def _same(request: Request) -> bool:
    """Whether a browser that says where a request comes from says: from here."""
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host", "")


def _is_mine(wish: dict[str, Any], known: set[str]) -> bool:
    if not isinstance(wish.get("slug"), str) or wish["slug"] not in known:
        return False
    if not re.fullmatch(r"[0-9a-f]{32}", str(wish.get("profile", ""))):
        return False
    note = wish.get("note", "")
    return isinstance(wish.get("vote", False), bool) and isinstance(note, str) and len(note) <= NOTE and _whole(note)


def _whole(text: str) -> bool:
    """Whether text can be written as UTF-8: JSON can spell half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
