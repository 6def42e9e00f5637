"""What the methods of this station share: a tool as a server describes it, its texts, and the protocol of indexes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..core.errors import BadInputError, EverytokenError

if TYPE_CHECKING:
    import numpy as np

PARTS = ("name", "description", "parameters", "questions")
"""The parts of a tool's document, in the order in which a joined text names them."""


class Key(NamedTuple):
    """A tool's name among many servers: two columns, never one joined text (``a__b`` + ``c`` is ``a`` + ``b__c``)."""

    server: str
    name: str


class ServerError(EverytokenError):
    """A tool server that did not answer, or answered with what cannot be used."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, in which equal values read the same.

    Raises:
        BadInputError: a value that JSON cannot hold, such as NaN.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadInputError(f"This cannot be written as JSON: {error}.") from error


@dataclass(frozen=True)
class ToolSpec:
    """A tool as its server sent it.

    Attributes:
        server: the server's id.
        name, title, description: as sent.
        input_schema, output_schema: JSON Schemas.
        annotations: hints of the server.
    """

    server: str
    name: str
    description: str = ""
    input_schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"})
    title: str | None = None
    output_schema: Mapping[str, Any] | None = None
    annotations: Mapping[str, Any] | None = None

    @property
    def key(self) -> Key:
        return Key(self.server, self.name)

    def document(self) -> dict[str, Any]:
        """Everything that a model may see, under the protocol's own names; what was not sent is left out."""
        found = {
            "name": self.name,
            "title": self.title,
            "description": self.description or None,
            "inputSchema": self.input_schema,
            "outputSchema": self.output_schema,
            "annotations": self.annotations or None,
        }
        return {name: value for name, value in found.items() if value is not None}

    def canonical(self) -> str:
        """The document as canonical JSON."""
        return canonical_json(self.document())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ``canonical()`` in UTF-8, in hexadecimal.

        What was sent is hashed, not what is shown: one invisible character more is another tool.
        """
        return hashlib.sha256(self.canonical().encode("utf-8", "surrogatepass")).hexdigest()

    @classmethod
    def from_document(cls, server: str, document: Mapping[str, Any]) -> ToolSpec:
        """The inverse of ``document``."""
        return cls(
            server,
            document["name"],
            document.get("description") or "",
            document.get("inputSchema") or {"type": "object"},
            document.get("title"),
            document.get("outputSchema"),
            document.get("annotations"),
        )


def words_of(name: str) -> str:
    """A tool's name as words: ``getStock_price.v2`` is "get stock price v2"."""
    parts = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    return re.sub(r"[^A-Za-z0-9]+", " ", parts).strip().lower()


def parameters_text(schema: Mapping[str, Any]) -> str:
    """A parameter schema as text: every property with its type and description."""
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        return ""
    pieces = []
    for name, value in properties.items():
        value = value if isinstance(value, Mapping) else {}
        kind, told = value.get("type"), value.get("description")
        text = words_of(str(name)) + (f" ({kind})" if isinstance(kind, str) else "")
        pieces.append(f"{text}: {told}" if isinstance(told, str) and told else text)
    return "; ".join(pieces)


QUESTIONS = (
    "Can you {does}?",
    "How do I {does}?",
    "I want to {does}.",
    "Which tool should I use to {does}?",
    "Please {does} for me.",
    "Is there a way to {does}?",
    "Help me {does}.",
    "I need something that can {does}.",
    "What lets me {does}?",
    "Could you {does}, given {takes}?",
)
"""Templates of synthetic questions. They are ours, so that no server can write the questions that find it."""


def questions_of(name: str, description: str, parameters: str, count: int) -> list[str]:
    """Synthetic questions of a tool, by templates.

    Args:
        count: how many, 0 to 10.

    Raises:
        BadInputError: another count.
    """
    if not 0 <= count <= len(QUESTIONS):
        raise BadInputError(f"A tool has 0 to {len(QUESTIONS)} synthetic questions; asked for {count}.")
    first = re.split(r"(?<=[.!?])\s", description.strip(), maxsplit=1)[0].strip(" .!?") or words_of(name)
    does = first[:1].lower() + first[1:]
    takes = re.sub(r" \([^)]*\)|: [^;]*", "", parameters).replace("; ", ", ") or "nothing else"
    return [template.format(does=does, takes=takes) for template in QUESTIONS[:count]]


class Hit(NamedTuple):
    """A found tool: its spec, the score (greater is nearer) and whether its server is known to be down."""

    spec: ToolSpec
    score: float
    stale: bool = False


class Record(NamedTuple):
    """A row of an index: key, what it was made from, unit vector ``[dimensions]`` float32."""

    key: Key
    mark: str
    vector: np.ndarray


class ToolStore(Protocol):
    """An index of tools by vectors, in memory or in a service; the truth about tools stays in SQLite."""

    def upsert(self, records: Sequence[Record]) -> None:
        """Adds records, or replaces those of the same key."""

    def delete(self, keys: Iterable[Key]) -> None:
        """Takes tools out; unknown keys are no error."""

    def search(self, vector: np.ndarray, k: int, server: str | None = None) -> list[tuple[Key, float]]:
        """The ``k`` nearest by inner product, best first; of one server where it is named."""

    def snapshot(self) -> dict[Key, str]:
        """What it holds: key -> mark."""


def bring_up_to_date(index: ToolStore, records: Sequence[Record]) -> tuple[int, int]:
    """Makes an index hold exactly these records, touching only what differs.

    Returns:
        How many were written and deleted.
    """
    before = index.snapshot()
    wanted = {record.key: record for record in records}
    gone = [key for key in before if key not in wanted]
    changed = [record for record in wanted.values() if before.get(record.key) != record.mark]
    if gone:
        index.delete(gone)
    if changed:
        index.upsert(changed)
    return len(changed), len(gone)
