"""Audits: every lie about leaves, counts, places and jobs is found; the laws of chance; what passes, passes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

pytest.importorskip("cryptography")

from everytoken.audit import base
from everytoken.audit.attacks import ATTACKS, Remembered, audited, billed, example_documents, jobs_of, trained
from everytoken.audit.base import AuditError, HashedWords, Kept, Leaf, Opening, Statement, challenge, digest_of
from everytoken.audit.coin import Auditor, CoIn, leaf_hashes, recheck
from everytoken.audit.provider import Provider
from everytoken.audit.verifier import Scores, Verifier, score
from everytoken.core.errors import BadInputError, MissingExtraError

SETTINGS = CoIn(block=16, round_size=8)
EMBEDDER = Remembered(HashedWords(64))
JOBS = jobs_of(example_documents(), 40, 96)


def made(tokens=None, job=JOBS[0]):
    provider = Provider(EMBEDDER, block=16)
    provider.commit(job.id, job.prompt, job.answer, job.tokens if tokens is None else tokens)
    return provider, Auditor(EMBEDDER, provider.public_key, settings=SETTINGS)


def run(provider, auditor, job=JOBS[0]):
    return auditor.audit(provider, job.id, job.prompt, job.answer)


class Lying:
    """A provider whose messages a test changes."""

    def __init__(self, inner, **changes):
        self.inner, self.changes = inner, changes

    def _changed(self, name, message):
        message = json.loads(json.dumps(message))
        return self.changes[name](message) if name in self.changes else message

    def statement(self, job):
        return self._changed("statement", self.inner.statement(job))

    def leaves(self, job):
        return self._changed("leaves", self.inner.leaves(job))

    def reveal(self, job, nonce, wanted):
        return self._changed("open", self.inner.reveal(job, nonce, wanted))


def setting(*path, to):
    """A change of one place of a message."""

    def change(message):
        inner = message
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = to(inner[path[-1]]) if callable(to) else to
        return message

    return change


def test_an_honest_job_holds_as_far_as_proofs_go():
    report = run(*made())
    assert (report.verdict, report.count, report.rounds) == ("undecided", 96, 5)
    assert report.opened == 38  # below 40%
    assert "every proof hold" in report.reason
    empty = run(*made([]))
    assert (empty.verdict, empty.count, empty.opened) == ("honest", 0, 0)


FLIP = lambda text: ("1" if text[0] == "0" else "0") + text[1:]  # noqa: E731


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("statement", setting("statement", "count", to=97), "signature"),
        ("statement", setting("statement", "block", to=17), "signature"),
        ("statement", setting("statement", "root", to=FLIP), "signature"),
        ("statement", setting("signature", to=FLIP), "signature"),
        ("statement", setting("signature", to="00"), "64 bytes"),
        ("statement", setting("answer", to="other"), "another answer"),
        ("statement", setting("version", to=2), "version 1"),
        ("statement", setting("statement", "job", to="job-other"), "signature"),
        ("statement", lambda _m: [], "version 1"),
        ("statement", lambda m: {**m, "more": 1}, "no other"),
        ("leaves", setting("hashes", to=lambda h: h[:-1]), "another number"),
        ("leaves", setting("hashes", to=lambda h: [*h, h[-1]]), "another number"),
        ("leaves", setting("hashes", to=lambda h: [h[1], h[0], *h[2:]]), "root"),
        ("leaves", setting("hashes", to=lambda h: [FLIP(h[0]), *h[1:]]), "root"),
        ("leaves", setting("hashes", to=lambda h: [h[1], *h[1:]]), "repeated"),
        ("leaves", setting("hashes", 3, to="zz"), "digits"),
        ("open", setting("openings", to=lambda o: o[:-1]), "openings were asked for"),
        ("open", setting("openings", to=lambda o: [o[1], o[0], *o[2:]]), "Another leaf"),
        ("open", setting("openings", to=lambda o: [o[0], o[0], *o[2:]]), "Another leaf"),
        ("open", setting("openings", 0, "salt", to=FLIP), "not the one"),
        ("open", setting("openings", 0, "token_vector", to=FLIP), "not the one"),
        ("open", setting("openings", 0, "block", to=lambda b: b + 1), "Another leaf"),
        ("open", setting("openings", 0, "index", to="3"), "whole numbers"),
        ("open", setting("openings", 0, "salt", to="00"), "16 bytes"),
        ("open", setting("openings", 0, "token_vector", to="00" * 64), "128 bytes"),
        ("open", setting("openings", 0, to=7), "An opening has"),
        ("open", setting("job", to="job-other"), "openings were asked for"),
    ],
)
def test_every_lie_of_a_message_is_found(name, change, reason):
    provider, auditor = made()
    report = run(Lying(provider, **{name: change}), auditor)
    assert report.verdict == "failed"
    assert reason in report.reason


def test_full_mode_refuses_every_other_count():
    """Signed by the provider itself, over the true leaves: a count that is not theirs is refused."""
    provider, _ = made(list(JOBS[0].tokens[:12]))
    message = provider.leaves(JOBS[0].id)
    true = provider._jobs[JOBS[0].id].statement
    for count in range(40):
        claimed = Statement(true.job, count, true.block, true.embedder, true.prompt, true.answer, true.root)
        if count == 12:
            assert len(leaf_hashes(message, claimed)) == 12
        else:
            with pytest.raises(AuditError, match="another number"):
                leaf_hashes(message, claimed)


def test_an_inner_node_is_no_leaf_and_every_field_of_a_leaf_counts():
    leaf = Leaf("job", 3, 0, b"s" * 16, b"b" * 4, b"t" * 4)
    others = [
        Leaf("jo", 3, 0, b"bs" + b"s" * 14, b"b" * 4, b"t" * 4),
        Leaf("job", 4, 0, leaf.salt, leaf.block_vector, leaf.token_vector),
        Leaf("job", 3, 1, leaf.salt, leaf.block_vector, leaf.token_vector),
        Leaf("job", 3, 0, leaf.salt, b"b" * 5, b"t" * 3),  # lengths are in front: no shift between fields
        Leaf("job", 3, 0, leaf.salt, b"b" * 3, b"bt" + b"t" * 3),
    ]
    assert len({item.hash() for item in [leaf, *others]}) == 6


def test_vectors_that_are_none_are_refused():
    """Committed to, and no unit vectors: NaN, infinity, zero, another norm."""
    job = JOBS[0]
    for bad in (np.nan, np.inf, 0.0, 0.13):
        provider = Provider(EMBEDDER, block=16)
        row = np.full(64, bad).astype("<f2").tobytes()
        provider.admit(
            job.id, job.prompt, job.answer, [Leaf(job.id, n, n // 16, bytes([n] * 16), row, row) for n in range(64)]
        )
        report = run(provider, Auditor(EMBEDDER, provider.public_key, settings=SETTINGS))
        assert report.verdict == "failed" and "unit vector" in report.reason


def test_a_block_has_one_embedding():
    job = JOBS[0]
    provider = Provider(EMBEDDER, block=16)
    rows = EMBEDDER(list(job.tokens)).astype("<f2")
    leaves = [Leaf(job.id, n, n // 16, bytes([n] * 16), rows[n].tobytes(), rows[n].tobytes()) for n in range(96)]
    provider.admit(job.id, job.prompt, job.answer, leaves)
    assert "two embeddings" in run(provider, Auditor(EMBEDDER, provider.public_key, settings=SETTINGS)).reason


def test_a_job_has_one_commitment_one_challenge_and_one_prompt():
    provider, auditor = made()
    job = JOBS[0]
    with pytest.raises(BadInputError, match="committed to before"):
        provider.commit(job.id, job.prompt, job.answer, job.tokens[:5])
    assert run(provider, auditor).verdict == "undecided"
    assert "had its challenge" in run(provider, auditor).reason  # a second nonce would open other leaves
    with pytest.raises(AuditError, match="32 bytes"):
        provider.reveal(job.id, b"short", 1)
    with pytest.raises(AuditError, match="At most 38"):
        provider.reveal(job.id, b"n" * 32, 39)
    with pytest.raises(AuditError, match="no such job"):
        provider.statement("nothing")
    assert "another job or prompt" in auditor.audit(provider, job.id, "other prompt", job.answer).reason
    assert "another answer" in auditor.audit(provider, job.id, job.prompt, "other answer").reason
    second, _ = made(list(job.tokens[:40]))
    again = Auditor(EMBEDDER, second.public_key, settings=SETTINGS, kept=auditor.kept)
    assert "committed to before, and otherwise" in run(second, again).reason
    stranger, _ = made()
    assert "signature" in run(stranger, auditor).reason
    other = Auditor(HashedWords(32), provider.public_key, settings=SETTINGS)
    assert "blocks of 16" in run(provider, other).reason


def test_silence_counts_as_failed():
    class Silent:
        def statement(self, _job):
            raise AuditError("The provider did not answer (ReadTimeout).")

    _, auditor = made()
    report = run(Silent(), auditor)
    assert (report.verdict, report.confidence) == ("failed", 1.0)


def test_challenges():
    """Without replacement, prefixes of longer ones, and other ones for another commitment or nonce."""
    first = challenge(b"c" * 32, b"n" * 32, 1000, 400)
    assert len(set(first)) == 400 and set(first) <= set(range(1000))
    assert challenge(b"c" * 32, b"n" * 32, 1000, 7) == first[:7]
    assert challenge(b"d" * 32, b"n" * 32, 1000, 7) != first[:7] != challenge(b"c" * 32, b"m" * 32, 1000, 7)
    assert sorted(challenge(b"c" * 32, b"n" * 32, 9, 9)) == list(range(9))
    assert challenge(b"c" * 32, b"n" * 32, 0, 0) == []
    with pytest.raises(BadInputError):
        challenge(b"c" * 32, b"n" * 32, 3, 4)
    counts = np.bincount([challenge(b"c" * 32, n.to_bytes(32, "big"), 10, 1)[0] for n in range(3000)], minlength=10)
    assert ((counts - 300) ** 2 / 300).sum() < 27.9  # chi-square, 9 degrees of freedom, 0.1%


@pytest.mark.parametrize(
    ("total", "bad", "opened", "chance"),
    [(1000, 100, 10, 0.653072), (1000, 100, 44, 0.991299), (256, 64, 8, 0.903554), (10, 3, 4, 0.833333),
     (2000, 1000, 5, 0.968906)],
)  # fmt: skip
def test_the_hypergeometric_law(total, bad, opened, chance):
    """By formula and by the challenges themselves, within three standard errors."""
    assert 1 - math.comb(total - bad, opened) / math.comb(total, opened) == pytest.approx(chance, abs=5e-7)
    draws = 600
    hits = sum(min(challenge(b"c" * 32, n.to_bytes(32, "big"), total, opened)) < bad for n in range(draws))
    assert abs(hits / draws - chance) <= 3 * math.sqrt(chance * (1 - chance) / draws)


def test_copied_blocks_are_found_and_are_no_accident():
    report = audited("copies", JOBS[0], JOBS, 1.0, EMBEDDER, None, SETTINGS, np.random.default_rng(0))
    assert report.verdict == "inflated" and "copies" in report.reason


def some(rows, seed):
    generator = np.random.default_rng(seed)
    return Scores(generator.normal(0.6, 0.1, rows), generator.normal(0.4, 0.1, rows))


@pytest.mark.parametrize("kind", ["linear", "deepsets"])
def test_a_verifier_learns_and_does_not_depend_on_order(kind, tmp_path):
    honest = [some(6, n) for n in range(40)]
    inflated = [Scores(some(6, n).fit, some(6, n).relevance - 0.25) for n in range(100, 140)]
    verifier = Verifier(kind).fit(honest, inflated)
    right = [verifier.evidence(job) < 0 for job in honest] + [verifier.evidence(job) > 0 for job in inflated]
    assert np.mean(right) > 0.9
    order = [3, 1, 5, 0, 2, 4]
    for job in honest[:5]:
        assert verifier.evidence(Scores(job.fit[order], job.relevance[order])) == pytest.approx(
            verifier.evidence(job), abs=1e-12
        )
    verifier.calibrate([some(6, n) for n in range(500, 540)], 0.05)
    verifier.save(tmp_path / "v.json")
    again = Verifier.load(tmp_path / "v.json")
    assert again.bar == verifier.bar and again.evidence(honest[0]) == verifier.evidence(honest[0])
    if kind == "deepsets":
        assert 2000 <= sum(value.size for name, value in verifier.weights.items() if len(name) < 3) <= 2500


def test_the_calibrated_bar_keeps_false_alarms_below_alpha():
    """Split conformal: over many calibrations, fresh honest jobs pass the bar with chance alpha at most."""
    verifier = Verifier().fit([some(6, n) for n in range(20)], [some(4, n) for n in range(20, 40)])
    alarms = []
    for trial in range(60):
        verifier.calibrate([some(6, 1000 + 100 * trial + n) for n in range(59)], 0.05)
        alarms += [verifier.evidence(some(6, 90_000 + 100 * trial + n)) > verifier.bar for n in range(20)]
    assert np.mean(alarms) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1200)
    assert math.isinf(verifier.calibrate([some(6, n) for n in range(18)], 0.05).bar)  # too few for any bar


def test_scores_by_hand():
    blocks, tokens = np.eye(2)[[0, 0, 1]], np.array([[1.0, 0], [0, 1], [0, 1]])
    found = score([0, 0, 7], blocks, tokens, np.array([0.6, 0.8]))
    assert np.allclose(found.fit, [math.sqrt(0.5), 1])
    assert np.allclose(found.relevance, [0.6, 0.8])
    assert found.repeated == 0 and score([0, 1], blocks[:2], tokens[:2], np.ones(2)).repeated == 1
    back = score([7, 0, 0], blocks[[2, 1, 0]], tokens[[2, 1, 0]], np.array([0.6, 0.8]))
    assert back.features().tolist() == found.features().tolist()
    with pytest.raises(BadInputError):
        score([], blocks, tokens, blocks[0])


def test_verdicts_and_their_reports(tmp_path):
    """With a verifier whose evidence is given: each verdict, and a report that is checked again offline."""

    class Sure(Verifier):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def evidence(self, _job):
            return self.value

    for value, verdict in ((5.0, "inflated"), (-5.0, "honest"), (0.0, "undecided")):
        provider, _ = made()
        verifier = Sure(value)
        verifier.bar = 0.0
        report = run(provider, Auditor(EMBEDDER, provider.public_key, verifier, SETTINGS))
        assert report.verdict == verdict
        assert report.rounds == (5 if verdict == "undecided" else 1)
        assert report.confidence == pytest.approx(1 / (1 + math.exp(-abs(value))))
        path = tmp_path / f"{verdict}.json"
        path.write_text(json.dumps(report.message()))
        again = recheck(path, EMBEDDER, provider.public_key, verifier, SETTINGS)
        assert (again.verdict, again.opened) == (verdict, report.opened)
    raw = json.loads(path.read_text())
    raw["transcript"]["openings"]["openings"][0]["salt"] = "00" * 16
    path.write_text(json.dumps(raw))
    assert recheck(path, EMBEDDER, provider.public_key, verifier, SETTINGS).verdict == "failed"
    path.write_text("{}")
    with pytest.raises(BadInputError, match="no report"):
        recheck(path, EMBEDDER, provider.public_key, verifier, SETTINGS)
    unbounded = Sure(3.5)  # high, and no bar was calibrated
    provider, _ = made()
    assert run(provider, Auditor(EMBEDDER, provider.public_key, unbounded, SETTINGS)).verdict == "undecided"


def test_salts_change_leaves_and_no_verdict():
    verifier = trained(EMBEDDER, SETTINGS, JOBS[:16])
    reports = []
    for _ in range(2):
        provider, _ = made()
        auditor = Auditor(EMBEDDER, provider.public_key, verifier, CoIn(block=16, round_size=96, exposure=1.0))
        provider.exposure = 1.0  # all leaves, so that both audits open the same
        reports.append(run(provider, auditor))
    assert reports[0].evidence == reports[1].evidence
    assert reports[0].transcript["leaves"] != reports[1].transcript["leaves"]


def test_a_proof_is_as_large_as_the_sheet_says():
    provider, _ = made()
    hashes = provider.leaves(JOBS[0].id)["hashes"]
    assert sum(len(bytes.fromhex(item)) for item in hashes) == 32 * 96
    leaf = Leaf("job", 0, 0, b"s" * 16, b"\0" * 768, b"\0" * 768)  # 384 dimensions in float16: 1.5 kB
    assert 1536 <= len(leaf.data()) <= 1600
    assert len(json.dumps(Opening(leaf).message())) < 3300


def test_attacks_and_bad_input():
    generator = np.random.default_rng(0)
    for attack in ATTACKS[:-1]:
        tokens = billed(attack, JOBS[0], JOBS, 0.5, generator)
        assert len(tokens) == 144
        left = iter(tokens)
        assert all(token in left for token in JOBS[0].tokens)  # the genuine ones, in order
    for attack, inflation in ((ATTACKS[-1], 1.0), ("magic", 1.0), ("copies", 0.0)):
        with pytest.raises(BadInputError):
            billed(attack, JOBS[0], JOBS, inflation, generator)
    for bad in ({"block": 0}, {"round_size": 0}, {"alpha": 0.5}, {"beta": 0.0}, {"exposure": 1.5}, {"verifier": "x"}):
        with pytest.raises(BadInputError):
            CoIn(**bad)
    for bad in ({"block": 0}, {"exposure": 0.0}):
        with pytest.raises(BadInputError):
            Provider(EMBEDDER, **bad)
    with pytest.raises(BadInputError, match="eight jobs"):
        trained(EMBEDDER, SETTINGS, JOBS[:7])
    with pytest.raises(BadInputError, match="was not trained"):
        Verifier().evidence(some(3, 0))
    with pytest.raises(BadInputError, match="two honest"):
        Verifier().fit([some(3, 0)], [some(3, 1)] * 5)
    with pytest.raises(BadInputError, match="trained on other"):
        Auditor(EMBEDDER, b"k" * 32, Verifier(embedder="other"))
    for count, length in ((0, 5), (1, 0), (1, 10**6)):
        with pytest.raises(BadInputError):
            jobs_of(["a b c"], count, length)
    for change in ({"count": -1}, {"count": True}, {"job": "a b"}, {"embedder": ""}, {"root": b"short"}, {"block": 0}):
        fields = {
            "job": "j",
            "count": 1,
            "block": 1,
            "embedder": "e",
            "prompt": b"p" * 32,
            "answer": b"a" * 32,
            "root": b"r" * 32,
        }
        with pytest.raises(AuditError):
            Statement(**fields | change)


def test_what_an_audit_cannot_see_is_not_claimed():
    """Plausible text and made-up embeddings keep every proof; only a verifier could doubt them."""
    for attack in ("plausible text", "made-up embeddings", "another job"):
        report = audited(attack, JOBS[1], JOBS, 1.0, EMBEDDER, None, SETTINGS, np.random.default_rng(1))
        assert (report.verdict, report.count) == ("undecided", 192)


def test_without_the_extra(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match="agents"):
        Provider(EMBEDDER)


def test_the_order_of_what_is_signed(monkeypatch):
    """Every field of a statement changes the commitment; digests are of texts with their lengths."""
    fields = {
        "job": "j",
        "count": 5,
        "block": 2,
        "embedder": "e",
        "prompt": b"p" * 32,
        "answer": b"a" * 32,
        "root": b"r" * 32,
    }
    base_digest = Statement(**fields).digest()
    changes = [
        {"job": "k"},
        {"count": 6},
        {"block": 3},
        {"embedder": "f"},
        {"prompt": b"q" * 32},
        {"answer": b"b" * 32},
    ]
    changes += [{"root": b"s" * 32}, {"job": "je", "embedder": "x"}]
    assert len({base_digest, *(Statement(**fields | change).digest() for change in changes)}) == len(changes) + 1
    assert base.digest_of("a\ud800") != digest_of("a")
    kept = Kept()
    kept.note("j", b"1" * 32)
    kept.note("j", b"1" * 32)
    with pytest.raises(AuditError):
        kept.note("j", b"2" * 32)
