"""Intervals cover the truth as often as they say; pairing counts; data that cannot decide do not."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everytoken.core import results
from everytoken.core.errors import BadInputError
from everytoken.core.results import Claim, formatted, formatted_interval, mean, measure, paired_interval, student


@pytest.fixture
def fewer_draws(monkeypatch):
    monkeypatch.setattr(results, "DRAWS", 400)


def coverage(experiment, truth, kind, trials=200, seed=0):
    """How many of ``trials`` intervals contain ``truth``; ``experiment(rng) -> (method, baseline)``."""
    generator = np.random.default_rng(seed)
    hits = 0
    for _ in range(trials):
        found = paired_interval(*experiment(generator), kind)
        hits += found.low <= truth <= found.high
    return hits


def normal_seeds(seeds, questions, spread, effect=0.4):
    """Paired arms whose questions have variance 1 in their difference, and whose seeds differ by ``spread``."""

    def draw(generator):
        baseline = [generator.normal(size=questions) for _ in range(seeds)]
        shifts = generator.normal(effect, spread, seeds)
        return [b + s + generator.normal(size=questions) for b, s in zip(baseline, shifts, strict=True)], baseline

    return draw


# 200 trials at 95%: 190 are expected, with a standard deviation of 3.1
@pytest.mark.parametrize(
    ("seeds", "spread"), [(1, 0.0), (2, 0.0), (2, 0.3), (2, 3.0), (3, 0.0), (3, 0.16), (3, 3.0), (5, 0.16), (10, 0.5)]
)
@pytest.mark.slow
def test_intervals_of_differences_cover_the_truth(fewer_draws, seeds, spread):
    hits = coverage(normal_seeds(seeds, 40, spread), 0.4, "difference")
    assert hits >= 178


def test_one_seed_covers_as_often_as_it_says_and_no_more(fewer_draws):
    """An interval of everything would cover too: this one misses about one time in twenty."""
    hits = coverage(normal_seeds(1, 60, 0.0), 0.4, "difference", trials=500)
    assert 456 <= hits <= 492


@pytest.mark.parametrize(("seeds", "questions"), [(1, 60), (3, 60), (3, 1), (2, 1), (12, 1)])
def test_intervals_of_ratios_cover_the_truth(fewer_draws, seeds, questions):
    """Speeds: log-normal by question and by seed, the method 1.5 times as fast."""

    def draw(generator):
        base = np.exp(generator.normal(0, 0.3, (seeds, questions)))
        noise = np.exp(generator.normal(0, 0.2, (seeds, questions)))
        arms = 1.5 * base * noise, base
        return tuple(arm[:, 0].tolist() if questions == 1 else arm.tolist() for arm in arms)

    # the ratio of means where there are questions, the mean of the logarithms of ratios where there are none
    assert coverage(draw, 1.5 * (math.exp(0.2**2 / 2) if questions > 1 else 1.0), "ratio") >= 178


@pytest.mark.slow
def test_shares_of_right_answers_are_covered(fewer_draws):
    def draw(generator):
        easy = generator.random((3, 200))
        return [list((row < 0.6).astype(float)) for row in easy], [list((row < 0.5).astype(float)) for row in easy]

    assert coverage(draw, 0.1, "difference") >= 178


def test_pairing_matters():
    """The same values, questions matched or not: what questions share drops out only where they are matched."""
    generator = np.random.default_rng(3)
    hard = generator.normal(0, 5, 200)
    ours, theirs = hard + 0.3 + generator.normal(0, 0.1, 200), hard
    paired = paired_interval([ours], [theirs], "difference")
    apart = paired_interval([generator.permutation(ours)], [theirs], "difference")
    assert paired.value == pytest.approx(apart.value)
    assert paired.verdict(0.0) == "holds"
    assert apart.verdict(0.0) == "undecided"
    assert (apart.high - apart.low) > 20 * (paired.high - paired.low)
    ratio = paired_interval([np.exp(ours / 5)], [np.exp(theirs / 5)], "ratio")
    shuffled = paired_interval([np.exp(generator.permutation(ours) / 5)], [np.exp(theirs / 5)], "ratio")
    assert ratio.high - ratio.low < (shuffled.high - shuffled.low) / 5


def test_few_seeds_get_students_interval():
    values, base = [1.0, 2.0, 6.0], [0.0, 0.0, 0.0]
    found = paired_interval(values, base, "difference")
    half = 4.303 * np.std(values, ddof=1) / math.sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 3.0 - half, 3.0 + half))
    by_ratio = paired_interval([2.0, 8.0], [1.0, 1.0], "ratio")
    assert by_ratio.value == pytest.approx(4.0)  # the geometric mean
    assert by_ratio.low == pytest.approx(1 / by_ratio.high * 16)


def test_three_seeds_on_one_side_are_not_enough_by_themselves():
    """What the old verdict called 'every seed'."""
    assert paired_interval([0.1, 0.5, 2.0], [0.0] * 3, "difference").verdict(0.0) == "undecided"
    assert paired_interval([0.9, 1.0, 1.1], [0.0] * 3, "difference").verdict(0.0) == "holds"


@pytest.mark.parametrize("freedom", [1, 2, 5, 8, 12, 30, 200])
def test_students_point_agrees_with_scipy(freedom):
    stats = pytest.importorskip("scipy.stats")
    assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=3e-3)


# -- what cannot decide
# --------------------------------------------------------------------------------------------------
def test_one_pair_of_numbers_is_one_measurement():
    found = paired_interval([5.0], [1.0])
    assert found.value == pytest.approx(5.0)
    assert (found.low, found.note) == (None, "one measurement")
    assert found.verdict(1.0) == "undecided"


def test_equal_seeds_are_one_measurement():
    """A figure that no seed changes was measured once, however often."""
    found = paired_interval([3.0, 3.0], [1.0, 1.0], "difference")
    assert found.low is None
    assert "same" in found.note
    assert found.verdict(0.0) == "undecided"


def test_equal_arms_are_undecided():
    found = paired_interval([[1.0, 0.0] * 20] * 2, [[1.0, 0.0] * 20] * 2, "difference")
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert found.verdict(0.0) == found.verdict(0.0, higher_is_better=False) == "undecided"


def test_a_handful_of_questions_does_not_decide():
    few, enough = [1.0] * 5 + [0.0] * 20, [1.0] * 14 + [0.0] * 20
    found = paired_interval([few], [[0.0] * 25], "difference")
    assert found.verdict(0.0) == "undecided"
    assert "5 questions" in found.note
    assert paired_interval([enough], [[0.0] * 34], "difference").verdict(0.0) == "holds"
    assert paired_interval([[1.0, 1.0, 1.0]], [[0.0, 0.0, 0.0]], "difference").verdict(0.0) == "undecided"
    assert paired_interval([[1.0] * 8], [[0.0] * 8], "difference").verdict(0.0) == "holds"


def test_ratios_of_nothing_have_no_interval():
    zero = paired_interval([[1.0, 2.0] * 5], [[0.0, 0.0] * 5])
    assert (zero.low, zero.verdict(1.0)) == (None, "undecided")
    assert math.isnan(zero.value)
    none = paired_interval([0.0, 0.0], [3.0, 4.0])
    assert (none.value, none.low) == (0.0, None)
    negative = paired_interval([-1.0, -2.0], [3.0, 4.0])
    assert (negative.low, negative.verdict(1.0)) == (None, "undecided")


def test_a_baseline_that_may_be_zero_has_no_ratio():
    """Its mean is above zero, but a resample's often is not."""
    generator = np.random.default_rng(0)
    theirs = generator.normal(0, 1, 30)
    theirs += 0.05 - theirs.mean()
    found = paired_interval([theirs + 1], [theirs])
    assert found.low is None
    assert "zero" in found.note


def test_a_ratio_near_zero_stays_above_it():
    rare = [[1.0] * 8 + [0.0] * 392] * 2
    found = paired_interval(rare, [[1.0] * 200 + [0.0] * 200] * 2)
    assert found.value == pytest.approx(0.04)
    assert 0 < found.low < 0.04 < found.high < 0.2
    assert found.verdict(1.0, higher_is_better=False) == "holds"


def test_values_that_are_not_finite_are_said():
    claim = Claim("auc", "ours", "theirs", "better", kind="difference")
    found = measure(claim, [{"ours": {"auc": math.nan}, "theirs": {"auc": 0.5}}] * 3)
    assert found["verdict"] == "undecided"
    assert found["value"] is None
    assert "finite" in found["note"]


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12),
    seeds=st.integers(1, 3),
    kind=st.sampled_from(["difference", "ratio", "value"]),
)
def test_any_numbers_give_an_interval_around_the_estimate_or_none(values, seeds, kind):
    baseline = None if kind == "value" else [[abs(v) + 1.0 for v in values]] * seeds
    found = paired_interval([values] * seeds, baseline, kind)
    if found.low is not None:
        slack = 1e-9 * (1 + abs(found.value))
        assert found.low - slack <= found.value <= found.high + slack


def test_the_same_data_give_the_same_interval():
    data = [list(np.random.default_rng(1).normal(size=50))], [[0.0] * 50]
    assert paired_interval(*data, "difference") == paired_interval(*data, "difference")


def test_arms_must_match():
    with pytest.raises(BadInputError, match=r"\(3,\) and \(2,\)"):
        paired_interval([[1.0, 2.0, 3.0]], [[1.0, 2.0]])
    with pytest.raises(BadInputError, match="same seeds"):
        paired_interval([1.0, 2.0], [1.0])
    with pytest.raises(BadInputError, match="same seeds"):
        paired_interval([], [])
    with pytest.raises(BadInputError, match="against a baseline"):
        paired_interval([1.0], None)
    with pytest.raises(BadInputError, match="shapes"):
        paired_interval([[]], [[]])


# -- claims
# --------------------------------------------------------------------------------------------------------------
def claim_of(**changes):
    return Claim(**{"metric": "recall", "method": "ours", "baseline": "theirs", "paper": "better"} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "share"}, "ratio, a difference or a value"),
        ({"kind": "value", "baseline": ""}, "needs a threshold"),
        ({"kind": "value", "threshold": 0.9}, "has no baseline"),
        ({"kind": "difference", "baseline": ""}, "needs a baseline"),
    ],
)
def test_claims_that_say_nothing_are_refused(changes, message):
    with pytest.raises(BadInputError, match=message):
        claim_of(**changes)


def test_a_threshold_is_the_bar():
    runs = [{"ours": {"recall": [1.3, 1.5] * 10}, "theirs": {"recall": [1.0, 1.0] * 10}}]
    assert measure(claim_of(), runs)["verdict"] == "holds"
    assert measure(claim_of(threshold=1.2), runs)["verdict"] == "holds"
    assert measure(claim_of(threshold=1.4), runs)["verdict"] == "undecided"
    assert measure(claim_of(threshold=2.0), runs)["verdict"] == "contradicted"
    assert measure(claim_of(threshold=2.0, higher_is_better=False), runs)["verdict"] == "holds"


def test_a_value_is_compared_with_its_bar():
    """The claim on an index: 0.969 of the best tokens found, against 0.95 and not against an exact search's 1."""
    claim = claim_of(kind="value", baseline="", threshold=0.95)
    hits = [1.0] * 992 + [0.0] * 32
    found = measure(claim, [{"ours": {"recall": hits}}])
    assert found["value"] == pytest.approx(0.96875)
    assert found["verdict"] == "holds"
    assert found["baseline_value"] is None
    assert formatted(found) == "0.969"
    assert measure(claim, [{"ours": {"recall": hits[-512:]}}])["verdict"] == "undecided"
    assert measure(claim, [{"ours": {"recall": hits[-256:]}}])["verdict"] == "contradicted"
    assert measure(claim, [{"ours": {"recall": 0.969}}])["note"] == "one measurement"


def test_measured_claims_say_what_both_arms_measured():
    found = measure(claim_of(why="small"), [{"ours": {"recall": [2.0, 4.0]}, "theirs": {"recall": [1.0, 2.0]}}] * 2)
    assert (found["method_value"], found["baseline_value"], found["by_seed"]) == (3.0, 1.5, [2.0, 2.0])
    assert (found["paper"], found["why"], found["threshold"]) == ("better", "small", None)
    assert mean(2) == mean([1, 3]) == 2.0


@pytest.mark.parametrize(
    ("kind", "value", "interval", "texts"),
    [
        ("ratio", 1.834, [1.6, 2.1], ("1.83x", "1.60 to 2.10x")),
        ("ratio", 1 / 1200, [1 / 1500, 1 / 900], ("1/1,200x", "1/1,500x to 1/900x")),
        ("ratio", 250.0, [100.0, None], ("250x", "100 to no bound")),
        ("difference", -0.0123, [-0.02, 0.01], ("-0.0123", "-0.02 to +0.01")),
        ("value", 0.969, None, ("0.969", "")),
        ("ratio", None, None, ("no bound", "")),
    ],
)
def test_figures_as_text(kind, value, interval, texts):
    claim = {"kind": kind, "value": value, "interval": interval}
    assert (formatted(claim), formatted_interval(claim)) == texts


def test_results_load_without_torch():
    code = "import sys, everytoken.core.results; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
