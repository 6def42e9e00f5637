"""What the experiments of the reinforcement station stand on: counted passes."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")

from everytoken.reinforcement.ulorl import SegmentedRollouts
from everytoken.reproduce.ulorl import GROUP, LIMIT, Clock, lengths_of


def test_passes_are_those_of_the_longest():
    lengths = [length for number in range(16) for length in lengths_of("heavy tail", number, 3)]
    clock, piece = Clock("heavy tail", 3), SegmentedRollouts(1, 0.0)
    written = piece([{"number": at // GROUP} for at in range(16 * GROUP)], clock.writer(0))
    assert sorted(map(len, written.completions)) == sorted(lengths) and clock.passes == max(lengths)
    clock, piece = Clock("equal lengths", 3), SegmentedRollouts(8, 0.0)
    piece([{"number": at // GROUP} for at in range(16 * GROUP)], clock.writer(0))
    assert clock.passes == LIMIT // 4 + 1  # two segments, of which one reads again
