"""Timelines by the sheet's numbers, against the formula, and at their limits."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from everytoken.core.errors import BadInputError
from everytoken.distributed.base import COMMUNICATION, COMPUTE, Link
from everytoken.distributed.measurement import MeasuredTimes, at
from everytoken.distributed.simulation import LayerTimes, Setting, pays_from, simulate, simulate_whole
from everytoken.distributed.splits import plan_split
from everytoken.distributed.timeline_picture import timeline_picture, timeline_trace


def layer(a, m, f):
    return LayerTimes(a, m, f, f)


@pytest.mark.parametrize(("f", "woven", "plain"), [(1, 31, 42), (4, 50, 78), (0, 30, 30)])
def test_steps_of_the_sheet(f, woven, plain):
    layers = [layer((2, 2), (3, 3), (f, f))] * 3
    assert simulate(layers).seconds == woven
    assert simulate_whole(layers).seconds == plain


def test_the_formula_and_what_no_step_beats():
    generator = random.Random(0)
    for _ in range(100):
        layers = [
            LayerTimes(*(tuple(generator.random() for _ in range(2)) for _ in range(4)))
            for _ in range(generator.randint(1, 5))
        ]
        expected, behind = 0.0, 0.0
        for one in layers:
            (a1, a2), (m1, m2) = one.attention, one.mlp
            (c1, c2), (f1, f2) = one.after_attention, one.after_mlp
            expected += max(a1, behind) + max(a2, c1) + max(m1, c2) + max(m2, f1)
            behind = f2
        timeline = simulate(layers)
        assert timeline.seconds == pytest.approx(expected + behind)
        free = simulate(layers, lockstep=False)
        least = max(timeline.busy(COMPUTE), timeline.busy(COMMUNICATION))
        assert least <= free.seconds + 1e-9 and free.seconds <= timeline.seconds + 1e-9
        assert timeline.seconds <= simulate_whole(layers).seconds + 1e-9
        for lane in (COMPUTE, COMMUNICATION):
            events = [event for event in timeline.events if event.lane == lane]
            assert all(one.stop <= two.start + 1e-12 for one, two in itertools.pairwise(events))
        assert timeline.exposed == pytest.approx(timeline.seconds - timeline.busy(COMPUTE))


class Linear:
    """A token takes a microsecond in each piece, and attention as much for a thousand keys; each call 30 more."""

    def attention(self, tokens, keys):
        return 3e-5 + 1e-6 * tokens * (1 + (keys - tokens / 2) / 1000)

    def mlp(self, tokens):
        return 3e-5 + 1e-6 * tokens

    def norm(self, rows):
        return 1e-8 * rows


def setting(bandwidth, latency=0.0, **changes):
    return Setting(Linear(), Link(latency, bandwidth), **{"world": 4, "hidden": 100, "itemsize": 2} | changes)


def test_bytes_of_a_link():
    link = Link(0.5, 100.0)
    assert link.seconds(8, 10, 2, 4) == pytest.approx(2 * (0.5 + 0.75 * 160 / 100))
    assert link.seconds(8, 10, 2, 4, reduce=False) == pytest.approx(0.5 + 0.75 * 160 / 100)
    assert link.seconds(8, 10, 2, 1) == 0
    assert Link(0.0, math.inf).seconds(8, 10, 2, 4) == 0
    for latency, bandwidth in ((-1, 1), (0, 0), (math.inf, 1), (0, math.nan)):
        with pytest.raises(BadInputError, match="latency"):
            Link(latency, bandwidth)


def test_it_pays_between_the_extremes():
    """A free link gains nothing, a slow one hides all compute and no more, and the most is between."""
    gains = {}
    for bandwidth in (math.inf, 1e9, 3e8, 1e8, 1e7, 1e4):
        own = setting(bandwidth)
        gains[bandwidth] = own.fused(2048).seconds / own.woven(2048, 1024).seconds
    assert gains[math.inf] < 1
    assert gains[1e4] == pytest.approx(1, abs=0.01)
    best = max(gains, key=gains.get)
    assert best not in (math.inf, 1e4) and gains[best] > 1.2


def test_the_planner_takes_the_time_of_keys_into_account():
    """In a long prompt part 2 attends to more, so the best cut gives it fewer tokens than the half."""
    own = setting(2e8, layers=1)
    cost = own.cost(4096)
    best = plan_split(4096, cost=cost)
    assert best.first > 2048
    assert cost(best.first, 0) == min(cost(first, 0) for first in range(128, 4096, 128))
    assert own.woven(4096, best.first).seconds < own.woven(4096, 2048).seconds


def test_where_weaving_stops_paying():
    own = setting(2e8, latency=1e-4)
    counts = [2**k for k in range(2, 14)]
    found = pays_from(own, counts)
    assert found in counts[1:]
    for count in counts:
        pays = own.woven(count, count // 2).seconds < own.fused(count).seconds
        assert pays == (count >= found)
    assert pays_from(setting(math.inf), counts) is None


def test_replicated_attention_is_exchanged_by_an_all_gather():
    whole, cut = setting(1e8, cut=False), setting(1e8)
    (one, two), (c1, c2) = whole.parts(1000, 400).after_attention, cut.parts(1000, 400).after_attention
    assert one < c1 and two < c2
    assert whole.parts(1000, 400).after_mlp == cut.parts(1000, 400).after_mlp
    assert whole.plain(1000).seconds < cut.plain(1000).seconds


def test_measured_times_between_points():
    curve = ((10.0, 1.0), (20.0, 3.0))
    assert [at(curve, size) for size in (0, 5, 10, 15, 20, 40)] == [0.0, 1.0, 1.0, 2.0, 3.0, 6.0]
    times = MeasuredTimes(curve, curve, curve, curve, ((200.0, 1.0), (400.0, 2.0)))
    assert times.attention(10, 10) == 2.0
    assert times.attention(10, 30) == 1.0 + 1.5
    assert times.slower(2).mlp(20) == 6.0


def test_what_is_refused():
    with pytest.raises(BadInputError, match="two parts"):
        simulate([layer((1,), (1,), (1,))])
    with pytest.raises(BadInputError, match="a time for each part"):
        layer((1, 2), (1,), (1, 2))
    with pytest.raises(BadInputError, match="0 s or more"):
        layer((1, -2), (1, 2), (1, 2))
    with pytest.raises(BadInputError, match="cannot be cut after 5"):
        setting(1e9).parts(5, 5)


def test_pictures_show_every_event_in_its_lane():
    timelines = {"plain": setting(1e8, layers=2).plain(1000), "<woven>": setting(1e8, layers=2).woven(1000, 400)}
    page = timeline_picture(timelines, "a <title>")
    assert "<title>" not in page and "<woven>" not in page
    assert page.count("<span") == sum(len(item.events) for item in timelines.values())
    longest = max(item.seconds for item in timelines.values())
    for timeline in timelines.values():
        trace = timeline_trace("t", timeline, longest)
        lanes = "".join(trace.texts).splitlines()
        assert [line.split()[0] for line in lanes] == ["compute", "communication"]
        assert len({len(line) for line in lanes}) == 1 and len(lanes[0]) <= 14 + 64 + 1
        drawn = [what for what in trace.columns["what"] if what]
        assert set(drawn) == {f"{event.kind} {event.part + 1}" for event in timeline.events if event.kind != "norm"} | (
            set(drawn) & {"norm 1"}
        )
