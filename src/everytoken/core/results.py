"""Claims, the intervals of what was measured, and verdicts.

A claim compares two arms of an experiment, or one arm with a bar. A verdict comes from the 95% interval of what was
measured, never from the sign of a median::

    holds          the interval lies on the claimed side of the bar
    contradicted   it lies on the other side
    undecided      it contains the bar, or the data give no interval

The bar is the paper's where the paper gives one, else the neutral value (a ratio of 1, a difference of 0).

Two things vary: the questions within a seed, and the seeds. Arms answer the same questions, so their values are paired.

- Questions are resampled within each seed, the same ones for both arms (a paired bootstrap; Efron and Tibshirani 1993).
- Seeds are resampled too where there are at least eight. Fewer cannot be: the means of three resampled seeds never
leave the range of the three, which holds the truth only three times in four. Their part of the interval is Student's.
- What seeds differ by because their questions differ should count once: the variance of the questions is taken out of
that of the seeds (Davison and Hinkley 1997, section 3.8), and the less so the fewer the seeds, for then both are
uncertain.
- Both parts add up as in Zou and Donner (2008, doi:10.1002/sim.3095): the distances from the estimate, in quadrature.
- Ratios are treated on the log scale, so the estimate is the geometric mean of the seeds' ratios.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np

from .errors import BadInputError
from .rng import numpy_generator

Values = float | Sequence[float]
"""One metric of one arm in one seed: a number, or one number a question (the same questions, in the same order, for all
arms).
"""
Arms = dict[str, dict[str, Values]]
"""One seed's measurements: arm -> metric -> values."""
Kind = Literal["ratio", "difference", "value"]
Verdict = Literal["holds", "contradicted", "undecided", "ran"]

LEVEL = 0.95
DRAWS = 10_000
ENOUGH = 8
"""So many values can be resampled; the interval of fewer is Student's."""
DECIDING = 6
"""With fewer questions that differ from the bar, no sign test reaches 95%: five of five happen by chance once in
sixteen.
"""
Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass
class Claim:
    """One claimed comparison.

    Attributes:
        metric: the metric's name in the arms.
        method, baseline: arm names; a claim of kind ``"value"`` has no baseline (``""``).
        paper: the paper's figure, as it states it.
        kind: ``"ratio"`` (method / baseline), ``"difference"`` (method - baseline) or ``"value"`` (the method against
            ``threshold``).
        higher_is_better: direction of the metric.
        threshold: the bar that the paper gives, in units of ``kind``: 2.0 for "at least twice", 1.02 with a metric
            that is better when lower for "less than 2% worse". None where it gives none.
        why: why our figure differs from the paper's (scale, hardware, data).

    Raises:
        BadInputError: an unknown kind, a value without a bar or with a baseline, a comparison without a baseline.
    """

    metric: str
    method: str
    baseline: str
    paper: str
    kind: Kind = "ratio"
    higher_is_better: bool = True
    threshold: float | None = None
    why: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("ratio", "difference", "value"):
            raise BadInputError(f"A claim is a ratio, a difference or a value; got {self.kind!r} ({self.metric}).")
        if self.kind == "value" and (self.threshold is None or self.baseline):
            raise BadInputError(
                f"The claim on {self.metric!r} is a value: it needs a threshold and has no baseline.",
                'Claim("recall", "HNSW", "", "0.95 and more", kind="value", threshold=0.95)',
            )
        if self.kind != "value" and not self.baseline:
            raise BadInputError(f"The claim on {self.metric!r} is a {self.kind}: it needs a baseline.")

    @property
    def bar(self) -> float:
        """What the interval is compared with."""
        return self.threshold if self.threshold is not None else neutral(self.kind)


class MeasuredClaim(TypedDict, total=False):
    """A claim as it stands in a result file. Files of 0.1 have no threshold, interval, verdict and note."""

    metric: str
    method: str
    baseline: str
    kind: Kind
    higher_is_better: bool
    threshold: float | None
    method_value: float
    baseline_value: float | None
    value: float | None
    interval: list[float | None] | None
    verdict: Verdict
    note: str
    by_seed: list[float | None]
    paper: str
    why: str


def neutral(kind: Kind) -> float:
    """The value of a comparison that finds no difference."""
    return 1.0 if kind == "ratio" else 0.0


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95% interval.

    Attributes:
        value: the estimate; NaN where it is not defined.
        low, high: the interval's ends; None where the data give no interval.
        note: why there is none, or what it does not cover.
        differing: questions whose value is not the bar's; None without values by question.
    """

    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    differing: int | None = None

    def verdict(self, bar: float, higher_is_better: bool = True) -> Verdict:
        """*holds*, *contradicted* or *undecided* against ``bar``."""
        if self.low is None or self.high is None or (self.differing is not None and self.differing < DECIDING):
            return "undecided"
        if self.low > bar:
            return "holds" if higher_is_better else "contradicted"
        if self.high < bar:
            return "contradicted" if higher_is_better else "holds"
        return "undecided"


def mean(values: Values) -> float:
    """The mean of a metric's values, or the one that it is."""
    return float(np.mean(np.asarray(values, dtype=np.float64)))


def paired_interval(
    method: Sequence[Values], baseline: Sequence[Values] | None = None, kind: Kind = "ratio", bar: float | None = None
) -> Interval:
    """The estimate of a comparison and its 95% interval.

    Args:
        method, baseline: a metric's values, one entry a seed; each a number, or ``[Q]`` with the same questions in
            both.
        bar: what the interval will be compared with; default the neutral value.

    Raises:
        BadInputError: no seed, or arms of different seeds or questions.
    """
    pairs = _pairs(method, baseline, kind)
    if not all(np.isfinite(pair).all() for pair in pairs):
        return Interval(math.nan, note="no interval: a seed measured a value that is not a finite number")
    bar = neutral(kind) if bar is None else bar
    singles = [_compare(pair.mean(1), kind) for pair in pairs]
    by_seed = np.array(singles)
    if kind == "ratio" and not np.isfinite(by_seed).all():
        means = np.mean([pair.mean(1) for pair in pairs], axis=0)
        value = float(means[0] / means[1]) if means[1] else math.nan
        return Interval(value, note="no interval: an arm's mean is not above zero, and a ratio needs both to be")
    centre = float(by_seed.mean())
    seeds = len(pairs)
    asked = all(pair.shape[1] > 1 for pair in pairs)
    differing = int(sum(np.count_nonzero(pair[0] != _at_bar(pair, kind, bar)) for pair in pairs)) if asked else None
    value = math.exp(centre) if kind == "ratio" else centre
    if seeds == 1 and not asked:
        return Interval(value, note="one measurement")
    if not asked and seeds < ENOUGH and np.ptp(by_seed) <= 1e-12 * max(1.0, abs(centre)):
        return Interval(value, note="every seed measured the same: as good as one measurement")
    below = above = within = 0.0
    if asked:
        below, above, within = _question_part(pairs, kind)
        if not math.isfinite(within):
            return Interval(value, note="no interval: a mean cannot be told from zero, and a ratio needs both above it")
    if seeds > 1:
        down, up = _seed_part(by_seed, within)
        below, above = math.hypot(below, down), math.hypot(above, up)
    low, high = centre - below, centre + above
    if kind == "ratio":
        low, high = math.exp(low), math.exp(high) if high < 700 else math.inf
    note = "one seed: the interval covers its questions only" if seeds == 1 else ""
    if differing is not None and differing < DECIDING:
        note = f"only {differing} questions tell the sides apart"
    return Interval(value, low, high, note, differing)


def measure(claim: Claim, runs: Sequence[Mapping[str, Mapping[str, Values]]]) -> MeasuredClaim:
    """A claim over the runs of all seeds: what both arms measured, the comparison, its interval and the verdict."""
    method = [run[claim.method][claim.metric] for run in runs]
    baseline = [run[claim.baseline][claim.metric] for run in runs] if claim.kind != "value" else None
    interval = paired_interval(method, baseline, claim.kind, claim.bar)
    by_seed = [
        _single(mean(a), None if baseline is None else mean(baseline[index]), claim.kind)
        for index, a in enumerate(method)
    ]
    return {
        "metric": claim.metric,
        "method": claim.method,
        "baseline": claim.baseline,
        "kind": claim.kind,
        "higher_is_better": claim.higher_is_better,
        "threshold": claim.threshold,
        "method_value": float(np.mean([mean(values) for values in method])),
        "baseline_value": None if baseline is None else float(np.mean([mean(values) for values in baseline])),
        "value": interval.value if math.isfinite(interval.value) else None,
        "interval": None if interval.low is None or interval.high is None else [interval.low, _finite(interval.high)],
        "verdict": interval.verdict(claim.bar, claim.higher_is_better),
        "note": interval.note,
        "by_seed": by_seed,
        "paper": claim.paper,
        "why": claim.why,
    }


def formatted(claim: MeasuredClaim) -> str:
    """A claim's measured value as text: ``1.83x``, ``1/1,200x``, ``+0.12`` or, against a bar, ``0.969``."""
    return number(claim.get("value"), claim["kind"])


def formatted_interval(claim: MeasuredClaim) -> str:
    """Its 95% interval as text, ``1.61 to 2.08x``; empty where there is none."""
    ends = claim.get("interval")
    if not ends:
        return ""
    low, high = (number(end, claim["kind"]) for end in ends)
    if claim["kind"] == "ratio" and low.endswith("x") and "/" not in low + high:
        low = low[:-1]
    return f"{low} to {high}"


def number(value: float | None, kind: Kind) -> str:
    """One end or estimate of a claim as text; None stands for a ratio without bound."""
    if value is None:
        return "no bound" if kind == "ratio" else "not defined"
    if kind == "difference":
        return f"{value:+.3g}"
    if kind == "value":
        return f"{value:.3g}"
    if 0 < value < 0.1:
        return f"1/{1 / value:,.0f}x" if value > 1e-9 else "0x"
    return f"{value:,.2f}x" if value < 100 else f"{value:,.0f}x"


# -- the parts of an interval
# --------------------------------------------------------------------------------------------
def _pairs(method: Sequence[Values], baseline: Sequence[Values] | None, kind: Kind) -> list[Array]:
    """One array ``[2, Q]`` a seed: the method's values and the baseline's (zeros for a claim on a value)."""
    if (baseline is None) != (kind == "value"):
        raise BadInputError(f"A {kind} is measured {'without' if kind == 'value' else 'against'} a baseline.")
    if not method or (baseline is not None and len(baseline) != len(method)):
        raise BadInputError("Both arms need the same seeds, at least one.")
    pairs = []
    for index, values in enumerate(method):
        ours = np.atleast_1d(np.asarray(values, dtype=np.float64))
        theirs = np.zeros_like(ours)
        if baseline is not None:
            theirs = np.atleast_1d(np.asarray(baseline[index], dtype=np.float64))
        if ours.ndim > 1 or ours.shape != theirs.shape or not ours.size:
            raise BadInputError(
                f"The arms of seed {index} have values of shapes {ours.shape} and {theirs.shape}.",
                "Give a number, or one value a question with the same questions for every arm.",
            )
        pairs.append(np.stack([ours, theirs]))
    return pairs


def _compare(means: Array, kind: Kind) -> Array:
    """``[2, ...] -> [...]``: difference, value, or logarithm of the ratio."""
    if kind != "ratio":
        return means[0] - means[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((means > 0).all(0), np.log(means[0]) - np.log(means[1]), np.nan)


def _single(method: float, baseline: float | None, kind: Kind) -> float | None:
    if baseline is None:
        return method
    if kind == "ratio":
        return method / baseline if baseline else None
    return method - baseline


def _at_bar(pair: Array, kind: Kind, bar: float) -> Array:
    """What the method's value of each question would be at the bar."""
    return bar * pair[1] if kind == "ratio" else pair[1] + bar


def _question_part(pairs: Sequence[Array], kind: Kind) -> tuple[float, float, float]:
    """Distances below and above the estimate, and the variance of one seed's estimate, that questions are good for.

    Returns NaN for all where more than one resample in two hundred has no ratio.
    """
    generator = numpy_generator(0, "questions")
    total, within, fewest, free = np.zeros(DRAWS), 0.0, min(pair.shape[1] for pair in pairs), 0
    for pair in pairs:
        count = pair.shape[1]
        drawn = np.concatenate(
            [
                pair[:, generator.integers(0, count, (part, count))].mean(2)
                for part in _chunks(DRAWS, max(1, 2_000_000 // count))
            ],
            axis=1,
        )
        found = _compare(drawn, kind) - _compare(pair.mean(1), kind)
        total, free = total + found, free + count - 1
        within += float(np.nanvar(found)) * count / (count - 1) / len(pairs)
        if np.isnan(found).mean() > 0.005:
            return math.nan, math.nan, math.nan
    total /= len(pairs)
    wider = math.sqrt(fewest / (fewest - 1))
    if fewest < ENOUGH:
        reach = student(free) * math.sqrt(within / len(pairs))
        return reach, reach, within
    wider *= student(free) / student(math.inf)
    low, high = np.nanquantile(total, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return max(0.0, -wider * float(low)), max(0.0, wider * float(high)), within


def _seed_part(by_seed: Array, within: float) -> tuple[float, float]:
    """Distances below and above the estimate that seeds are good for, beyond what their questions explain."""
    seeds = len(by_seed)
    between = float(by_seed.var(ddof=1))
    if not between:
        return 0.0, 0.0
    explained = (
        within * (seeds - 2) / (seeds - 1)
    )  # two seeds cannot tell their own variance from that of their questions
    share = math.sqrt(max(0.0, between - explained) / between)
    effects = share * (by_seed - by_seed.mean())
    if seeds < ENOUGH:
        reach = student(seeds - 1) * math.sqrt(float(effects.var(ddof=1)) / seeds)
        return reach, reach
    generator = numpy_generator(0, "seeds")
    drawn = effects[generator.integers(0, seeds, (DRAWS, seeds))].mean(1)
    wider = math.sqrt(seeds / (seeds - 1)) * student(seeds - 1) / student(math.inf)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return max(0.0, -wider * float(low)), max(0.0, wider * float(high))


def student(freedom: float) -> float:
    """The 97.5% point of Student's t: a table for few degrees of freedom, Cornish and Fisher's expansion for more."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)
    if freedom <= len(table):
        return table[int(freedom) - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _chunks(total: int, size: int) -> list[int]:
    return [min(size, total - first) for first in range(0, total, size)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
