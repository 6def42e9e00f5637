"""Subscribers, votes and notes in one SQLite file.

A subscription goes from *wait* (a confirmation is asked for, 48 hours) to *on*, and to *off* after two permanent
refusals by the receiver's server. Unsubscribing deletes the row; a keyed hash of the address stays, so that others
cannot make this server write to it again and again. Tokens are 32 random bytes; only their SHA-256 is stored, and they
are compared by looking the hash up.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import re
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.headerregistry import Address
from pathlib import Path
from zoneinfo import ZoneInfo, available_timezones

from ...core.errors import BadInputError, UnknownNameError
from ..house import stations

FREQUENCIES = ("daily", "weekly", "monthly")
CONFIRM_WITHIN = timedelta(hours=48)
MAILS_A_DAY = 3
"""Confirmations to one address within 24 hours."""
MAILS_AN_HOUR = 20
"""Confirmations that one client may cause within an hour."""
QUIET_AFTER_LEAVING = timedelta(days=30)
"""An address that has left gets at most one confirmation within this time, whoever asks for it."""
REFUSALS = 2
"""Permanent refusals after which an address is off."""
TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS subscribers (
    id INTEGER PRIMARY KEY AUTOINCREMENT, address TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL CHECK (state IN ('wait', 'on', 'off')),
    topics TEXT NOT NULL, frequency TEXT NOT NULL, zone TEXT NOT NULL, asked REAL NOT NULL, confirmed REAL,
    last_day TEXT, refusals INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS tokens (
    hash TEXT PRIMARY KEY, subscriber INTEGER NOT NULL REFERENCES subscribers(id) ON DELETE CASCADE,
    kind TEXT NOT NULL CHECK (kind IN ('confirm', 'leave')), made REAL NOT NULL, wish TEXT NOT NULL DEFAULT '');
CREATE TABLE IF NOT EXISTS confirmations (address TEXT NOT NULL, client TEXT NOT NULL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS left_behind (address TEXT PRIMARY KEY, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS mails (
    message_id TEXT PRIMARY KEY, subscriber INTEGER NOT NULL REFERENCES subscribers(id) ON DELETE CASCADE,
    day TEXT NOT NULL, state TEXT NOT NULL CHECK (state IN ('sending', 'sent', 'free', 'unsure')),
    tries INTEGER NOT NULL, papers TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sent (
    subscriber INTEGER NOT NULL REFERENCES subscribers(id) ON DELETE CASCADE,
    paper TEXT NOT NULL, message_id TEXT NOT NULL, UNIQUE (subscriber, paper));
CREATE TABLE IF NOT EXISTS mine (profile TEXT NOT NULL, slug TEXT NOT NULL, vote INTEGER NOT NULL, note TEXT NOT NULL,
    PRIMARY KEY (profile, slug));
"""


@dataclass(frozen=True)
class Subscriber:
    """One who gets the digest.

    Attributes:
        id: never used again after the subscriber has left.
        address: with the domain in lower case and ASCII.
        topics: stations; empty means all.
        frequency: ``daily``, ``weekly`` or ``monthly``.
        zone: the IANA name of the time zone whose days count.
        last_day: the ISO date, in that zone, of the last digest; empty before the first.
    """

    id: int
    address: str
    topics: tuple[str, ...]
    frequency: str
    zone: str
    last_day: str = ""

    def day(self, now: datetime) -> str:
        """The ISO date at a moment, where the subscriber is."""
        return now.astimezone(ZoneInfo(self.zone)).date().isoformat()

    def due(self, now: datetime) -> bool:
        """Whether the next digest's day has come."""
        if not self.last_day:
            return True
        today, last = self.day(now), self.last_day
        if self.frequency == "monthly":
            return today[:7] > last[:7]
        passed = datetime.fromisoformat(today) - datetime.fromisoformat(last)
        return passed >= timedelta(days=7 if self.frequency == "weekly" else 1)


def clean_address(text: str) -> str:
    """One e-mail address; the domain in lower case and ASCII, the part before the @ as it is.

    Raises:
        BadInputError: it is not exactly one address, or longer than 254 characters.
    """
    wrong = BadInputError("That is not one e-mail address.", "Example: name@example.org")
    text = text.strip(" ")
    local, at, domain = text.rpartition("@")
    if not at or not local or len(text) > 254 or not text.isprintable() or re.search(r'[\s,;<>()\[\]"\\:]', text):
        raise wrong
    try:
        host = domain.encode("idna").decode().lower()
        made = Address(addr_spec=f"{local}@{host}").addr_spec
    except (UnicodeError, ValueError, IndexError) as error:
        raise wrong from error
    label = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
    if not local.isascii() or len(local) > 64 or len(made) > 254 or not re.fullmatch(rf"(?:{label}\.)+{label}", host):
        raise wrong
    return made


def check_wish(topics: Sequence[str], frequency: str, zone: str) -> tuple[tuple[str, ...], str, str]:
    """Topics in the order of the stations, the frequency and the zone.

    Raises:
        UnknownNameError: a topic that is no station, a frequency or a zone that does not exist.
    """
    known = stations()
    for topic in topics:
        if topic not in known:
            raise UnknownNameError("topic", topic, known)
    if frequency not in FREQUENCIES:
        raise UnknownNameError("frequency", frequency, FREQUENCIES)
    if zone != "UTC" and zone not in available_timezones():
        raise UnknownNameError("time zone", zone, available_timezones(), "the IANA data base")
    return tuple(name for name in known if name in topics), frequency, zone


def digest_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class Store:
    """The file, shared by threads.

    Args:
        path: the SQLite file; made with its folder where it is missing.

    Raises:
        BadInputError: the file is no data base.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.RLock()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._base = sqlite3.connect(path, timeout=20, isolation_level=None, check_same_thread=False)
            self._base.execute("PRAGMA foreign_keys = ON")
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA secure_delete = ON")  # who has left leaves no address in the file
            self._base.executescript(SCHEMA)
            self._base.execute("INSERT OR IGNORE INTO meta VALUES ('key', ?)", (secrets.token_hex(32),))
            self._key = bytes.fromhex(self._base.execute("SELECT value FROM meta WHERE name = 'key'").fetchone()[0])
        except sqlite3.DatabaseError as error:
            raise BadInputError(f"{path} cannot be used as a data base: {error}.", "Name another file.") from error
        with contextlib.suppress(OSError):
            path.chmod(0o600)

    def close(self) -> None:
        self._base.close()

    @contextlib.contextmanager
    def changing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it is kept, or nothing."""
        with self._lock:
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield self._base
            except BaseException:
                self._base.execute("ROLLBACK")
                raise
            self._base.execute("COMMIT")

    def rows(self, question: str, *values: object) -> list[tuple[object, ...]]:
        """All rows that a question finds."""
        with self._lock:
            return self._base.execute(question, values).fetchall()

    def keyed(self, text: str) -> str:
        """A hash of an address or a client that only this file's key can make."""
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()

    # -- subscriptions ------------------------------------------------------------------------------------------------
    def ask(
        self, address: str, topics: Sequence[str], frequency: str, zone: str, client: str, now: datetime
    ) -> str | None:
        """A wish to subscribe: the token of the confirmation to mail, or None where none may be mailed.

        Nothing of a subscription that is on changes before the new wish is confirmed.

        Args:
            address: as ``clean_address`` returns it; the others as ``check_wish`` does.
            client: where the wish came from, for the limit.
        """
        moment, hashed, source = now.timestamp(), self.keyed(address), self.keyed(client)
        wish = json.dumps([list(topics), frequency, zone])
        with self.changing() as base:
            self._forget(base, now)
            day = (now - timedelta(days=1)).timestamp()
            hour = (now - timedelta(hours=1)).timestamp()
            left = base.execute("SELECT at FROM left_behind WHERE address = ?", (hashed,)).fetchone()
            most, since = (1, (now - QUIET_AFTER_LEAVING).timestamp()) if left else (MAILS_A_DAY, day)
            to_it = base.execute(
                "SELECT count(*) FROM confirmations WHERE address = ? AND at > ?", (hashed, since)
            ).fetchone()[0]
            by_it = base.execute(
                "SELECT count(*) FROM confirmations WHERE client = ? AND at > ?", (source, hour)
            ).fetchone()[0]
            if to_it >= most or by_it >= MAILS_AN_HOUR:
                return None
            base.execute("INSERT INTO confirmations VALUES (?, ?, ?)", (hashed, source, moment))
            base.execute(
                "INSERT OR IGNORE INTO subscribers (address, state, topics, frequency, zone, asked) VALUES "
                "(?, 'wait', ?, ?, ?, ?)",
                (address, json.dumps(list(topics)), frequency, zone, moment),
            )
            base.execute("UPDATE subscribers SET asked = ? WHERE address = ?", (moment, address))
            (number,) = base.execute("SELECT id FROM subscribers WHERE address = ?", (address,)).fetchone()
            return self._token(base, number, "confirm", now, wish)

    def _token(self, base: sqlite3.Connection, subscriber: int, kind: str, now: datetime, wish: str = "") -> str:
        token = secrets.token_urlsafe(32)
        base.execute(
            "INSERT INTO tokens VALUES (?, ?, ?, ?, ?)", (digest_of(token), subscriber, kind, now.timestamp(), wish)
        )
        return token

    def leave_token(self, subscriber: int, now: datetime) -> str:
        """A new token that unsubscribes; earlier ones keep working."""
        with self.changing() as base:
            return self._token(base, subscriber, "leave", now)

    def _forget(self, base: sqlite3.Connection, now: datetime) -> None:
        """Deletes wishes that nobody confirmed in time, and the counts that no limit asks for any more."""
        old = (now - CONFIRM_WITHIN).timestamp()
        base.execute("DELETE FROM tokens WHERE kind = 'confirm' AND made < ?", (old,))
        base.execute("DELETE FROM subscribers WHERE state = 'wait' AND asked < ?", (old,))
        base.execute("DELETE FROM confirmations WHERE at < ?", ((now - QUIET_AFTER_LEAVING).timestamp(),))

    def confirm(self, token: str, now: datetime) -> bool:
        """Turns a subscription on; False where the token is unknown, used or too old."""
        if not TOKEN.fullmatch(token):
            return False
        with self.changing() as base:
            self._forget(base, now)
            found = base.execute(
                "SELECT subscriber, wish FROM tokens WHERE hash = ? AND kind = 'confirm'", (digest_of(token),)
            ).fetchone()
            if found is None:
                return False
            subscriber, wish = found
            topics, frequency, zone = json.loads(wish)
            base.execute("DELETE FROM tokens WHERE subscriber = ? AND kind = 'confirm'", (subscriber,))
            base.execute(
                "UPDATE subscribers SET state = 'on', confirmed = ?, refusals = 0, topics = ?, frequency = "
                "?, zone = ? WHERE id = ?",
                (now.timestamp(), json.dumps(topics), frequency, zone, subscriber),
            )
            (address,) = base.execute("SELECT address FROM subscribers WHERE id = ?", (subscriber,)).fetchone()
            base.execute("DELETE FROM left_behind WHERE address = ?", (self.keyed(address),))
            return True

    def leave(self, token: str, now: datetime) -> None:
        """Deletes the subscriber of a token; does nothing where there is none."""
        if not TOKEN.fullmatch(token):
            return
        with self.changing() as base:
            found = base.execute(
                "SELECT s.address FROM tokens t JOIN subscribers s ON s.id = t.subscriber WHERE t.hash = ? "
                "AND t.kind = 'leave'",
                (digest_of(token),),
            ).fetchone()
            if found:
                self._delete(base, found[0], now)

    def remove(self, address: str, now: datetime) -> bool:
        """Deletes an address on request; False where it is not there."""
        with self.changing() as base:
            return self._delete(base, address, now)

    def _delete(self, base: sqlite3.Connection, address: str, now: datetime) -> bool:
        gone = base.execute("DELETE FROM subscribers WHERE address = ?", (address,)).rowcount > 0
        if gone:
            base.execute("INSERT OR REPLACE INTO left_behind VALUES (?, ?)", (self.keyed(address), now.timestamp()))
        return gone

    def subscribers(self) -> list[Subscriber]:
        """All that are on, in the order of their ids."""
        found = self.rows(
            "SELECT id, address, topics, frequency, zone, last_day FROM subscribers WHERE state = 'on' ORDER BY id"
        )
        return [
            Subscriber(number, address, tuple(json.loads(topics)), frequency, zone, last or "")  # type: ignore[arg-type]
            for number, address, topics, frequency, zone, last in found
        ]

    def export(self, address: str) -> dict[str, object] | None:
        """Everything that is kept of an address; None where nothing is."""
        found = self.rows(
            "SELECT id, address, state, topics, frequency, zone, asked, confirmed, last_day FROM "
            "subscribers WHERE address = ?",
            address,
        )
        if not found:
            return None
        number, at, state, topics, frequency, zone, asked, confirmed, last = found[0]

        def told(moment: object) -> str | None:
            return datetime.fromtimestamp(float(moment), UTC).isoformat() if moment else None  # type: ignore[arg-type]

        return {
            "address": at,
            "state": state,
            "topics": json.loads(str(topics)),
            "frequency": frequency,
            "zone": zone,
            "asked": told(asked),
            "confirmed": told(confirmed),
            "last_digest": last,
            "papers": [
                row[0] for row in self.rows("SELECT paper FROM sent WHERE subscriber = ? ORDER BY paper", number)
            ],
        }

    # -- votes and notes ----------------------------------------------------------------------------------------------
    def mine(self, profile: str, slug: str, vote: bool | None = None, note: str | None = None) -> dict[str, object]:
        """A browser's own vote and note of a paper, changed where given."""
        with self.changing() as base:
            found = base.execute(
                "SELECT vote, note FROM mine WHERE profile = ? AND slug = ?", (profile, slug)
            ).fetchone()
            was_vote, was_note = found or (0, "")
            now_vote = int(was_vote if vote is None else vote)
            now_note = was_note if note is None else note
            if (now_vote, now_note) != (was_vote, was_note):
                base.execute("INSERT OR REPLACE INTO mine VALUES (?, ?, ?, ?)", (profile, slug, now_vote, now_note))
            return {"vote": bool(now_vote), "note": now_note}
