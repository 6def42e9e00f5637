"""What ``everytoken try`` and ``compare`` run for audits: honest jobs and attacks on them, audited whole."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..core.errors import BadInputError
from ..core.rng import numpy_generator
from ..core.settings import read_text
from ..core.trace import TokenTrace
from ..decoding.trial import TrialRequest, TrialResult
from .attacks import ATTACKS, Remembered, audited, example_documents, jobs_of, trained
from .base import HashedWords, Statement, challenge
from .coin import CoIn
from .verifier import Verifier

LEARN, JUDGE, LENGTH, INFLATION = 96, 12, 160, 1.0
BASELINE = "count and proofs"


def trace_columns(_trial: object) -> tuple[str, ...]:
    """The columns of the traces."""
    return ("leaf", "block")


def trial(request: TrialRequest) -> TrialResult:
    """Audits jobs of plain text and attacks that bill twice the tokens; see ``decoding.trial``.

    Jobs are cut from the user's file, documents apart by empty lines, or from prose that Python brings. The embedder is
    words hashed into a vector, so that nothing is loaded; blocks have 32 tokens unless ``block`` is set.

    Raises:
        BadInputError: a model or a prompt, which are not read; a file without long documents.
        MissingExtraError: the extra ``agents`` is not installed.
    """
    if request.model is not None or request.prompt is not None:
        raise BadInputError("Audits read no --model and no --prompt.", "Give texts: --data texts.txt")
    seed = int(request.options.get("seed", 0))
    documents = example_documents()
    if request.data is not None:
        documents = [part for part in read_text(Path(request.data)).split("\n\n") if part.strip()]
    items = [(item.name, item.factory(**{"block": 32} | item.settings)) for item in request.trials]
    jobs = jobs_of(documents, LEARN + JUDGE, LENGTH, seed)
    result = TrialResult({}, "attacks caught", column="leaf")
    embedder = Remembered(HashedWords())
    _arm(BASELINE, items[0][1] if items else CoIn(block=32), None, jobs, embedder, request, result, seed)
    for name, settings in items:
        request.report(f"training the verifier of {name}", 0, 0)
        verifier = trained(embedder, settings, jobs[:LEARN], seed, report=request.report)
        _arm(name, settings, verifier, jobs, embedder, request, result, seed)
    result.notes.append("Plausible text and made-up embeddings pass: an audit without the text cannot see them.")
    return result


def _arm(
    name: str,
    settings: CoIn,
    verifier: Verifier | None,
    jobs: list[Any],
    embedder: Remembered,
    request: TrialRequest,
    result: TrialResult,
    seed: int,
) -> None:
    """One row: shares of verdicts, and what an audit costs."""
    judged, generator = jobs[LEARN:], numpy_generator(seed, "audits", name)
    caught: dict[str, list[bool]] = {}
    bytes_sent = opened = billed = 0
    began = time.perf_counter()
    for number, job in enumerate(judged):
        request.report(f"audits of {name}", number, len(judged))
        for attack in (None, *ATTACKS):
            report = audited(attack, job, judged, INFLATION, embedder, verifier, settings, generator)
            caught.setdefault(attack or "honest", []).append(report.verdict in ("inflated", "failed"))
            bytes_sent, opened, billed = bytes_sent + report.bytes, opened + report.opened, billed + report.count
            if number == 0 and attack is None and verifier is not None:
                result.traces.append(_trace(name, job, report, settings))
    seconds = time.perf_counter() - began
    shares = {attack: sum(values) / len(values) for attack, values in caught.items()}
    result.rows[name] = {
        "attacks caught": sum(shares[attack] for attack in ATTACKS) / len(ATTACKS),
        **{f"caught: {attack}": shares[attack] for attack in ATTACKS},
        "false alarms": shares["honest"],
        "share opened": opened / billed,
        "bytes a token": bytes_sent / billed,
        "ms a token": 1e3 * seconds / billed,
    }


def _trace(name: str, job: Any, report: Any, settings: CoIn) -> TokenTrace:
    """The hidden tokens of an honest job, and which of them the audit opened: what the auditor sees and what not."""
    statement = Statement.read(report.transcript["statement"]["statement"])
    places = set(challenge(statement.digest(), bytes.fromhex(report.transcript["nonce"]), report.count, report.opened))
    trace = TokenTrace(list(range(len(job.tokens))), title=f"{name}: an honest job, {report.verdict}", station="audit")
    trace.texts = list(job.tokens)
    trace.add("leaf", ["opened" if place in places else "hidden" for place in range(len(job.tokens))])
    return trace.add("block", [place // settings.block for place in range(len(job.tokens))])
