"""A run of the digest: who gets what, and how a crash at any moment neither loses a paper nor sends one twice.

A mail is written down as *sending* with its papers before it is handed in, and as *sent* once the server has taken it.
What is known not to have been taken is *free*: its papers come again. A mail that is found as *sending* is one whose
fate a crash has hidden: it is tried once more with the same Message-ID, by which receivers know it, and is *unsure* if
that breaks off too; its papers are not sent again and the report counts it.
"""

from __future__ import annotations

import json
import smtplib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from email.message import EmailMessage
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from ...core.errors import EverytokenError
from .mail import MailServer, Paper, Sender, digest, message_id
from .store import REFUSALS, Store, Subscriber

if TYPE_CHECKING:
    import sqlite3

TRIES = 2
"""Attempts at a mail whose fate is not known."""


@dataclass
class Report:
    """What a run did: numbers of mails.

    Attributes:
        sent: taken by the server.
        nothing_new: due subscribers to whom there was nothing to send.
        not_due: subscribers whose day has not come.
        later: not taken for now; they come again.
        refused: refused for good by the receiver's server.
        turned_off: subscribers off after repeated refusals.
        unsure: given up because both attempts broke off; these papers are not sent again.
        mails: the mails themselves, where the run was a dry one.
    """

    sent: int = 0
    nothing_new: int = 0
    not_due: int = 0
    later: int = 0
    refused: int = 0
    turned_off: int = 0
    unsure: int = 0
    mails: list[EmailMessage] = field(default_factory=list)


@dataclass(frozen=True)
class _Claim:
    """A mail that is about to be handed in."""

    message: str
    day: str
    papers: list[Paper]


def run_digest(
    store: Store,
    sender: Sender,
    papers: Sequence[Paper],
    now: datetime,
    server: MailServer | None,
    moment: Callable[[str], None] = lambda _: None,
) -> Report:
    """Sends every due subscriber what is new to them.

    Args:
        papers: all that could be sent, in the order in which a mail shows them.
        now: with a time zone; days are those of each subscriber's zone.
        server: None for a dry run, which changes nothing and returns the mails.
        moment: called with a name at every step between which a crash may happen; for tests.

    Raises:
        EverytokenError: another run is going, the mail server cannot be used, or refuses the sender.
    """
    lock = FileLock(f"{store.path}.digest.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise EverytokenError("Another run of the digest is going.", "Wait until it has ended.") from error
    try:
        return _Run(store, sender, list(papers), now, server, moment).all()
    finally:
        lock.release()


class _Run:
    def __init__(
        self,
        store: Store,
        sender: Sender,
        papers: list[Paper],
        now: datetime,
        server: MailServer | None,
        moment: Callable[[str], None],
    ):
        self.store, self.sender, self.papers, self.now = store, sender, papers, now
        self.server, self.moment = server, moment
        self.known = {paper.key: paper for paper in papers}
        self.connection: smtplib.SMTP | None = None
        self.report = Report()

    def all(self) -> Report:
        try:
            for subscriber in self.store.subscribers():
                self.one(subscriber)
        finally:
            if self.connection is not None:
                self.connection.close()
        return self.report

    def one(self, subscriber: Subscriber) -> None:
        if self.server is None:
            self.dry(subscriber)
            return
        if self.connection is None and self.wanted(subscriber):
            self.connection = self.server.connect()  # before anything is claimed: an unreachable server costs nothing
        claim = self.claim(subscriber)
        if claim is None:
            return
        self.moment("claimed")
        token = self.store.leave_token(subscriber.id, self.now)
        message = digest(self.sender, subscriber, claim.papers, token, claim.day, self.now)
        self.hand_in(subscriber, claim, message)

    def wanted(self, subscriber: Subscriber) -> bool:
        """Whether the server will be needed."""
        open_mail = self.store.rows("SELECT 1 FROM mails WHERE subscriber = ? AND state = 'sending'", subscriber.id)
        return bool(open_mail) or (subscriber.due(self.now) and bool(self.new_to(subscriber)))

    def new_to(self, subscriber: Subscriber) -> list[Paper]:
        had = {row[0] for row in self.store.rows("SELECT paper FROM sent WHERE subscriber = ?", subscriber.id)}
        topics = set(subscriber.topics)
        return [item for item in self.papers if item.key not in had and (not topics or topics & set(item.topics))]

    def dry(self, subscriber: Subscriber) -> None:
        new = self.new_to(subscriber)
        if not subscriber.due(self.now):
            self.report.not_due += 1
        elif not new:
            self.report.nothing_new += 1
        else:
            day = subscriber.day(self.now)
            self.report.mails.append(digest(self.sender, subscriber, new, "A" * 43, day, self.now))

    def claim(self, subscriber: Subscriber) -> _Claim | None:
        """Writes down what is about to be sent, in one transaction; None where nothing is."""
        with self.store.changing() as base:
            if (
                base.execute("SELECT 1 FROM subscribers WHERE id = ? AND state = 'on'", (subscriber.id,)).fetchone()
                is None
            ):
                return None  # has left since the run began
            broken = base.execute(
                "SELECT message_id, day, tries, papers FROM mails WHERE subscriber = ? AND state = 'sending'",
                (subscriber.id,),
            ).fetchone()
            if broken is not None:
                return self.again(base, subscriber, *broken)
            if not subscriber.due(self.now):
                self.report.not_due += 1
                return None
            new = self.new_to(subscriber)
            if not new:
                self.report.nothing_new += 1
                return None
            day = subscriber.day(self.now)
            name = message_id(subscriber, day, self.sender)
            keys = [item.key for item in new]
            base.execute(
                "INSERT OR REPLACE INTO mails VALUES (?, ?, ?, 'sending', 1, ?)",
                (name, subscriber.id, day, json.dumps(keys)),
            )
            self.reserve(base, subscriber, name, keys)
            return _Claim(name, day, new)

    def again(
        self, base: sqlite3.Connection, subscriber: Subscriber, name: str, day: str, tries: int, keys: str
    ) -> _Claim | None:
        """A mail that a crash has left: once more, or given up."""
        papers = [self.known[key] for key in json.loads(keys) if key in self.known]
        if tries >= TRIES or not papers:
            base.execute("UPDATE mails SET state = 'unsure' WHERE message_id = ?", (name,))
            base.execute("UPDATE subscribers SET last_day = ? WHERE id = ?", (day, subscriber.id))
            self.report.unsure += 1
            return None
        base.execute("UPDATE mails SET tries = tries + 1 WHERE message_id = ?", (name,))
        return _Claim(name, day, papers)

    def reserve(self, base: sqlite3.Connection, subscriber: Subscriber, name: str, keys: list[str]) -> None:
        base.executemany("INSERT INTO sent VALUES (?, ?, ?)", [(subscriber.id, key, name) for key in keys])

    def hand_in(self, subscriber: Subscriber, claim: _Claim, message: EmailMessage) -> None:
        """One mail, one receiver: so that a refusal is an exception and never a part of the answer."""
        assert self.server is not None
        if self.connection is None:
            try:
                self.connection = self.server.connect()
            except EverytokenError:
                self.free(claim, subscriber)
                raise
        try:
            self.connection.send_message(message, self.sender.address, [subscriber.address])
        except smtplib.SMTPSenderRefused as error:
            self.free(claim, subscriber)
            raise EverytokenError(
                f"The mail server refuses the sender: {_answer(error.smtp_code, error.smtp_error)}."
            ) from error
        except smtplib.SMTPRecipientsRefused as error:
            code = next(iter(error.recipients.values()))[0]
            self.refused(claim, subscriber, code)
        except smtplib.SMTPResponseException as error:
            self.refused(claim, subscriber, error.smtp_code)
        except (smtplib.SMTPException, OSError):
            # the line broke: the server may have taken the mail; it stays "sending" and the next run tries it once more
            self.report.later += 1
            self.connection.close()
            self.connection = None
            return
        else:
            self.moment("taken")
            with self.store.changing() as base:
                base.execute("UPDATE mails SET state = 'sent' WHERE message_id = ?", (claim.message,))
                base.execute(
                    "UPDATE subscribers SET last_day = ?, refusals = 0 WHERE id = ?", (claim.day, subscriber.id)
                )
            self.report.sent += 1
            self.moment("written")
            return
        if not _alive(self.connection):
            self.connection.close()
            self.connection = None

    def free(self, claim: _Claim, subscriber: Subscriber) -> None:
        """The server has not taken the mail, for sure: its papers come again."""
        with self.store.changing() as base:
            base.execute("UPDATE mails SET state = 'free' WHERE message_id = ?", (claim.message,))
            base.execute("DELETE FROM sent WHERE message_id = ? AND subscriber = ?", (claim.message, subscriber.id))

    def refused(self, claim: _Claim, subscriber: Subscriber, code: int) -> None:
        self.free(claim, subscriber)
        if not 500 <= code < 600:
            self.report.later += 1
            return
        self.report.refused += 1
        with self.store.changing() as base:
            base.execute("UPDATE subscribers SET refusals = refusals + 1 WHERE id = ?", (subscriber.id,))
            off = base.execute(
                "UPDATE subscribers SET state = 'off' WHERE id = ? AND refusals >= ?", (subscriber.id, REFUSALS)
            ).rowcount
        self.report.turned_off += off


def _alive(connection: smtplib.SMTP) -> bool:
    try:
        return connection.rset()[0] == 250
    except (smtplib.SMTPException, OSError):
        return False


def _answer(code: int, text: bytes | str) -> str:
    return f"{code} {text.decode(errors='replace') if isinstance(text, bytes) else text}"


def default_path() -> Path:
    """Where the server and the digest keep their data: not a cache, for it cannot be made again."""
    import platformdirs

    return platformdirs.user_data_path("everytoken") / "papers.sqlite"
