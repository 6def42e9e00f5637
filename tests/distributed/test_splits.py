"""Cuts by the sheet's numbers, and the planner against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from everytoken.core.errors import BadInputError, UnknownNameError
from everytoken.distributed.splits import (
    PUBLISHED,
    check_table,
    cut_requests,
    offset_of,
    offset_table,
    plan_split,
    rounded,
    waves,
)


@pytest.mark.parametrize(
    ("tokens", "table", "first", "second"),
    [(1024, None, 512, 512), (1025, None, 640, 385), (6144, None, 3072, 3072), (6145, "llama-3.3-70b-w8", 3456, 2689),
     (8192, "llama-3.3-70b-w8", 4352, 3840)],
)  # fmt: skip
def test_cuts_of_the_sheet(tokens, table, first, second):
    split = plan_split(tokens, table)
    assert (split.first, split.second, split.woven) == (first, second, True)
    assert split.pads == (first, rounded(tokens, 256) - first)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tables_keep_enough_for_the_second_part(name):
    worst = min((split.second / split.tokens, split.tokens) for split in (plan_split(n, name) for n in NUMBERS))
    assert worst[0] >= 0.375
    if name.startswith("mixtral"):
        assert worst[1] == 3073


NUMBERS = [*range(1024, 5_000), *range(5_000, 70_000, 61)]


def test_short_steps_are_not_cut():
    split = plan_split(1023, world=8)
    assert (split.first, split.woven, split.pads) == (1023, False, (1024, 0))
    assert plan_split(1023, first=1).woven
    assert plan_split(64, cost=lambda a, b: 0.0, minimum=2).woven is False  # no multiple of 128 inside


def test_a_tie_between_keys_takes_the_smaller():
    assert offset_of({10: 1, 20: 2}, 15) == 1
    assert offset_of({20: 2, 10: 1}, 15) == 1
    assert offset_of({10: 1, 20: 2}, 16) == 2


def test_requests_of_the_sheet():
    one, two = cut_requests([700, 324], [10, 20], 512)
    assert (one.queries, one.keys) == ([512], [522])
    assert (two.queries, two.keys) == ([188, 324], [710, 344])
    assert (one.requests, two.requests) == ([0], [0, 1])
    assert plan_split(1024, new=[700, 324], cached=[10, 20]).parts == (one, two)


def test_every_token_is_in_one_part():
    generator = np.random.default_rng(0)
    for _ in range(200):
        new = generator.integers(1, 9, int(generator.integers(1, 6))).tolist()
        cached = generator.integers(0, 9, len(new)).tolist()
        first = int(generator.integers(1, sum(new) + 1))
        parts = cut_requests(new, cached, first)
        assert sum(parts[0].queries) == first
        seen = np.zeros(len(new), int)
        for part in parts:
            for request, queries, keys in zip(*part, strict=True):
                seen[request] += queries
                assert keys == cached[request] + seen[request]  # a token attends to all before it
        assert seen.tolist() == new


def test_the_planner_of_the_sheet():
    def cost(first, second):
        return waves(first, 7168) + waves(second, 7168)

    assert (waves(1280, 7168), cost(640, 640), cost(512, 768)) == (5, 6, 5)
    split = plan_split(1280, cost=cost)
    assert (split.first, split.second) == (512, 768)
    best = min(cost(first, 1280 - first) for first in range(128, 1280, 128))
    assert cost(split.first, split.second) == best


def test_the_planner_is_brute_force():
    generator = np.random.default_rng(1)
    for tokens in (1024, 1500, 3001):
        costs = {first: float(generator.random()) for first in range(128, tokens, 128)}
        split = plan_split(tokens, cost=lambda first, _second, costs=costs: costs[first])
        assert costs[split.first] == min(costs.values())


def test_a_table_from_costs_cuts_as_the_planner_does():
    def cost(tokens):
        return lambda first, second: waves(first, 7168) + waves(second, 7168) + 0 * tokens

    table = offset_table(cost, (1024, 1280, 2048))
    for key in table:
        assert plan_split(key, table).first == plan_split(key, cost=cost(key)).first
    assert table[1280] == -128


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"tokens": 0}, "A step has tokens"), ({"tokens": 9, "first": 9}, "cannot be cut after 9"),
     ({"tokens": 1, "first": 1}, "one token"), ({"tokens": 9, "first": 0}, "cannot be cut after 0"),
     ({"tokens": 2000, "first": 3, "table": {1: 0}}, "one of them"), ({"tokens": 2000, "table": {}}, "an entry"),
     ({"tokens": 2000, "table": {2000: 1024}}, "cannot be cut"), ({"tokens": 2000, "align": 3}, "even padding"),
     ({"tokens": 4, "first": 2, "new": [1, 2]}, "The requests have 3"),
     ({"tokens": 4, "first": 2, "new": [4, 0]}, "one new"),
     ({"tokens": 1, "minimum": 1}, "minimum")],
)  # fmt: skip
def test_what_is_refused(arguments, words):
    with pytest.raises(BadInputError, match=words):
        plan_split(**arguments)


def test_tables_that_miss_a_step_are_refused_before_it():
    with pytest.raises(UnknownNameError, match=r"llama-3\.3-70b-w8"):
        check_table("llama-3.3-70b", 1024, 256)
    for name in PUBLISHED:
        check_table(name, 1024, 256)
    with pytest.raises(BadInputError, match="100 tokens would be cut after 128"):
        check_table(None, 100, 256)
    with pytest.raises(BadInputError, match="3073 tokens would be cut"):
        check_table({2048: 0, 4096: 2000}, 1024, 256)
