"""The served site, over real sockets: subscriptions by mail, own votes and notes, what requests may not do."""

from __future__ import annotations

import json
import re
import time
from email import message_from_bytes
from email.policy import default

import pytest

pytest.importorskip("starlette")

from everytoken.catalog.digest.mail import MailServer, Sender
from everytoken.catalog.digest.store import Store
from everytoken.catalog.server import make_app

from ..cli.common import run
from .site import ask, hostile_entries, mail_server, served

PROFILE = "0123456789abcdef" * 2


@pytest.fixture
def site(tmp_path):
    """``(port, mailbox, store)`` of a server with subscriptions."""
    store = Store(tmp_path / "papers.sqlite")
    with mail_server() as (box, port):
        sender = Sender("digest@papers.example", "https://papers.example", "Example Street 1")
        app = make_app(
            hostile_entries(), store, "https://papers.example", meaning=False, sender=sender,
            mail=MailServer("127.0.0.1", port),
        )  # fmt: skip
        with served(app) as number:
            yield number, box, store
    store.close()


def waited(box, number):
    end = time.monotonic() + 10
    while len(box.mails) < number and time.monotonic() < end:
        time.sleep(0.01)
    assert len(box.mails) == number


def test_subscribe_confirm_and_unsubscribe(site, tmp_path):
    port, box, store = site
    form = "address=Ann%40Example.ORG&topic=generation&frequency=daily&zone=Europe/Berlin"
    status, headers, first = ask(port, "POST", "/subscribe", form)
    assert status == 202 and "set-cookie" not in headers
    waited(box, 1)
    text = message_from_bytes(box.mails[0][1], policy=default).get_body(("plain",)).get_content()
    path = re.search(r"https://papers\.example(/confirm/\S{43})", text)[1]
    for _ in range(2):  # a GET shows a button and changes nothing: scanners of mail follow links
        status, _, page = ask(port, "GET", path)
        assert status == 200 and 'method="post"' in page
        assert store.export("Ann@example.org")["state"] == "wait"
    assert ask(port, "POST", path, "")[0] == 200
    assert store.export("Ann@example.org")["state"] == "on"
    assert ask(port, "POST", path, "")[0] == 410
    assert ask(port, "POST", "/subscribe", form)[2] == first  # the same answer for a known address
    kept = run("papers", "subscribers", "Ann@example.org", "--data", store.path)
    assert json.loads(kept.stdout)["topics"] == ["generation"]

    leave = f"/unsubscribe/{store.leave_token(1, __import__('datetime').datetime.now(__import__('datetime').UTC))}"
    assert ask(port, "GET", leave)[0] == 200 and store.subscribers()
    for _ in range(2):  # as RFC 8058 has it: that body, no cookie, no redirect; again and it tells nothing
        status, headers, page = ask(port, "POST", leave, "List-Unsubscribe=One-Click")
        assert status == 200 and "set-cookie" not in headers and "Unsubscribed" in page
        assert store.export("Ann@example.org") is None
    assert ask(port, "POST", f"/unsubscribe/{'A' * 43}", "")[2] == page
    for path in ("/unsubscribe/x", f"/confirm/{'A' * 44}", "/confirm/x%0a"):
        assert ask(port, "POST", path, "")[0] == 404


def test_what_a_subscription_may_not_be(site):
    port, box, _ = site
    for form in ("", "address=a", "address=a%40x.org&topic=nonsense", "address=a%40x.org%0aBcc: b@y.org",
                 "address=a%40x.org&frequency=hourly", "address=a%40x.org&zone=../../etc/passwd"):  # fmt: skip
        assert ask(port, "POST", "/subscribe", form)[0] == 400
    assert ask(port, "POST", "/subscribe", "address=a%40x.org", origin="https://evil.example")[0] == 403
    assert ask(port, "POST", "/subscribe", "address=" + "a" * 20_000)[0] == 413
    assert box.mails == []
    for _ in range(5):
        assert ask(port, "POST", "/subscribe", "address=a%40x.org")[0] == 202
    time.sleep(0.5)
    assert len(box.mails) == 3


def test_votes_and_notes_are_a_browsers_own(site):
    port, _, _ = site
    slug = hostile_entries()[0].card.slug

    def mine(**wish):
        body = json.dumps({"profile": PROFILE, "slug": slug} | wish).encode()
        status, _, text = ask(port, "POST", "/api/mine", body, content_type="application/json")
        return status, json.loads(text)

    assert mine() == (200, {"vote": False, "note": ""})
    assert mine(vote=True, note="<b>x") == (200, {"vote": True, "note": "<b>x"})
    assert mine()[1] == {"vote": True, "note": "<b>x"}
    assert mine(profile="f" * 32)[1] == {"vote": False, "note": ""}  # another browser
    assert mine(vote=False)[1]["vote"] is False
    for wrong in ({"profile": "x"}, {"slug": "../x"}, {"vote": 1}, {"note": "x" * 4001}, {"note": "\ud800"}):
        assert mine(**wrong)[0] == 400
    for body in (b"[" * 5000, b"null", b"\xff", b"1"):
        assert ask(port, "POST", "/api/mine", body, content_type="application/json")[0] == 400
    assert ask(port, "POST", "/api/mine", b"x" * 20_000, content_type="application/json")[0] == 413
    good = json.dumps({"profile": PROFILE, "slug": slug, "vote": True})
    assert ask(port, "POST", "/api/mine", good, content_type="text/plain")[0] == 415  # what another site can send
    far = {"content_type": "application/json", "origin": "https://evil.example"}
    assert ask(port, "POST", "/api/mine", good.encode(), **far)[0] == 415


def test_pages_headers_and_hosts(site):
    port, _, _ = site
    entry = hostile_entries()[0]
    status, headers, page = ask(port, "GET", "/")
    assert status == 200 and "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "<img src=x" not in page and page.count("<script") == 3  # two files and the index
    status, _, paper = ask(port, "GET", f"/papers/{entry.card.slug}.html")
    assert status == 200 and "javascript:" not in paper.replace("live.js", "") and 'id="vote"' in paper
    assert ask(port, "GET", "/feed.atom")[1]["content-type"].startswith("application/atom+xml")
    assert json.loads(ask(port, "GET", "/api/search?q=token")[2])["slugs"]
    assert ask(port, "GET", f"/api/search?q={'x' * 500}")[0] == 400
    without_script = ask(port, "GET", f"/?q={entry.card.arxiv}")[2]
    assert without_script.count("<li ") == 1
    assert json.loads(ask(port, "GET", "/health")[2])["status"] == "ok"
    assert ask(port, "GET", "/", host="evil.example")[0] == 400  # a name that was made to point here
    assert ask(port, "GET", "/", host="papers.example")[0] == 200
    for path in ("/../pyproject.toml", "/papers/%2e%2e/%2e%2e/x", "/papers/none.html"):
        assert ask(port, "GET", path)[0] == 404


def test_without_mail_subscriptions_are_off(tmp_path):
    with served(make_app(hostile_entries(), Store(tmp_path / "x"), meaning=False)) as port:
        assert ask(port, "GET", "/subscribe")[0] == ask(port, "POST", "/subscribe", "address=a%40x.org")[0] == 404
