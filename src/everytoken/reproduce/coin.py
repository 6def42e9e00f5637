"""CoIn's claims: inflated counts are caught from embeddings alone, and honest providers are not accused.

Jobs are cut from prose that Python brings. A verifier learns from some of them and is calibrated on others; the rest is
audited whole, with commitments, signatures and proofs, once honest and once for every attack and inflation. Arms are
the count and proofs alone, the linear verifier and the DeepSets one, on the same jobs. The embedder is
all-MiniLM-L6-v2, and words hashed into a vector in the quick version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import Arms, Claim, Context, Reproduction

if TYPE_CHECKING:
    from ..audit.attacks import Job, Remembered
    from ..audit.coin import CoIn
    from ..audit.verifier import Verifier

COUNT, LINEAR, SETS = "count and proofs", "linear verifier", "DeepSets verifier"
SIZES = {"quick": (48, 6, (1.0,)), "cpu": (80, 24, (0.5, 1.0, 3.0))}
"""Scale -> jobs to learn from, jobs to audit, inflations."""
LENGTH, BLOCK = 160, 32
WHY = "160 words a job in blocks of 32 and an untuned encoder; the paper has long traces, blocks of 256 and tuned heads"
WHY_COPIES = "forged tokens of one other job repeat at this inflation, and copied blocks are caught without a verifier"


def metric(attack: str, inflation: float) -> str:
    """The name of a measurement."""
    return f"caught: {attack}, inflation {inflation:g}"


def run(context: Context) -> Arms:
    from ..audit.attacks import Remembered, example_documents, jobs_of, trained
    from ..audit.base import Embedder, HashedWords, MiniLM
    from ..audit.coin import CoIn

    learn, judge, inflations = SIZES[context.scale]
    inner: Embedder = HashedWords() if context.quick else MiniLM()
    embedder = Remembered(inner)
    jobs = jobs_of(example_documents(), learn + judge, LENGTH, context.seed)
    arms: Arms = {}
    for arm, kind in ((COUNT, None), (LINEAR, "linear"), (SETS, "deepsets")):

        def measured(arm: str = arm, kind: str | None = kind) -> dict[str, Any]:
            settings = CoIn(block=BLOCK, verifier=kind or "linear")
            verifier = trained(embedder, settings, jobs[:learn], context.seed) if kind else None
            return judged(arm, jobs[learn:], inflations, embedder, verifier, settings, context)

        arms[arm] = context.part(arm, measured)
    return arms


def judged(
    arm: str,
    jobs: list[Job],
    inflations: tuple[float, ...],
    embedder: Remembered,
    verifier: Verifier | None,
    settings: CoIn,
    context: Context,
) -> dict[str, Any]:
    """Every job honest and attacked: 1 where the audit calls it inflated or failed, and what audits cost."""
    import time

    from ..audit.attacks import ATTACKS, audited
    from ..core.rng import numpy_generator

    found: dict[str, list[float]] = {}
    generator, began = numpy_generator(context.seed, "audits", arm), time.perf_counter()
    sizes, shares, tokens = 0, [], 0
    for number, job in enumerate(jobs):
        context.report(f"audits by the {arm}", number, len(jobs))
        for attack in (None, *ATTACKS):
            for inflation in inflations if attack else inflations[:1]:
                report = audited(attack, job, jobs, inflation, embedder, verifier, settings, generator)
                name = metric(attack, inflation) if attack else "false alarms"
                found.setdefault(name, []).append(float(report.verdict in ("inflated", "failed")))
                sizes, tokens = sizes + report.bytes, tokens + report.count
                shares.append(report.opened / report.count)
    cost = {"bytes a token": sizes / tokens, "ms a token": 1e3 * (time.perf_counter() - began) / tokens}
    return {**found, **cost, "share opened": sum(shares) / len(shares)}


REPRODUCTION = Reproduction(
    name="coin",
    summary="honest and inflated jobs audited whole, with and without a verifier of embeddings",
    run=run,
    claims=[
        Claim(metric("random words", 1.0), LINEAR, COUNT, "up to 94.7%", kind="difference", why=WHY),
        Claim(metric("another job", 1.0), LINEAR, COUNT, "up to 94.7%", kind="difference", why=WHY),
        Claim(metric("random words inside", 1.0), LINEAR, COUNT, "74.7% by token to block", kind="difference", why=WHY),
        Claim(metric("another job", 3.0), LINEAR, COUNT, "up to 94.7%", kind="difference", why=WHY_COPIES),
        Claim(metric("another job", 1.0), SETS, LINEAR, "not compared", kind="difference", why=WHY),
        Claim("false alarms", LINEAR, "", "alpha 0.05", kind="value", higher_is_better=False, threshold=0.05, why=WHY),
        Claim(
            metric("plausible text", 1.0), LINEAR, COUNT, "not tested", kind="difference", why="written down as missed"
        ),
    ],
    seeds=1,
    extra=("agents", "cryptography"),
)
