"""The choice by the clock, with a clock of the test's own."""

from __future__ import annotations

from everytoken.core.pace import RETRY, Pace


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
