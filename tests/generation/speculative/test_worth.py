"""What a node must be worth, with costs and chances that can be worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everytoken.generation.speculative.worth import LONGEST_REST, Worth, default_cost


def line(slope):
    return lambda tokens: 1 + slope * (tokens - 1)


@given(
    chances=st.lists(st.floats(0, 1), max_size=12).map(lambda values: sorted(values, reverse=True)),
    costs=st.lists(st.floats(0, 0.5), min_size=12, max_size=12),
)
def test_the_kept_nodes_gain_most(chances, costs):
    def cost(tokens):
        return 1 + sum(costs[: tokens - 1])

    worth = Worth(cost)
    gains = [sum(chances[:count]) - worth.rate * cost(1 + count) for count in range(len(chances) + 1)]
    assert gains[worth.nodes(chances)] == pytest.approx(max(gains))


def test_a_step_in_the_curve_is_taken_as_a_whole():
    """Nodes that do not pay one by one may pay together, where a forward of many tokens costs no more than of two."""
    worth = Worth(lambda tokens: 1.0 if tokens == 1 else 1.5)
    assert worth.nodes([0.3]) == 0
    assert worth.nodes([0.3, 0.3, 0.3]) == 3


def test_nodes_below_their_marginal_cost_are_left_out():
    worth = Worth(line(0.2))
    assert worth.nodes([0.9, 0.5, 0.21, 0.19, 0.01]) == 3


def test_the_rate_never_falls_below_plain_decoding():
    worth = Worth(line(0.5))
    for _ in range(50):
        worth.add(8, 2, 4.0, 0)
    assert worth.rate == 1.0
    assert worth.belief < 0.2
    assert worth.nodes([0.5, 0.4]) == 0


def test_better_rounds_make_it_pickier():
    worth = Worth(line(0.1))
    assert worth.nodes([0.15]) == 1
    for _ in range(50):
        worth.add(4, 0, 4.0, 4)
    assert worth.rate > 2
    assert worth.nodes([0.15]) == 0


def test_a_draft_that_fails_rests_longer_and_longer_and_comes_back():
    worth = Worth(line(0.05), draft_cost=0.2)
    took_part = []
    for _ in range(200):
        took_part.append(worth.rested())
        worth.add(4 if took_part[-1] else 0, 3 if took_part[-1] else 0, 1.0, 0)
    assert took_part[0]
    assert sum(took_part[100:]) <= 100 / LONGEST_REST * 4
    assert any(took_part[150:])
    for _ in range(40):  # it is good now
        took_part.append(worth.rested())
        worth.add(4, 3 if took_part[-1] else 0, 1.0, 4 if took_part[-1] else 0)
    assert all(took_part[-20:])


def test_reading_again_is_paid_for():
    chances = [0.3]
    assert Worth(line(0.05)).nodes(chances) == 1
    assert Worth(line(0.05), rereads=True).nodes(chances) == 0
    assert Worth(line(0.05), rereads=True).nodes([0.95]) == 1


def test_draft_forwards_are_asked_where_they_can_pay():
    """Behind a node of chance v half of v comes, less a node's cost; all together must come to a draft forward's."""
    worth = Worth(line(0.05), draft_cost=0.1)
    assert worth.asks([0.5, 0.2, 0.1]) == [True, True, False]
    assert worth.asks([0.29, 0.05]) == [False, False]
    assert worth.asks([]) == []


def test_no_node_below_the_floor_is_kept():
    worth = Worth(line(0.2), widest=6)
    for accepted in (3, 0, 2, 4, 1):
        worth.begin()
        assert worth.nodes([worth.floor * 1.01]) == 1
        assert worth.nodes([worth.floor * 0.99] * 6) == 0
        worth.add(4, 1, 2.0, accepted)


def test_default_costs():
    assert default_cost("cpu")(1) == default_cost("cuda")(1) == 1
    assert default_cost("cpu")(9) == pytest.approx(1.4)
    assert default_cost("cuda")(9) == pytest.approx(1.08)
