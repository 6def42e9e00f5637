"""CoIn: auditing hidden tokens that are billed (arXiv 2505.13778).

A provider commits to a fingerprint of every hidden token in a hash tree before it sees the challenge. The auditor
checks the count, opens random leaves, and checks with embeddings alone that opened tokens fit their block (A) and
blocks fit the answer (B). With E an embedder that both name and B_j the block of token r_i::

    leaf_i = SHA-256(0x00 || version || job || i || j || salt_i || E(B_j) || E(r_i))
    C      = SHA-256(0x02 || version || n || b || job || embedder || prompt || answer || root)     signed

The paper's fingerprint is E(B_j) || E(r_i) in a tree that is padded by repeating the last leaf, whose root is also that
of more leaves. Here the count, the place and the job are inside what is signed, leaves are salted, and nothing is
padded. A proof of inclusion does not prove the count, so the auditor takes all leaf hashes and rebuilds the root.

After every round of openings the verifier's log-likelihood ratio L decides::

    inflated   L > bar, which whole audits of honest jobs pass with chance alpha at most (split conformal)
    honest     L < log(beta / (1 - alpha))
    undecided  neither, when the exposure is used up

Wald's upper bound, log((1 - beta) / alpha), holds for a true ratio; L is learned, so it is calibrated instead.

A verdict is evidence and no proof: text that is plausible but was never generated passes.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import BadInputError, EverytokenError, require
from .base import (
    MOST_OPENED,
    AuditError,
    Embedder,
    Kept,
    Opening,
    Statement,
    challenge,
    checked,
    digest_of,
    from_hex,
    is_unit,
    same,
)
from .merkle import HASH, root
from .provider import NONCE, Source, limit_of
from .verifier import Scores, Verifier, score

VERDICTS = ("honest", "inflated", "undecided", "failed")


@dataclass
class CoIn:
    """Settings of an audit.

    Args:
        block: tokens of a block.
        alpha: how often an honest job may be called inflated.
        beta: how often an inflated job may be called honest.
        round_size: leaves that every round opens.
        exposure: the largest share of leaves that is opened.
        verifier: ``"linear"`` or ``"deepsets"``.

    Raises:
        BadInputError: values out of range.
    """

    block: int = 256
    alpha: float = 0.05
    beta: float = 0.05
    round_size: int = 16
    exposure: float = 0.4
    verifier: str = "linear"

    def __post_init__(self) -> None:
        if self.block < 1 or self.round_size < 1:
            raise BadInputError(f"Blocks and rounds have one token at least; got {self.block} and {self.round_size}.")
        if not 0 < self.alpha < 0.5 or not 0 < self.beta < 0.5 or not 0 < self.exposure <= 1:
            raise BadInputError("alpha and beta are in (0, 0.5), exposure in (0, 1].")
        Verifier(self.verifier)


@dataclass
class Report:
    """What an audit found; enough to check it again without the provider.

    Attributes:
        job, verdict, reason: the verdict and why.
        count: hidden tokens that the provider claims; the tree has so many leaves unless the audit failed.
        opened, rounds: leaves and rounds.
        evidence: log-likelihood ratio of inflated against honest after every round.
        confidence: the probability of the verdict, with even odds before the audit; 1 where a proof failed.
        bytes: of all messages.
        transcript: the messages themselves, and the nonce.
    """

    job: str
    verdict: str
    reason: str
    count: int = 0
    opened: int = 0
    rounds: int = 0
    evidence: list[float] = field(default_factory=list)
    confidence: float = 1.0
    bytes: int = 0
    transcript: dict[str, Any] = field(default_factory=dict)

    def message(self) -> dict[str, Any]:
        """As JSON."""
        return {"version": 1, **asdict(self)}


class Auditor:
    """Audits jobs of one provider.

    Args:
        embedder: the embedder that the provider names.
        public_key: the provider's, 32 bytes, known beforehand.
        verifier: a trained one; None checks proofs and the count alone and calls what passes undecided.
        settings: how.
        kept: commitments that were seen before.
    """

    def __init__(
        self,
        embedder: Embedder,
        public_key: bytes,
        verifier: Verifier | None = None,
        settings: CoIn | None = None,
        kept: Kept | None = None,
        nonce: Callable[[], bytes] = lambda: secrets.token_bytes(NONCE),
    ):
        require("cryptography", "agents", "Checking signatures")
        self.embedder, self.public_key, self.verifier = embedder, public_key, verifier
        self.settings, self.kept, self.nonce = settings or CoIn(), kept or Kept(), nonce
        if verifier is not None and verifier.embedder and verifier.embedder != embedder.name:
            raise BadInputError(f"The verifier was trained on {verifier.embedder}, not on {embedder.name}.")

    def audit(self, source: Source, job: str, prompt: str, answer: str) -> Report:
        """Audits one job. What the provider does wrong is in the report, not raised; silence counts as failed.

        Args:
            source: the provider.
            prompt, answer: as the user sent and got them.
        """
        report = Report(job, "failed", "")
        try:
            self._audit(source, job, prompt, answer, report)
        except EverytokenError as error:
            report.verdict, report.reason, report.confidence = "failed", error.message[:500], 1.0
        report.bytes = len(json.dumps(report.transcript))
        return report

    def _audit(self, source: Source, job: str, prompt: str, answer: str, report: Report) -> None:
        log = report.transcript
        log["statement"] = source.statement(job)
        statement = signed_statement(log["statement"], self.public_key)
        if statement.job != job or not same(statement.prompt, digest_of(prompt)):
            raise AuditError("The statement is about another job or prompt.")
        if not same(statement.answer, digest_of(answer)) or log["statement"]["answer"] != answer:
            raise AuditError("The statement is about another answer.")
        if statement.embedder != self.embedder.name or statement.block != self.settings.block:
            raise AuditError(f"The statement takes {statement.embedder} and blocks of {statement.block}.")
        self.kept.note(job, statement.digest())
        report.count = statement.count
        log["leaves"] = source.leaves(job)
        hashes = leaf_hashes(log["leaves"], statement)
        report.confidence = 0.5
        if statement.count == 0:
            report.verdict, report.reason, report.confidence = "honest", "no hidden tokens are billed", 1.0
            return
        nonce = self.nonce()
        log["nonce"] = nonce.hex()
        vector = np.asarray(self.embedder([answer]))[0]
        limit = min(limit_of(statement.count, self.settings.exposure), MOST_OPENED)
        wanted = 0
        while wanted < limit:
            wanted = min(wanted + self.settings.round_size, limit)
            log["openings"] = source.reveal(job, nonce, wanted)
            openings = checked_openings(log["openings"], statement, hashes, nonce, wanted, self.embedder.dimensions)
            report.rounds, report.opened = report.rounds + 1, wanted
            if self._decide(score_of(openings, vector), statement, report):
                return
        report.verdict = "undecided"
        report.reason = "the count and every proof hold; the exposure is used up before the embeddings decide"

    def _decide(self, found: Scores, statement: Statement, report: Report) -> bool:
        """Whether the evidence so far ends the audit."""
        settings = self.settings
        if found.repeated and settings.block >= 16:
            report.verdict, report.confidence = "inflated", 1.0
            report.reason = f"{found.repeated} opened blocks are copies of others"
            return True
        if self.verifier is None:
            return False
        evidence = self.verifier.evidence(found)
        report.evidence.append(evidence)
        report.confidence = 1 / (1 + math.exp(-min(abs(evidence), 500)))
        if evidence > self.verifier.bar:
            report.verdict, report.reason = "inflated", "opened embeddings do not fit their blocks or the answer"
            return True
        if evidence < math.log(settings.beta / (1 - settings.alpha)):
            report.verdict, report.reason = "honest", "the count and every proof hold, and opened embeddings fit"
            return True
        return False


def signed_statement(message: Any, public_key: bytes) -> Statement:
    """The statement of a message, once its signature holds.

    Raises:
        AuditError: a malformed message, or a signature that does not hold.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    checked(message, {"statement", "signature", "answer"})
    statement = Statement.read(message["statement"])
    try:
        key = Ed25519PublicKey.from_public_bytes(public_key)
        key.verify(from_hex(message["signature"], 64), statement.digest())
    except (InvalidSignature, ValueError) as error:
        raise AuditError("The signature does not hold.") from error
    return statement


def leaf_hashes(message: Any, statement: Statement) -> list[bytes]:
    """All leaf hashes of a job, once they are as many as claimed, all different, and have the signed root.

    Raises:
        AuditError: they are not.
    """
    checked(message, {"job", "hashes"})
    raw = message["hashes"]
    if message["job"] != statement.job or not isinstance(raw, list) or len(raw) != statement.count:
        raise AuditError(f"The provider claims {statement.count} tokens and shows another number of leaves.")
    hashes = [from_hex(item, HASH) for item in raw]
    if len(set(hashes)) != len(hashes):
        raise AuditError("Leaves are repeated.")
    if not same(root(hashes), statement.root):
        raise AuditError("The leaves do not have the root that was signed.")
    return hashes


def checked_openings(
    message: Any, statement: Statement, hashes: Sequence[bytes], nonce: bytes, wanted: int, dimensions: int
) -> list[Opening]:
    """The openings of a challenge, once each is the leaf that was asked for.

    Raises:
        AuditError: other leaves, a wrong block, a vector that is none, or a leaf that has another hash.
    """
    checked(message, {"job", "openings"})
    asked = challenge(statement.digest(), nonce, statement.count, wanted)
    raw = message["openings"]
    if message["job"] != statement.job or not isinstance(raw, list) or len(raw) != len(asked):
        raise AuditError(f"{len(asked)} openings were asked for.")
    openings = [Opening.read(statement.job, item, dimensions) for item in raw]
    vectors: dict[int, bytes] = {}
    for place, opening in zip(asked, openings, strict=True):
        leaf = opening.leaf
        if leaf.index != place or leaf.block != place // statement.block:
            raise AuditError("Another leaf was opened than the challenge asks for.")
        if not same(leaf.hash(), hashes[place]):
            raise AuditError(f"Leaf {place} is not the one that was committed to.")
        if vectors.setdefault(leaf.block, leaf.block_vector) != leaf.block_vector:
            raise AuditError(f"Block {leaf.block} has two embeddings.")
        if not all(is_unit(vector, dimensions) for vector in opening.vectors()):
            raise AuditError(f"Leaf {place} holds what is no unit vector.")
    return openings


def score_of(openings: Sequence[Opening], answer: np.ndarray) -> Scores:
    """The scores of openings against the auditor's own embedding of the answer."""
    pairs = [opening.vectors() for opening in openings]
    blocks = [opening.leaf.block for opening in openings]
    return score(blocks, np.stack([pair[0] for pair in pairs]), np.stack([pair[1] for pair in pairs]), answer)


def recheck(path: Path, embedder: Embedder, public_key: bytes, verifier: Verifier | None, settings: CoIn) -> Report:
    """Audits a saved report's transcript again, offline.

    Returns:
        A report of its own; it has the saved verdict where nothing was changed.

    Raises:
        BadInputError: no report.
    """
    from ..core.settings import read_text

    try:
        raw = json.loads(read_text(path))
        log, job = raw["transcript"], raw["job"]
        prompt_digest, answer = log["statement"]["statement"]["prompt"], log["statement"]["answer"]
        nonce = bytes.fromhex(log.get("nonce", ""))
    except (ValueError, KeyError, TypeError) as error:
        raise BadInputError(f"{path} is no report of an audit that got a statement ({error}).") from error
    report = Report(job, "failed", "")
    auditor = Auditor(embedder, public_key, verifier, settings)
    try:
        statement = signed_statement(log["statement"], public_key)
        if statement.job != job or statement.prompt.hex() != prompt_digest or statement.answer != digest_of(answer):
            raise AuditError("The statement is about another job.")
        hashes = leaf_hashes(log["leaves"], statement)
        report.count, report.confidence = statement.count, 0.5
        if not statement.count:
            report.verdict, report.confidence = "honest", 1.0
            return report
        message = log["openings"]
        vector = np.asarray(embedder([answer]))[0]
        opened = len(message["openings"])
        found = checked_openings(message, statement, hashes, nonce, opened, embedder.dimensions)
        report.rounds, report.opened = 1, opened
        if not auditor._decide(score_of(found, vector), statement, report):
            report.verdict = "undecided"
    except (EverytokenError, KeyError, TypeError) as error:
        report.verdict, report.reason = "failed", str(error)[:500]
    return report
