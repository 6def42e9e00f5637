"""What provider and auditor agree on: an embedder by name, messages with a version, and their limits."""

from __future__ import annotations

import hashlib
import hmac
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..core.errors import BadInputError, EverytokenError
from .merkle import HASH, leaf_hash

VERSION = 1
SALT, MOST_TOKENS, MOST_OPENED, WIDEST = 16, 1_000_000, 4_096, 4_096
"""Limits: bytes of a salt, tokens of a job, openings of an answer, dimensions of an embedder."""
JOB = re.compile(r"[A-Za-z0-9_.:-]{1,100}")


class AuditError(EverytokenError):
    """A message or proof that does not hold; the audit counts as failed."""


class Embedder(Protocol):
    """A third party's embedder, which both sides name."""

    @property
    def name(self) -> str:
        """What statements call it."""

    @property
    def dimensions(self) -> int:
        """Of its vectors."""

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """``[n, dimensions]`` float32 unit vectors."""


@dataclass
class HashedWords:
    """An embedder without a model: words hashed into dimensions with signs. It sees shared words and no meaning."""

    dimensions: int = 256

    @property
    def name(self) -> str:
        return f"hashed-words-{self.dimensions}"

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        for row, text in enumerate(texts):
            vectors[row, 0] = 1e-3
            for word in re.findall(r"\w+|[^\w\s]", text.lower()):
                code = hashlib.sha256(word.encode("utf-8", "surrogatepass")).digest()
                vectors[row, int.from_bytes(code[:4], "big") % self.dimensions] += 1 if code[4] & 1 else -1
        lengths: np.ndarray = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.maximum(lengths, 1e-12)


@dataclass
class MiniLM:
    """The packaged all-MiniLM-L6-v2 (extra ``search``)."""

    name: str = "all-MiniLM-L6-v2"
    dimensions: int = 384

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        from ..core.embedding import embed

        return embed(texts, "Auditing with MiniLM")


def packed(*parts: bytes) -> bytes:
    """Parts with their lengths in front, so that no two lists of parts look alike."""
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


def digest_of(text: str) -> bytes:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def is_unit(vector: np.ndarray, dimensions: int) -> bool:
    """Whether a vector is finite, of the right length and of a norm within 1e-3 of 1."""
    return (
        vector.shape == (dimensions,)
        and bool(np.isfinite(vector).all())
        and abs(float(np.linalg.norm(vector.astype(np.float64))) - 1) <= 1e-3
    )


@dataclass(frozen=True)
class Leaf:
    """What a leaf commits to.

    Attributes:
        job: the job's id.
        index, block: the token's place and its block's.
        salt: random bytes, so that nobody finds the token by trying them all.
        block_vector, token_vector: float16 unit vectors as bytes, little-endian.
    """

    job: str
    index: int
    block: int
    salt: bytes
    block_vector: bytes
    token_vector: bytes

    def data(self) -> bytes:
        """The bytes that are hashed."""
        place = struct.pack(">QQ", self.index, self.block)
        vectors = packed(self.block_vector, self.token_vector)
        return bytes([VERSION]) + packed(self.job.encode()) + place + packed(self.salt) + vectors

    def hash(self) -> bytes:
        return leaf_hash(self.data())


@dataclass(frozen=True)
class Statement:
    """What a provider signs before it sees a challenge.

    Attributes:
        job: the job's id.
        count: how many hidden tokens are billed.
        block: tokens of a block.
        embedder: its name.
        prompt, answer: SHA-256 of the texts.
        root: of the tree of leaves.

    Raises:
        AuditError: values out of range.
    """

    job: str
    count: int
    block: int
    embedder: str
    prompt: bytes
    answer: bytes
    root: bytes

    def __post_init__(self) -> None:
        whole = all(isinstance(item, int) and not isinstance(item, bool) for item in (self.count, self.block))
        if not isinstance(self.job, str) or not JOB.fullmatch(self.job):
            raise AuditError("A job's id has 1 to 100 of the characters A-Z a-z 0-9 _ . : -.")
        if not whole or not 0 <= self.count <= MOST_TOKENS or not 1 <= self.block <= MOST_TOKENS:
            raise AuditError(f"A statement counts 0 to {MOST_TOKENS:,} tokens in blocks of at least one.")
        if not isinstance(self.embedder, str) or not 0 < len(self.embedder) <= 100:
            raise AuditError("A statement names its embedder.")
        if any(not isinstance(item, bytes) or len(item) != HASH for item in (self.prompt, self.answer, self.root)):
            raise AuditError(f"Digests have {HASH} bytes.")

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return -(-self.count // self.block)

    def digest(self) -> bytes:
        """The commitment: SHA-256 with a tag of its own over all fields with their lengths."""
        numbers = struct.pack(">BQQ", VERSION, self.count, self.block)
        texts = packed(self.job.encode(), self.embedder.encode("utf-8", "surrogatepass"))
        return hashlib.sha256(b"\x02" + numbers + texts + packed(self.prompt, self.answer, self.root)).digest()

    def message(self) -> dict[str, Any]:
        """As JSON."""
        names = ("prompt", "answer", "root")
        numbers = {"version": VERSION, "job": self.job, "count": self.count, "block": self.block}
        return {**numbers, "embedder": self.embedder, **{name: getattr(self, name).hex() for name in names}}

    @classmethod
    def read(cls, message: Any) -> Statement:
        """From JSON.

        Raises:
            AuditError: another version, a missing field or a value of the wrong kind.
        """
        checked(message, {"job", "count", "block", "embedder", "prompt", "answer", "root"})
        digests = {name: from_hex(message[name], HASH) for name in ("prompt", "answer", "root")}
        return cls(message["job"], message["count"], message["block"], message["embedder"], **digests)


def checked(message: Any, names: set[str]) -> None:
    """Refuses messages of another version, with missing fields or with fields that nobody knows."""
    if not isinstance(message, dict) or message.get("version") != VERSION:
        raise AuditError(f"A message must be a JSON object of version {VERSION}.")
    if set(message) != names | {"version"}:
        raise AuditError(f"A message must have the fields {', '.join(sorted(names))} and no other.")


def from_hex(text: Any, size: int | None = None) -> bytes:
    """Bytes from hexadecimal digits.

    Raises:
        AuditError: something else, or another number of bytes than ``size``.
    """
    if not isinstance(text, str) or not re.fullmatch(r"(?:[0-9a-f]{2})*", text):
        raise AuditError("Bytes are written as pairs of the digits 0-9 a-f.")
    if size is not None and len(text) != 2 * size:
        raise AuditError(f"{size} bytes were expected; got {len(text) // 2}.")
    return bytes.fromhex(text)


def challenge(commitment: bytes, nonce: bytes, count: int, wanted: int) -> list[int]:
    """Indices of the leaves to open, without replacement; the first k of more are those of k.

    They follow from SHA-256(commitment || nonce || counter) by rejection sampling, so that neither side chooses them:
    the provider fixes the commitment first, the auditor the nonce after.

    Raises:
        BadInputError: more than there are leaves.
    """
    if not 0 <= wanted <= count:
        raise BadInputError(f"{wanted} of {count} leaves cannot be opened.")
    found: dict[int, None] = {}
    limit, counter = 2**64 - 2**64 % max(count, 1), 0
    while len(found) < wanted:
        block = hashlib.sha256(commitment + packed(nonce) + struct.pack(">Q", counter)).digest()
        counter += 1
        for start in range(0, HASH, 8):
            value = int.from_bytes(block[start : start + 8], "big")
            if value < limit and len(found) < wanted:
                found.setdefault(value % count)
    return list(found)


def same(a: bytes, b: bytes) -> bool:
    """Whether two digests are equal, in constant time."""
    return hmac.compare_digest(a, b)


@dataclass(frozen=True)
class Opening:
    """A leaf that the provider shows, as bytes of its own sizes."""

    leaf: Leaf

    def message(self) -> dict[str, Any]:
        item = self.leaf
        return {
            "index": item.index,
            "block": item.block,
            "salt": item.salt.hex(),
            "block_vector": item.block_vector.hex(),
            "token_vector": item.token_vector.hex(),
        }

    @classmethod
    def read(cls, job: str, message: Any, dimensions: int) -> Opening:
        """From JSON; see ``Statement.read``."""
        if not isinstance(message, dict) or set(message) != {"index", "block", "salt", "block_vector", "token_vector"}:
            raise AuditError("An opening has an index, a block, a salt and two vectors.")
        numbers = (message["index"], message["block"])
        if not all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**40 for item in numbers):
            raise AuditError("An opening's places are whole numbers.")
        vectors = [from_hex(message[name], 2 * dimensions) for name in ("block_vector", "token_vector")]
        return cls(Leaf(job, *numbers, from_hex(message["salt"], SALT), *vectors))

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """Block and token vector ``[dimensions]`` as float32."""
        pair = (self.leaf.block_vector, self.leaf.token_vector)
        block, token = (np.frombuffer(item, "<f2").astype(np.float32) for item in pair)
        return block, token


@dataclass
class Kept:
    """What an auditor remembers of jobs, so that a provider has one try: job -> commitment."""

    commitments: dict[str, bytes] = field(default_factory=dict)

    def note(self, job: str, commitment: bytes) -> None:
        """Remembers a job's commitment.

        Raises:
            AuditError: the job had another one.
        """
        before = self.commitments.setdefault(job, commitment)
        if not same(before, commitment):
            raise AuditError(f"The job {job} was committed to before, and otherwise.")
