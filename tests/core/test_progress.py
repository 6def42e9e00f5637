"""The one progress callback."""

from __future__ import annotations

from everytoken.core.progress import silent, within


def test_a_part_is_reported_under_its_stage():
    seen = []

    def report(*step):
        seen.append(step)

    within(report, "annotating")("scoring rows", 2, 3)
    within(report, "asking", 3, 6)("scoring rows", 2, 3)
    assert seen == [("annotating", 2, 3), ("asking", 5, 6)]
    assert silent("anything", 0, 0) is None
