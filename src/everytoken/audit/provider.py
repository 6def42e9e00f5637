"""The provider's side: it commits to every hidden token, signs, and opens what the challenge says, once."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..core.errors import BadInputError, require
from .base import MOST_TOKENS, SALT, VERSION, AuditError, Embedder, Leaf, Opening, Statement, challenge, digest_of
from .merkle import root

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

NONCE = 32


class Source(Protocol):
    """A provider as an auditor sees it, in this process or behind HTTP. Every answer is a JSON message."""

    def statement(self, job: str) -> Any:
        """The signed statement and the answer."""

    def leaves(self, job: str) -> Any:
        """All leaf hashes."""

    def reveal(self, job: str, nonce: bytes, wanted: int) -> Any:
        """The first ``wanted`` leaves of the nonce's challenge."""


@dataclass
class _Job:
    statement: Statement
    answer: str
    leaves: list[Leaf]
    hashes: list[bytes]
    signature: bytes
    nonce: bytes | None = None


class Provider:
    """Commits to jobs and answers audits.

    Args:
        embedder: the third party's embedder.
        key: an Ed25519 private key of ``cryptography``; None makes one.
        block: tokens of a block.
        exposure: the largest share of a job's leaves that it opens.

    Raises:
        BadInputError: a block below 1, or an exposure outside (0, 1].
        MissingExtraError: the extra ``agents`` is not installed.
    """

    def __init__(
        self, embedder: Embedder, key: Ed25519PrivateKey | None = None, block: int = 256, exposure: float = 0.4
    ):
        require("cryptography", "agents", "Signing commitments")
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        if block < 1 or not 0 < exposure <= 1:
            raise BadInputError(
                f"A block has one token at least, and an exposure is in (0, 1]; got {block}, {exposure}."
            )
        self.embedder, self.block, self.exposure = embedder, block, exposure
        self.key = key if key is not None else Ed25519PrivateKey.generate()
        self._jobs: dict[str, _Job] = {}
        self._lock = threading.Lock()

    @property
    def public_key(self) -> bytes:
        """32 bytes, which the auditor has to know beforehand."""
        return self.key.public_key().public_bytes_raw()

    def commit(self, job: str, prompt: str, answer: str, tokens: Sequence[str]) -> Statement:
        """Commits to a job's hidden tokens.

        Args:
            tokens: their texts, in order; a block's text is their concatenation.

        Raises:
            BadInputError: the job was committed to before (there is no second try), or too many tokens.
            AuditError: an id that is none.
        """
        if len(tokens) > MOST_TOKENS:
            raise BadInputError(f"A job has at most {MOST_TOKENS:,} tokens; got {len(tokens):,}.")
        starts = range(0, len(tokens), self.block)
        blocks = ["".join(tokens[start : start + self.block]) for start in starts]
        distinct = list(dict.fromkeys([*blocks, *tokens]))
        vectors = dict(zip(distinct, as_bytes(self.embedder(distinct)), strict=True)) if distinct else {}
        leaves = [
            Leaf(
                job,
                place,
                place // self.block,
                secrets.token_bytes(SALT),
                vectors[blocks[place // self.block]],
                vectors[token],
            )
            for place, token in enumerate(tokens)
        ]
        return self.admit(job, prompt, answer, leaves)

    def admit(self, job: str, prompt: str, answer: str, leaves: Sequence[Leaf]) -> Statement:
        """As ``commit``, for leaves that are made already; a cheating provider makes them as it likes."""
        hashes = [leaf.hash() for leaf in leaves]
        digests = (digest_of(prompt), digest_of(answer))
        statement = Statement(job, len(leaves), self.block, self.embedder.name, *digests, root(hashes))
        with self._lock:
            if job in self._jobs:
                raise BadInputError(f"The job {job} was committed to before.", "A job has one commitment.")
            self._jobs[job] = _Job(statement, answer, list(leaves), hashes, self.key.sign(statement.digest()))
        return statement

    def _job(self, job: str) -> _Job:
        if job not in self._jobs:
            raise AuditError("There is no such job.")
        return self._jobs[job]

    def statement(self, job: str) -> dict[str, Any]:
        found = self._job(job)
        signed = {"statement": found.statement.message(), "signature": found.signature.hex()}
        return {"version": VERSION, **signed, "answer": found.answer}

    def leaves(self, job: str) -> dict[str, Any]:
        return {"version": VERSION, "job": job, "hashes": [item.hex() for item in self._job(job).hashes]}

    def reveal(self, job: str, nonce: bytes, wanted: int) -> dict[str, Any]:
        """The first ``wanted`` leaves of the challenge, which the provider works out itself.

        Raises:
            AuditError: another nonce than that of the job's first challenge (it would open other leaves), a nonce of
                another length, or more leaves than the exposure allows.
        """
        found = self._job(job)
        if not isinstance(nonce, bytes) or len(nonce) != NONCE:
            raise AuditError(f"A nonce has {NONCE} bytes.")
        count = found.statement.count
        if not isinstance(wanted, int) or not 0 <= wanted <= limit_of(count, self.exposure):
            raise AuditError(f"At most {limit_of(count, self.exposure)} leaves of this job are opened.")
        with self._lock:
            if found.nonce is not None and found.nonce != nonce:
                raise AuditError("This job has had its challenge.")
            found.nonce = nonce
        places = challenge(found.statement.digest(), nonce, count, wanted)
        openings = [Opening(found.leaves[place]).message() for place in places]
        return {"version": VERSION, "job": job, "openings": openings}


def limit_of(count: int, exposure: float) -> int:
    """How many leaves of ``count`` may be opened."""
    return int(count * exposure)


def as_bytes(vectors: np.ndarray) -> list[bytes]:
    """Rows as float16, little-endian."""
    return [row.tobytes() for row in np.asarray(vectors).astype("<f2")]
