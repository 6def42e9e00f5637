"""Subscriptions and the digest: states, limits, and mails to a real SMTP server, crashes included."""

from __future__ import annotations

import email
import email.policy
import random
import re
import ssl
from datetime import UTC, datetime, timedelta

import pytest

from everytoken.catalog.digest import store as store_module
from everytoken.catalog.digest.mail import MailServer, Paper, Sender, confirmation, digest, message_id, uncovered
from everytoken.catalog.digest.send import run_digest
from everytoken.catalog.digest.store import Store, Subscriber, check_wish, clean_address
from everytoken.core.errors import BadInputError, EverytokenError

from .site import HOSTILE, certificate, mail_server

NOW = datetime(2026, 11, 27, 12, tzinfo=UTC)
SENDER = Sender("digest@papers.example", "https://papers.example", "Example Street 1")
PAPERS = [Paper(f"card:{n}", f"Paper {n}", "Text.", f"https://papers.example/{n}", ("generation",)) for n in range(3)]


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "papers.sqlite")
    yield made
    made.close()


def subscribed(store, address="a@example.org", topics=(), frequency="daily", zone="UTC", now=NOW):
    token = store.ask(address, topics, frequency, zone, address, now)
    assert store.confirm(token, now)


def parsed(mail):
    return email.message_from_bytes(mail[1], policy=email.policy.default)


def server(port, **more):
    return MailServer("127.0.0.1", port, time_limit=3, **more)


# -- addresses and wishes ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    ["", "a", "a@", "@b.org", "a@x.org, b@y.org", "a@x.org\nBcc: b@y.org", "a@x.org\x00", "a b@x.org", "a@localhost",
     "Name <a@x.org>", "a@-x.org", "a@x..org", f"{'a' * 65}@x.org", f"a@{'x' * 250}.org", "a@x.org\u2028", "ä@x.org"],
)  # fmt: skip
def test_what_is_not_exactly_one_address_is_refused(text):
    with pytest.raises(BadInputError, match="not one e-mail address"):
        clean_address(text)


def test_domains_are_lower_case_and_ascii_and_plus_parts_stay():
    assert clean_address(" Ann+papers@Example.ORG ") == "Ann+papers@example.org"
    assert clean_address("a@bücher.example") == "a@xn--bcher-kva.example"


def test_wishes_are_checked():
    assert check_wish(["preference", "generation"], "weekly", "Europe/Berlin")[0] == ("generation", "preference")
    for wish, words in ((["x"], "topic"), ([], "zone")):
        with pytest.raises(BadInputError, match=words):
            check_wish(wish, "weekly", "UTC" if wish else "Mars/Base")
    with pytest.raises(BadInputError, match="frequency"):
        check_wish([], "hourly", "UTC")


# -- states -----------------------------------------------------------------------------------------------------------
def test_double_opt_in(store):
    token = store.ask("a@example.org", (), "daily", "UTC", "here", NOW)
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", token)
    assert store.subscribers() == []  # nothing before the confirmation
    everything = b"".join(path.read_bytes() for path in store.path.parent.iterdir())
    assert token.encode() not in everything  # only its hash is stored
    assert not store.confirm(token + "x", NOW) and not store.confirm("A" * 43, NOW)
    assert store.confirm(token, NOW + timedelta(hours=47))
    assert [item.address for item in store.subscribers()] == ["a@example.org"]
    assert not store.confirm(token, NOW)  # once


def test_a_confirmation_ends_after_48_hours(store):
    token = store.ask("a@example.org", (), "daily", "UTC", "here", NOW)
    assert not store.confirm(token, NOW + timedelta(hours=49))
    assert store.export("a@example.org") is None


def test_limits_against_mail_bombing(store):
    asked = [store.ask("a@example.org", (), "daily", "UTC", f"client {n}", NOW) for n in range(5)]
    assert [token is not None for token in asked] == [True] * 3 + [False] * 2
    assert store.ask("a@example.org", (), "daily", "UTC", "x", NOW + timedelta(hours=25)) is not None
    by_one = [store.ask(f"b{n}@example.org", (), "daily", "UTC", "one", NOW) for n in range(25)]
    assert sum(token is not None for token in by_one) == 20
    assert store.ask("c@example.org", (), "daily", "UTC", "one", NOW + timedelta(minutes=61)) is not None


def test_a_wish_of_somebody_else_changes_nothing(store):
    subscribed(store, topics=("generation",))
    assert store.ask("a@example.org", ("preference",), "monthly", "UTC", "elsewhere", NOW) is not None
    assert store.subscribers()[0].topics == ("generation",)


def test_leaving_deletes_and_keeps_only_a_hash(store):
    subscribed(store)
    token = store.leave_token(1, NOW)
    store.leave("A" * 43, NOW)
    assert store.subscribers()
    store.leave(token, NOW)
    store.leave(token, NOW)
    assert store.export("a@example.org") is None
    store.rows("PRAGMA wal_checkpoint(TRUNCATE)")
    assert b"a@example.org" not in b"".join(path.read_bytes() for path in store.path.parent.iterdir())
    later = NOW + timedelta(days=2)
    assert store.ask("a@example.org", (), "daily", "UTC", "x", later) is None  # one was mailed in these 30 days
    assert store.ask("a@example.org", (), "daily", "UTC", "x", NOW + timedelta(days=31)) is not None


def test_days_are_those_of_the_subscriber():
    def due(zone, last, now, frequency="daily"):
        return Subscriber(1, "a@example.org", (), frequency, zone, last).due(now)

    evening = datetime(2026, 11, 27, 16, tzinfo=UTC)  # the 28th in Tokyo, from 15:00 on
    assert due("Asia/Tokyo", "2026-11-27", evening) and not due("UTC", "2026-11-27", evening)
    assert not due("UTC", "2026-11-21", evening, "weekly") and due("UTC", "2026-11-20", evening, "weekly")
    assert not due("UTC", "2026-11-01", evening, "monthly") and due("UTC", "2026-10-31", evening, "monthly")


def test_a_file_that_is_no_data_base(tmp_path):
    (tmp_path / "x").write_text("no data base at all, but long enough to be read as one" * 30)
    with pytest.raises(BadInputError, match="data base"):
        Store(tmp_path / "x")


# -- mails ------------------------------------------------------------------------------------------------------------
def test_a_digest_shows_hostile_text_as_text_and_has_the_headers():
    hostile = Paper("x", HOSTILE + "\r\nBcc: c@example.org\x00", HOSTILE, "javascript:alert(1)", ("generation",))
    reader = Subscriber(7, "a+b@example.org", (), "weekly", "UTC")
    mail = digest(SENDER, reader, [hostile, *PAPERS], "T" * 43, "2026-11-27", NOW)
    back = email.message_from_bytes(bytes(mail), policy=email.policy.default)  # unfolded as a receiver does
    assert back["To"].addresses[0].addr_spec == "a+b@example.org" and back["Bcc"] is None
    assert back["List-Unsubscribe"].startswith(f"<https://papers.example/unsubscribe/{'T' * 43}>, <mailto:")
    assert back["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    assert back["Message-ID"] == message_id(reader, "2026-11-27", SENDER)
    text, page = (part.get_content() for part in back.iter_parts())
    assert "<img src=x onerror=alert(1)>" in text and "{{ 7 * 7 }}" in text  # not escaped: it is no HTML
    assert "<img" not in page and "<script" not in page and "javascript:" not in page
    assert "&lt;img src=x" in page and "Example Street 1" in page and "Example Street 1" in text
    assert "src=" not in page.replace("&lt;img src=x", "")  # nothing is fetched
    assert set(re.findall(r'href="([^"]+)"', page)) == {
        *(paper.link for paper in PAPERS), f"https://papers.example/unsubscribe/{'T' * 43}"
    }  # fmt: skip


def test_a_confirmation_says_nothing_else():
    mail = confirmation(SENDER, "a@example.org", "T" * 43, NOW)
    assert mail["List-Unsubscribe"] is None
    assert mail.get_body(("plain",)).get_content().count("https://") == 1


def test_senders_are_checked():
    for values, words in (
        (("x", "https://a.example", "here"), "e-mail address"),
        (("d@a.example", "http://a.example", "here"), "https"),
        (("d@a.example", "", "here"), "https"),
        (("d@a.example", "https://a.example", " "), "who sent it"),
    ):
        with pytest.raises(BadInputError, match=words):
            Sender(*values)
    assert Sender("d@a.example", "http://127.0.0.1:80", "here").domain == "a.example"


def test_what_a_signature_covers():
    mail = digest(SENDER, Subscriber(1, "a@b.org", (), "daily", "UTC"), PAPERS, "T" * 43, "2026-11-27", NOW)
    assert len(uncovered(mail)) == 2
    mail["DKIM-Signature"] = "v=1; d=papers.example; h=From : list-unsubscribe; b=x"
    assert len(uncovered(mail)) == 2
    mail["DKIM-Signature"] = "v=1; h=From:List-Unsubscribe:List-Unsubscribe-Post; b=x"
    assert uncovered(mail) == []


# -- sending ----------------------------------------------------------------------------------------------------------
def test_by_starttls_with_a_certificate_that_is_checked(store, tmp_path):
    path, context = certificate(tmp_path)
    subscribed(store)
    trusting = ssl.create_default_context(cafile=path)
    with mail_server(context) as (box, port):
        with pytest.raises(EverytokenError, match="certificate"):
            run_digest(store, SENDER, PAPERS, NOW, server(port))  # the system's authorities do not know it
        assert not store.rows("SELECT * FROM mails")  # nothing was claimed
        assert run_digest(store, SENDER, PAPERS, NOW, server(port, context=trusting)).sent == 1
        assert box.secure == [True]


def test_no_starttls_and_passwords_in_the_clear_are_refused(monkeypatch):
    with mail_server() as (_box, port):
        with pytest.raises(EverytokenError, match="without TLS"):
            server(port, user="u", password="p").connect()
        monkeypatch.setattr("everytoken.catalog.digest.mail.loopback", lambda host: False)
        with pytest.raises(EverytokenError, match="no STARTTLS"):
            server(port).connect()


def test_once_on_topic_and_nothing_where_nothing_is_new(store):
    subscribed(store)
    subscribed(store, "b@example.org", topics=("preference",))
    with mail_server() as (box, port):
        dry = run_digest(store, SENDER, PAPERS, NOW, None)
        assert len(dry.mails) == 1 and not box.mails
        first = run_digest(store, SENDER, PAPERS, NOW, server(port))
        assert (first.sent, first.nothing_new) == (1, 1)
        assert run_digest(store, SENDER, PAPERS, NOW, server(port)).not_due == 1
        tomorrow = NOW + timedelta(days=1)
        assert run_digest(store, SENDER, PAPERS, tomorrow, server(port)).nothing_new == 2
        more = [*PAPERS, Paper("card:9", "Paper 9", "Text.", "", ("generation", "preference"))]
        assert run_digest(store, SENDER, more, tomorrow, server(port)).sent == 2
    assert [receivers for receivers, _ in box.mails] == [["a@example.org"], ["a@example.org"], ["b@example.org"]]
    text = parsed(box.mails[1]).get_body(("plain",)).get_content()
    assert "Paper 9" in text and "Paper 1" not in text
    link = re.search(r"unsubscribe/(\S{43})", text)[1]
    store.leave(link, NOW)
    assert len(store.subscribers()) == 1


@pytest.mark.parametrize("where", ["rcpt", "data"])
def test_refusals(store, where):
    subscribed(store)
    with mail_server() as (box, port):
        box.answers = [(where, "451 later")]
        assert run_digest(store, SENDER, PAPERS, NOW, server(port)).later == 1
        box.answers = [(where, "550 no such user")]
        assert run_digest(store, SENDER, PAPERS, NOW, server(port)).refused == 1
        box.answers = [(where, "550 no such user")]
        assert run_digest(store, SENDER, PAPERS, NOW, server(port)).turned_off == 1
        assert store.subscribers() == [] and box.mails == []


def test_a_line_that_breaks_is_tried_once_more_with_the_same_id(store):
    subscribed(store)
    with mail_server() as (box, port):
        box.answers = [("drop", "")]
        assert run_digest(store, SENDER, PAPERS, NOW, server(port)).later == 1
        assert run_digest(store, SENDER, PAPERS, NOW + timedelta(days=1), server(port)).sent == 1
        one, two = (parsed(mail)["Message-ID"] for mail in box.mails)
        assert one == two
        box.answers = [("drop", ""), ("drop", "")]
        more = [*PAPERS, Paper("card:9", "Paper 9", "Text.", "", ("generation",))]
        for day, name in ((2, "later"), (3, "later"), (4, "unsure")):
            report = run_digest(store, SENDER, more, NOW + timedelta(days=day), server(port))
            assert getattr(report, name) == 1


def test_two_runs_at_once_are_refused(store):
    subscribed(store)
    with mail_server() as (box, port):

        def again(name):
            if name == "claimed":
                with pytest.raises(EverytokenError, match="Another run"):
                    run_digest(store, SENDER, PAPERS, NOW, server(port))

        assert run_digest(store, SENDER, PAPERS, NOW, server(port), again).sent == len(box.mails) == 1


class Crash(BaseException):
    """Ends a run as a killed process would: nothing after it is written."""


@pytest.mark.parametrize("seed", range(3))
def test_no_paper_twice_none_lost_none_before_confirmation(tmp_path, seed):
    """Random runs, crashes at any step and new papers; a receiver knows a repeated mail by its Message-ID."""
    dice = random.Random(seed)
    store = Store(tmp_path / "x.sqlite")
    readers = [f"r{n}@example.org" for n in range(4)]
    waiting = {address: store.ask(address, (), "daily", "UTC", address, NOW) for address in readers}
    papers, on = list(PAPERS), set()

    with mail_server() as (box, port):
        for day in range(14):
            now = NOW + timedelta(days=day)
            if day < 2 and waiting:
                address = readers[day]
                store.confirm(waiting.pop(address), NOW)
                on.add(address)
            if day < 8 and dice.random() < 0.6:
                papers.append(Paper(f"new:{day}", f"New {day}", "Text.", "", ("generation",)))
            crashed = day % 2 == 0 and day < 10  # a day's crash is mended by the next day's run
            at, seen = dice.randrange(6), [0]

            def moment(name, crashed=crashed, at=at, seen=seen):
                seen[0] += 1
                if crashed and seen[0] > at:
                    raise Crash(name)

            try:
                run_digest(store, SENDER, papers, now, server(port), moment)
            except Crash:
                store.close()
                store = Store(tmp_path / "x.sqlite")
    assert {receivers[0] for receivers, _ in box.mails} == on
    for address in on:
        mails = {parsed(mail)["Message-ID"]: parsed(mail) for mail in box.mails if mail[0] == [address]}
        texts = [mail.get_body(("plain",)).get_content() for mail in mails.values()]
        for paper in papers:
            assert sum(f"* {paper.title}" in text.splitlines() for text in texts) == 1, paper.title
    store.close()


@pytest.mark.slow
def test_a_hundred_subscribers_and_all_papers(store):
    many = [Paper(f"card:{n}", f"Paper {n}", "Text. " * 40, "", ("generation",)) for n in range(53)]
    for number in range(100):
        subscribed(store, f"r{number}@example.org")
    with mail_server() as (box, port):
        assert run_digest(store, SENDER, many, NOW, server(port)).sent == len(box.mails) == 100
        assert run_digest(store, SENDER, many, NOW + timedelta(days=1), server(port)).sent == 0


def test_tokens_are_random():
    assert store_module.TOKEN.fullmatch("A" * 43) and not store_module.TOKEN.fullmatch("A" * 43 + "\n")
