"""A change calls for the experiments of the methods that it touches; one to a floor for all in turn."""

from __future__ import annotations

from .selection import (
    ROTATION,
    THIRDS,
    changed_since,
    commits,
    files_of,
    long_pages,
    reproducible,
    rotating,
    select,
    source_of,
)


def test_a_room_calls_for_its_own_method_only():
    assert select(["src/everytoken/generation/dyspec.py"], 0) == {"dyspec"}
    assert select(["src/everytoken/catalog/cards/tdpo.toml", "README.md"], 0) == {"tdpo"}
    assert select(["src/everytoken/reproduce/dyspec.py"], 3) == {"dyspec"}
    assert select(["README.md", "docs/concepts.md"], 0) == set()


def test_what_methods_share_calls_for_all_of_them():
    chosen = select(["src/everytoken/preference/trainer.py"], 0)
    assert {"tdpo", "tgdpo", "t-reg", "cdpo"} <= chosen
    assert "dyspec" not in chosen


def test_what_more_methods_share_than_a_turn_has_counts_as_a_floor():
    assert len(select(["src/everytoken/reproduce/base.py"], 0)) == ROTATION


def test_a_floor_calls_for_eight_and_later_turns_for_the_others():
    names = reproducible()
    turns = [select(["src/everytoken/core/logprobs.py"], turn) for turn in range(len(names))]
    assert {len(chosen) for chosen in turns} == {ROTATION}
    assert set().union(*turns[: -(-len(names) // ROTATION)]) == set(names)
    assert select(None, 2) == turns[2]


def test_files_are_those_of_the_tree():
    for slug in reproducible():
        assert any("/reproduce/" in path for path in files_of(slug))
    assert changed_since("HEAD") is not None
    assert changed_since("no-such-revision") is None
    assert commits() > 0


def test_a_long_page_runs_when_it_changed_and_in_turn():
    names = ["README.md", "docs/a.md", "docs/b.md"]
    assert long_pages(["docs/b.md", "src/everytoken/core/logprobs.py"], 0, names) == {"docs/b.md", "README.md"}
    assert [long_pages(None, turn, names) for turn in range(3)] == [{name} for name in names]
    assert long_pages(names, 1, names) == set(names)


def test_rotating_tests_run_with_their_source_and_in_turn():
    tests = [f"tests/generation/test_dyspec.py::test_{name}" for name in "abcdefg"]
    assert source_of("tests/generation/test_dyspec.py") == "src/everytoken/generation/dyspec"
    assert source_of("tests/test_second_model.py") == "src/everytoken/second_model"
    for path in ("src/everytoken/generation/dyspec.py", "src/everytoken/generation/dyspec/tree.py", tests[0][:31]):
        assert rotating([path], 0, tests) == set(tests), path
    turns = [rotating(["src/everytoken/generation/dyspec_tree.py"], turn, tests) for turn in range(THIRDS)]
    assert set().union(*turns) == set(tests) and sum(map(len, turns)) == len(tests)
    assert rotating(None, 1, tests) == turns[1]
