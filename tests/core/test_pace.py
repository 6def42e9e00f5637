"""The choice by the clock, with a clock of the test's own."""

from __future__ import annotations

import pytest

from everytoken.core.pace import RETRY, SLOPE, Pace, RunningCurve


def test_the_pace_prefers_what_is_faster_and_comes_back_to_the_rest():
    pace, chosen = Pace((0, 4)), []
    for _ in range(400):
        way = pace.choose()
        chosen.append(way)
        pace.saw(way, 1 if way == 0 else 2, 1.0 if way == 0 else 3.0)
    assert chosen[:4] == [0, 0, 4, 4]
    retries = [place for place, way in enumerate(chosen[4:]) if way == 4]
    assert 1 < len(retries) < 400 / RETRY
    for _ in range(2000):  # drafts are accepted now
        way = pace.choose()
        pace.saw(way, 1 if way == 0 else 5, 1.0 if way == 0 else 3.0)
    assert pace.best == 4


def test_wider_ways_are_not_tried_where_a_narrow_one_lost_by_far():
    pace, chosen = Pace((0, 3, 7, 16)), set()
    for _ in range(60):
        way = pace.choose()
        chosen.add(way)
        pace.saw(way, 1, 1.0 + way)
    assert chosen == {0, 3}
    pace, chosen = Pace((0, 3, 7, 16)), set()
    for _ in range(60):
        way = pace.choose()
        chosen.add(way)
        pace.saw(way, 1, 1.0 + way / 100)
    assert chosen == {0, 3, 7, 16}


def test_a_curve_before_anything_was_measured_is_a_line():
    curve = RunningCurve()
    assert [curve(size) for size in (1, 2, 11, 200)] == pytest.approx([1, 1 + SLOPE, 1 + 10 * SLOPE, 1 + 199 * SLOPE])


def test_a_curve_goes_through_what_was_measured():
    curve = RunningCurve()
    for size, seconds in ((1, 2.0), (5, 4.0), (9, 10.0)):
        curve.saw(size, seconds)
    assert [curve(size) for size in (1, 3, 5, 7, 9)] == pytest.approx([1, 1.5, 2, 3.5, 5])
    assert curve(17) == pytest.approx(9)  # as steep as so far
    assert curve.step == 2.0
    curve.saw(12, 6.0)  # a lucky moment: more work is never cheaper
    assert curve(12) == pytest.approx(5)


def test_a_curve_without_a_first_size_takes_it_from_the_line():
    curve = RunningCurve()
    curve.saw(3, 1 + 2 * SLOPE)
    assert [curve(1), curve(3)] == pytest.approx([1, 1 + 2 * SLOPE])
    assert curve.step == pytest.approx(1.0)


def test_a_curve_believes_fast_measurements_and_forgets_slow_ones():
    curve = RunningCurve()
    for turn in range(400):
        for size, seconds in ((1, 1.0), (4, 2.0)):
            curve.saw(size, 5 * seconds if turn % 8 == 7 else seconds)  # now and then the machine is busy
    assert curve.step == pytest.approx(1.0, rel=0.25)
    assert curve(4) == pytest.approx(2.0, rel=0.25)
    for _ in range(200):  # now it is so for good
        curve.saw(1, 3.0)
    assert curve.step == pytest.approx(3.0, rel=0.1)
    assert curve(4) > 1.3  # the other sizes have changed with it
