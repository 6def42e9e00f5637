"""Rewards of short answers at the points that their formulas fix."""

from __future__ import annotations

import pytest

from everytoken.core.errors import BadInputError
from everytoken.reduction.length_reward import at_most_length, efficiency, exact_length, length_reward


def test_exact_is_best_at_the_wanted_length():
    found = [exact_length(True, n, 10, 0.1) for n in range(21)]
    assert max(found) == found[10] == 1 and found[0] == found[20] == 0
    assert exact_length(False, 10, 10, 0.1) == 0


def test_at_most_never_leaves_zero_to_one():
    found = [at_most_length(True, n, 10, 0.2) for n in range(40)]
    assert all(0 <= value <= 1 for value in found) and found[10] == 0.5 and found[0] == 1 and found[39] == 0
    assert found == sorted(found, reverse=True)
    assert not any(at_most_length(False, n, 10, 0.2) for n in range(40))


def test_efficient_is_nothing_where_both_are_equal():
    assert efficiency(120, 120, 0.7, 0.7) == 0
    assert efficiency(60, 120, 0.7, 0.7) == 1 and efficiency(120, 120, 0.8, 0.7, 2) == pytest.approx(0.2)
    with pytest.raises(BadInputError, match="positive"):
        efficiency(0, 1, 1, 1)


def test_as_trl_calls_it():
    reward = length_reward("exact", wanted=4)
    columns = {"prompts": ["a"] * 2, "solution": ["12", 12], "trainer_state": None}
    assert reward(completions=["so 12.", "13"], completion_ids=[[0] * 4, [0] * 2], **columns) == [1, -0.5]
    chat = [[{"role": "assistant", "content": "It is 12"}]] * 2
    assert length_reward(wanted=4)(completions=chat, completion_ids=[[0] * 4, [0] * 6], **columns) == [0.5, 0]
    assert reward.__name__ == "exact_length_reward"
    with pytest.raises(BadInputError, match="'solution'"):
        reward(completions=["a"], completion_ids=[[1]])


@pytest.mark.parametrize("wrong", [{"kind": "short"}, {"wanted": 0}, {"alpha": -1.0}, {"delta": 2.0}])
def test_bad_settings(wrong):
    with pytest.raises(BadInputError):
        length_reward(**wrong)
