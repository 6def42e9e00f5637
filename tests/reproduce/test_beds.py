"""Test beds keep their contract, and a positive control says by its interval whether a bed can decide."""

from __future__ import annotations

import pytest
from rich.console import Console

from everytoken.catalog.cards import load_catalog
from everytoken.core.errors import UnknownNameError
from everytoken.reproduce.base import execute
from everytoken.reproduce.beds.base import BEDS, Bed, can_decide, control, find_bed

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERYTOKEN_CACHE", str(tmp_path / "cache"))


class Coin:
    """A bed whose models are numbers: the share of questions that they answer."""

    name = "coin"
    summary = "a coin"
    metric = "right"
    bounds = (0.2, 0.8)

    def __init__(self, start, helped):
        self.starts, self.helped, self.measured = start, helped, 0

    def start(self, context):
        return self.starts, None

    def rows(self, context):
        return [context.seed]

    def measure(self, context, model):
        self.measured += 1
        return {"right": [float(index < 100 * model) for index in range(100)]}

    def positive_control(self, context):
        return self.helped


@pytest.mark.parametrize(
    ("start", "helped", "verdicts"),
    [
        (0.5, 0.75, ["holds", "holds", "holds"]),
        (0.5, 0.52, ["undecided", "holds", "holds"]),  # two questions do not show that anything helps
        (0.5, 0.3, ["contradicted", "holds", "holds"]),
        (0.18, 0.6, ["holds", "undecided", "holds"]),  # at chance
        (0.85, 1.0, ["holds", "holds", "undecided"]),  # near the ceiling
    ],
)
def test_a_control_says_whether_a_bed_can_decide(start, helped, verdicts):
    bed = Coin(start, helped)
    assert isinstance(bed, Bed)
    result = execute(control(bed, seeds=1), console=QUIET)
    assert [claim["verdict"] for claim in result["claims"]] == verdicts
    assert can_decide(result) == (set(verdicts) == {"holds"})
    assert (result["name"], bed.measured) == ("bed-coin", 2)


def test_the_scoreboard_shows_what_controls_said():
    from everytoken.reproduce.scoreboard import scoreboard

    good, bad = (execute(control(Coin(0.5, helped), seeds=1), console=QUIET) for helped in (0.75, 0.52))
    page = scoreboard([], [good, bad])
    assert "| coin: a coin | right 0.5 | 0.75 | +0.25 |" in page
    ends = [line.rsplit("|", 2)[1].strip() for line in page.splitlines() if line.startswith("| coin")]
    assert ends == ["yes", "no"]
    assert "Test beds" not in scoreboard([])


@pytest.mark.parametrize("name", BEDS)
def test_beds_keep_the_contract(name):
    bed = find_bed(name)
    assert isinstance(bed, Bed)
    assert bed.name == name
    assert bed.summary
    low, high = bed.bounds
    assert low < high
    experiment = control(bed)
    assert [claim.metric for claim in experiment.claims] == [bed.metric] * 3


def test_experiments_name_beds_that_exist():
    named = {card.load_reproduction().bed for card in load_catalog().values() if card.reproduction} - {""}
    assert named == set(BEDS)


def test_an_unknown_bed_is_named_with_its_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean sums"):
        find_bed("sum")


def test_sums_are_the_same_for_every_arm_and_differ_by_seed():
    from everytoken.reproduce.base import Context
    from everytoken.reproduce.beds.sums import SumsBed, correct, questions

    assert questions(0, "test", 5) == questions(0, "test", 5)
    assert not set(questions(0, "test", 20)) & set(questions(1, "test", 20))
    bed = SumsBed()
    rows = bed.rows(Context(0, "quick"))
    assert rows == bed.rows(Context(0, "quick")) != bed.rows(Context(1, "quick"))
    assert all(correct(prompt, answer) for prompt, answer in rows)
    ids, labels = next(bed.batches(Context(0), "base", 4))
    assert ids.shape == labels.shape
    assert (labels == -100).any()
