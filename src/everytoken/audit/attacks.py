"""Jobs of plain text, and what cheating providers bill for them: for training verifiers and for measuring audits.

``inflation`` is the number of forged tokens as a share of the genuine ones. Every attack but the last embeds what it
bills, as an honest provider does; the last makes up embeddings, which an auditor who never sees the text cannot notice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.errors import BadInputError
from ..core.rng import numpy_generator
from .base import Embedder, Leaf
from .coin import Auditor, CoIn, Report
from .provider import Provider, as_bytes
from .verifier import Scores, Verifier, score

ATTACKS = ("random words", "another job", "copies", "random words inside", "plausible text", "made-up embeddings")

ANSWER = 80
"""Words of the visible answer."""


@dataclass(frozen=True)
class Job:
    """A job: a prompt, a visible answer, hidden tokens as texts, and text that goes on after them."""

    id: str
    prompt: str
    answer: str
    tokens: tuple[str, ...]
    later: tuple[str, ...]


@dataclass
class Remembered:
    """An embedder that embeds every text once."""

    inner: Embedder

    def __post_init__(self) -> None:
        self.name, self.dimensions = self.inner.name, self.inner.dimensions
        self.kept: dict[str, np.ndarray] = {}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        missing = [text for text in dict.fromkeys(texts) if text not in self.kept]
        if missing:
            self.kept |= dict(zip(missing, self.inner(missing), strict=True))
        return (
            np.stack([self.kept[text] for text in texts]) if len(texts) else np.zeros((0, self.dimensions), np.float32)
        )


def example_documents() -> list[str]:
    """Documents of English prose that every Python brings: the topics of its help."""
    from pydoc_data.topics import topics

    found = []
    for name in sorted(topics):
        text = re.sub(r"[*`^~=\\_|+#>-]{2,}|\s+", " ", topics[name]).strip()
        if len(text.split()) >= 400:
            found.append(text)
    return found


def jobs_of(documents: Sequence[str], count: int, length: int, seed: int = 0) -> list[Job]:
    """Jobs cut from documents: the first 80 words are the answer, hidden tokens follow from a random place.

    Args:
        length: hidden words of a job; as many again follow as its ``later`` text.

    Raises:
        BadInputError: no document is long enough, or fewer than one job or token.
    """
    if count < 1 or length < 1:
        raise BadInputError(f"Jobs have one token at least, and there is one at least; got {count} of {length}.")
    split = [re.findall(r"\S+\s*", text) for text in documents]
    long = [words for words in split if len(words) >= 2 * length + ANSWER]
    if not long:
        raise BadInputError(f"No document has {2 * length + ANSWER} words.", "Ask for shorter jobs.")
    generator, jobs = numpy_generator(seed, "jobs"), []
    for number in range(count):
        words = long[int(generator.integers(len(long)))]
        start = int(generator.integers(ANSWER, len(words) - 2 * length + 1))
        hidden, later = words[start : start + length], words[start + length : start + 2 * length]
        answer = "".join(words[:ANSWER])
        jobs.append(Job(f"job-{seed}-{number}", f"Explain {words[0].strip()}.", answer, tuple(hidden), tuple(later)))
    return jobs


def billed(attack: str, job: Job, others: Sequence[Job], inflation: float, generator: np.random.Generator) -> list[str]:
    """The tokens that a cheating provider bills.

    Args:
        others: further jobs, which lend their words.

    Raises:
        BadInputError: an unknown attack, or no inflation.
    """
    if attack not in ATTACKS[:-1] or inflation <= 0:
        raise BadInputError(f"An attack is one of {', '.join(ATTACKS[:-1])}, with an inflation above 0.")
    forged = max(1, round(inflation * len(job.tokens)))
    strangers = [other for other in others if other.prompt != job.prompt] or list(others)
    if attack.startswith("random words"):
        pool = [token for other in strangers for token in other.tokens]
        added = [pool[place] for place in generator.integers(0, len(pool), forged)]
    elif attack == "another job":
        other = strangers[int(generator.integers(len(strangers)))].tokens
        added = [other[place % len(other)] for place in range(forged)]
    else:
        source = job.tokens if attack == "copies" else job.later
        added = [source[place % len(source)] for place in range(forged)]
    tokens = list(job.tokens)
    if not attack.endswith("inside"):
        return tokens + added
    for token, place in zip(added, generator.integers(0, len(tokens) + 1, forged), strict=True):
        tokens.insert(int(place), token)
    return tokens


def made_up(provider: Provider, job: Job, inflation: float, generator: np.random.Generator) -> list[Leaf]:
    """Leaves of the genuine tokens, and more whose embeddings are those of genuine blocks with a little noise."""
    embedder, block = provider.embedder, provider.block
    starts = range(0, len(job.tokens), block)
    blocks = np.asarray(embedder(["".join(job.tokens[start : start + block]) for start in starts]))
    tokens = np.asarray(embedder(job.tokens))
    total = len(job.tokens) + max(1, round(inflation * len(job.tokens)))
    block_rows, token_rows = [], []
    for number in range(-(-total // block)):
        source = number if (number + 1) * block <= len(job.tokens) else int(generator.integers(len(blocks)))
        vector = blocks[source]
        if number >= len(blocks):
            vector = vector + generator.normal(0, 0.02 / np.sqrt(len(vector)), len(vector))
        block_rows.append(vector / np.linalg.norm(vector))
        inside = tokens[source * block : (source + 1) * block]
        token_rows += [inside[place % len(inside)] for place in range(block)]
    block_bytes, token_bytes = as_bytes(np.stack(block_rows)), as_bytes(np.stack(token_rows))
    return [
        Leaf(job.id, place, place // block, generator.bytes(16), block_bytes[place // block], token_bytes[place])
        for place in range(total)
    ]


def rounds(
    tokens: Sequence[str], answer: str, embedder: Embedder, settings: CoIn, generator: np.random.Generator
) -> list[Scores]:
    """The scores that an audit of these tokens would see after each of its rounds."""
    limit = max(1, int(len(tokens) * settings.exposure))
    places = [int(place) for place in generator.permutation(len(tokens))[:limit]]
    blocks = [place // settings.block for place in places]
    texts = ["".join(tokens[block * settings.block : (block + 1) * settings.block]) for block in blocks]
    whole, single = (np.asarray(embedder(part)) for part in (texts, [tokens[place] for place in places]))
    whole, single = (vectors.astype(np.float16).astype(np.float32) for vectors in (whole, single))
    vector = np.asarray(embedder([answer]))[0]
    ends = [*range(settings.round_size, limit, settings.round_size), limit]
    return [score(blocks[:end], whole[:end], single[:end], vector) for end in ends]


def trained(
    embedder: Embedder,
    settings: CoIn,
    jobs: Sequence[Job],
    seed: int = 0,
    inflations: Sequence[float] = (0.5, 1.0, 2.0),
    report: Callable[[str, int, int], None] = lambda _stage, _done, _total: None,
) -> Verifier:
    """A verifier that learned from jobs and the paper's attacks on them, calibrated on a half that it has not seen.

    Args:
        jobs: eight at least; half of them calibrate.

    Raises:
        BadInputError: fewer jobs.
    """
    if len(jobs) < 8:
        raise BadInputError(f"A verifier needs eight jobs at least; got {len(jobs)}.")
    generator, half = numpy_generator(seed, "verifier"), len(jobs) // 2
    honest: list[Scores] = []
    inflated: list[Scores] = []
    for number, job in enumerate(jobs[:half]):
        report("scoring jobs to learn from", number, len(jobs))
        for attack in ATTACKS[:4]:
            tokens = billed(attack, job, jobs[:half], float(generator.choice(inflations)), generator)
            for texts, found in ((tokens, inflated), (job.tokens, honest)):
                looks = rounds(texts, job.answer, embedder, settings, generator)
                found.append(looks[int(generator.integers(len(looks)))])
    verifier = Verifier(settings.verifier, embedder.name).fit(honest, inflated, seed)
    worst = []
    for number, job in enumerate(jobs[half:]):  # an audit looks after every round: the worst of its looks counts
        report("scoring jobs to calibrate on", half + number, len(jobs))
        worst.append(max(rounds(job.tokens, job.answer, embedder, settings, generator), key=verifier.evidence))
    return verifier.calibrate(worst, settings.alpha)


def audited(
    attack: str | None,
    job: Job,
    others: Sequence[Job],
    inflation: float,
    embedder: Embedder,
    verifier: Verifier | None,
    settings: CoIn,
    generator: np.random.Generator,
) -> Report:
    """The report of a whole audit, with commitments, signatures and proofs, of an honest job or an attack on it."""
    provider = Provider(embedder, block=settings.block, exposure=settings.exposure)
    if attack is None:
        provider.commit(job.id, job.prompt, job.answer, job.tokens)
    elif attack == ATTACKS[-1]:
        provider.admit(job.id, job.prompt, job.answer, made_up(provider, job, inflation, generator))
    else:
        provider.commit(job.id, job.prompt, job.answer, billed(attack, job, others, inflation, generator))
    auditor = Auditor(embedder, provider.public_key, verifier, settings, nonce=lambda: generator.bytes(32))
    return auditor.audit(provider, job.id, job.prompt, job.answer)
