"""The truth about tools: one SQLite file with tools, servers and the vectors of texts, searched by words with FTS5.

Every sync of a server is one transaction (``BEGIN IMMEDIATE``), and what has changed is found inside it: two syncs at
once, or a process that is killed, leave the old state or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import BadInputError
from .base import Key, ToolSpec, parameters_text, words_of
from .safety import clean

if TYPE_CHECKING:
    import numpy as np

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta(name TEXT PRIMARY KEY, value INTEGER NOT NULL);
INSERT OR IGNORE INTO meta VALUES ('format', 1), ('generation', 0);
CREATE TABLE IF NOT EXISTS servers(
  id TEXT PRIMARY KEY, failures INTEGER NOT NULL DEFAULT 0, next_try REAL NOT NULL DEFAULT 0,
  fresh_until REAL NOT NULL DEFAULT 0, last_ok REAL, error TEXT);
CREATE TABLE IF NOT EXISTS tools(
  id INTEGER PRIMARY KEY, server TEXT NOT NULL, name TEXT NOT NULL, fingerprint TEXT NOT NULL, spec TEXT NOT NULL,
  approved TEXT, approved_spec TEXT, stale_since REAL, UNIQUE(server, name));
CREATE TABLE IF NOT EXISTS vectors(
  embedder TEXT NOT NULL, digest BLOB NOT NULL, vector BLOB NOT NULL, PRIMARY KEY(embedder, digest)) WITHOUT ROWID;
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5(document, tokenize='porter unicode61');
"""
FORMAT = 1
BACK_OFF, LONGEST = 30.0, 3600.0
"""Seconds before a server that failed is asked again: doubled with every failure, up to an hour."""


@dataclass
class Changes:
    """What one sync of a server did to its tools, by name.

    ``stale`` tools are kept though the server did not list them; ``quarantined`` ones were approved and have changed.
    """

    created: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)
    unchanged: int = 0

    @property
    def writes(self) -> int:
        """Rows of tools that were written or deleted."""
        return sum(map(len, (self.created, self.updated, self.deleted, self.stale, self.quarantined)))


@dataclass(frozen=True)
class StoredTool:
    """A row: the tool, and whether it is stale or waits to be approved again."""

    id: int
    spec: ToolSpec
    stale: bool
    quarantined: bool


def digest(text: str) -> bytes:
    """The key of a text's vector."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class SQLiteStore:
    """Tools in one file.

    Args:
        path: the file, or ``":memory:"``.
        clock: seconds since the epoch; for tests.

    Raises:
        BadInputError: the file is no store of this version.
    """

    def __init__(self, path: str | Path = ":memory:", clock: Callable[[], float] = time.time):
        self.path, self.clock, self._lock = str(path), clock, threading.RLock()
        if self.path != ":memory:":
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        self.database = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
        try:
            self.database.execute("PRAGMA journal_mode=WAL")
            self.database.executescript(SCHEMA)
            found = self.database.execute("SELECT value FROM meta WHERE name='format'").fetchone()[0]
        except sqlite3.DatabaseError as error:
            self.database.close()
            raise BadInputError(f"{path} is no store of tools ({error}).") from error
        if found != FORMAT:
            self.database.close()
            raise BadInputError(f"{path} is a store of format {found}; this version reads {FORMAT}.")

    def close(self) -> None:
        self.database.close()

    def __enter__(self) -> SQLiteStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and alone among writers."""
        with self._lock:
            self.database.execute("BEGIN IMMEDIATE")
            try:
                yield self.database
            except BaseException:
                self.database.execute("ROLLBACK")
                raise
            self.database.execute("COMMIT")

    @property
    def generation(self) -> int:
        """A number that grows with every change of the tools."""
        with self._lock:
            value: int = self.database.execute("SELECT value FROM meta WHERE name='generation'").fetchone()[0]
        return value

    # -- servers --------------------------------------------------------------------------------------------------
    def failures(self) -> dict[str, int]:
        """Server -> how often in a row it has failed."""
        with self._lock:
            return dict(self.database.execute("SELECT id, failures FROM servers").fetchall())

    def waiting(self, server: str) -> str | None:
        """Why a server is not to be asked now (its list is fresh, or it failed lately); None where it is."""
        with self._lock:
            row = self.database.execute("SELECT next_try, fresh_until FROM servers WHERE id=?", (server,)).fetchone()
        now = self.clock()
        if row is None or now >= max(row):
            return None
        return "backing off" if row[0] > now else "fresh"

    def apply(
        self,
        server: str,
        specs: Sequence[ToolSpec],
        fresh: float = 0.0,
        grace: float = 86_400.0,
        max_loss: float = 0.5,
    ) -> Changes:
        """Writes what a server lists, in one transaction.

        Args:
            specs: all its tools, checked.
            fresh: for how many seconds the list need not be asked again; a day at most.
            grace: for how many seconds a tool is kept that a suspicious list lacks.
            max_loss: a list that lacks more than this share of the tools is suspicious: what it lacks turns stale and
                is deleted only after the grace. 1 believes every list.

        Raises:
            BadInputError: tools of another server, or a name twice.
        """
        wanted = {spec.name: spec for spec in specs}
        if len(wanted) != len(specs) or any(spec.server != server for spec in specs):
            raise BadInputError(f"These are not the tools of {server}, each once.")
        now, changes = self.clock(), Changes()
        with self.transaction() as database:
            rows = database.execute(
                "SELECT name, id, fingerprint, approved, stale_since FROM tools WHERE server=?", (server,)
            ).fetchall()
            known = {row[0]: row[1:] for row in rows}
            lost = [name for name in known if name not in wanted]
            suspicious = len(lost) > max_loss * len(known)
            for name in lost:
                row, since = known[name][0], known[name][3]
                if suspicious and (since is None or now - since < grace):
                    if since is None:
                        database.execute("UPDATE tools SET stale_since=? WHERE id=?", (now, row))
                        changes.stale.append(name)
                    continue
                self._delete(row)
                changes.deleted.append(name)
            for name, spec in wanted.items():
                if name not in known:
                    self._insert(spec)
                    changes.created.append(name)
                    continue
                row, before, approved, since = known[name]
                mark = spec.fingerprint
                if mark != before:
                    self._update(row, spec)
                    held = approved is not None and approved != mark
                    (changes.quarantined if held else changes.updated).append(name)
                elif since is not None:
                    database.execute("UPDATE tools SET stale_since=NULL WHERE id=?", (row,))
                    changes.updated.append(name)
                else:
                    changes.unchanged += 1
            if changes.writes:
                self._changed()
            database.execute(
                "INSERT INTO servers(id, fresh_until, last_ok) VALUES (?, ?, ?) ON CONFLICT(id) DO UPDATE SET "
                "failures=0, next_try=0, error=NULL, fresh_until=excluded.fresh_until, last_ok=excluded.last_ok",
                (server, now + min(fresh, 86_400.0), now),
            )
        return changes

    def mark_down(self, server: str, error: str, grace: float = 86_400.0) -> Changes:
        """Notes that a server did not answer: its tools turn stale, and are deleted after the grace."""
        now, changes = self.clock(), Changes()
        with self.transaction() as database:
            rows = database.execute("SELECT id, name, stale_since FROM tools WHERE server=?", (server,)).fetchall()
            for row, name, since in rows:
                if since is None:
                    database.execute("UPDATE tools SET stale_since=? WHERE id=?", (now, row))
                    changes.stale.append(name)
                elif now - since >= grace:
                    self._delete(row)
                    changes.deleted.append(name)
            if changes.writes:
                self._changed()
            count = database.execute("SELECT failures FROM servers WHERE id=?", (server,)).fetchone()
            failures = (count[0] if count else 0) + 1
            wait = min(BACK_OFF * 2 ** min(failures - 1, 20), LONGEST)
            database.execute(
                "INSERT INTO servers(id, failures, next_try, error) VALUES (?, ?, ?, ?) ON CONFLICT(id) DO UPDATE SET "
                "failures=excluded.failures, next_try=excluded.next_try, error=excluded.error, fresh_until=0",
                (server, failures, now + wait, error),
            )
        return changes

    def forget_others(self, servers: Iterable[str]) -> dict[str, Changes]:
        """Deletes the tools of all servers but these."""
        kept = set(servers)
        gone: dict[str, Changes] = {}
        with self.transaction() as database:
            rows = database.execute("SELECT id, server, name FROM tools").fetchall()
            for row, server, name in rows:
                if server not in kept:
                    self._delete(row)
                    gone.setdefault(server, Changes()).deleted.append(name)
            for (server,) in database.execute("SELECT id FROM servers").fetchall():
                if server not in kept:
                    database.execute("DELETE FROM servers WHERE id=?", (server,))
            if gone:
                self._changed()
        return gone

    # -- approval -------------------------------------------------------------------------------------------------
    def approve(self, key: Key) -> None:
        """Trusts a tool as it is now: from here on, a changed one is held back until it is approved again.

        Raises:
            BadInputError: there is no such tool.
        """
        with self.transaction() as database:
            done = database.execute(
                "UPDATE tools SET approved=fingerprint, approved_spec=spec WHERE server=? AND name=?", tuple(key)
            )
            if not done.rowcount:
                raise BadInputError(f"{key.server} has no tool {key.name}.")
            self._changed()

    def difference(self, key: Key) -> dict[str, tuple[Any, Any]]:
        """What has changed of an approved tool: field -> (as approved, as it is)."""
        with self._lock:
            row = self.database.execute(
                "SELECT approved_spec, spec FROM tools WHERE server=? AND name=?", tuple(key)
            ).fetchone()
        if row is None or row[0] is None:
            return {}
        before, after = json.loads(row[0]), json.loads(row[1])
        names = sorted(before.keys() | after.keys())
        return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}

    # -- reading --------------------------------------------------------------------------------------------------
    def tools(self, quarantined: bool = False) -> list[StoredTool]:
        """All tools in the order of their ids; those that wait for approval only if asked."""
        with self._lock:
            rows = self.database.execute(
                "SELECT id, server, spec, stale_since, approved IS NOT NULL AND approved<>fingerprint FROM tools "
                "ORDER BY id"
            ).fetchall()
        found = [
            StoredTool(row, ToolSpec.from_document(server, json.loads(spec)), since is not None, bool(held))
            for row, server, spec, since, held in rows
        ]
        return [item for item in found if quarantined or not item.quarantined]

    def matching(self, query: str, k: int, server: str | None = None) -> list[tuple[int, float]]:
        """Ids of the tools that BM25 finds, best first, with their scores (greater is better)."""
        terms = list(dict.fromkeys(re.findall(r"\w+", query.lower())))[:64]
        if not terms:
            return []
        asked = " OR ".join(f'"{term}"' for term in terms)
        where = "" if server is None else " AND tools.server=?"
        with self._lock:
            rows = self.database.execute(
                "SELECT words.rowid, bm25(words) AS score FROM words JOIN tools ON tools.id=words.rowid "
                f"WHERE words MATCH ? AND (approved IS NULL OR approved=fingerprint){where} "
                "ORDER BY score, words.rowid LIMIT ?",
                (asked, *([] if server is None else [server]), k),
            ).fetchall()
        return [(row, -score) for row, score in rows]

    # -- vectors --------------------------------------------------------------------------------------------------
    def vectors(self, embedder: str, texts: Iterable[str]) -> dict[str, np.ndarray]:
        """The vectors that are kept of these texts: text -> ``[dimensions]`` float32."""
        import numpy as np

        found = {}
        with self._lock:
            for text in dict.fromkeys(texts):
                row = self.database.execute(
                    "SELECT vector FROM vectors WHERE embedder=? AND digest=?", (embedder, digest(text))
                ).fetchone()
                if row is not None:
                    found[text] = np.frombuffer(row[0], np.float32)
        return found

    def keep_vectors(self, embedder: str, vectors: Mapping[str, np.ndarray]) -> None:
        """Keeps vectors of texts."""
        rows = [(embedder, digest(text), vector.astype("<f4").tobytes()) for text, vector in vectors.items()]
        with self.transaction() as database:
            database.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)

    # -- rows -----------------------------------------------------------------------------------------------------
    def _insert(self, spec: ToolSpec) -> None:
        row = self.database.execute(
            "INSERT INTO tools(server, name, fingerprint, spec) VALUES (?, ?, ?, ?)",
            (spec.server, spec.name, spec.fingerprint, _utf8(spec.canonical())),
        ).lastrowid
        self.database.execute("INSERT INTO words(rowid, document) VALUES (?, ?)", (row, _document(spec)))

    def _update(self, row: int, spec: ToolSpec) -> None:
        self.database.execute(
            "UPDATE tools SET fingerprint=?, spec=?, stale_since=NULL WHERE id=?",
            (spec.fingerprint, _utf8(spec.canonical()), row),
        )
        self.database.execute("UPDATE words SET document=? WHERE rowid=?", (_document(spec), row))

    def _delete(self, row: int) -> None:
        self.database.execute("DELETE FROM tools WHERE id=?", (row,))
        self.database.execute("DELETE FROM words WHERE rowid=?", (row,))

    def _changed(self) -> None:
        self.database.execute("UPDATE meta SET value=value+1 WHERE name='generation'")


def _utf8(text: str) -> str:
    """JSON that SQLite can hold: halves of surrogate pairs as escapes, which read back as they were."""
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _document(spec: ToolSpec) -> str:
    """What is searched by words."""
    return clean(f"{words_of(spec.name)}. {clean(spec.description)}. {parameters_text(spec.input_schema)}", 40_000)
