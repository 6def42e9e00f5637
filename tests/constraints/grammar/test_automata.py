"""Automata: determinisation, products, tries, UTF-8, against Python's own sets and regular expressions."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.constraints.grammar import automata
from everytoken.constraints.grammar.automata import Builder, build, is_deterministic, minimise, trie, trim
from everytoken.constraints.grammar.automaton import Automaton, arrays
from everytoken.constraints.grammar.expressions import (
    LAST_CHAR,
    Alt,
    Bytes,
    Chars,
    GrammarError,
    Graph,
    Ref,
    Repeat,
    alt,
    expression_size,
    intersect_ranges,
    invert_ranges,
    merge_ranges,
    optional,
    seq,
    star,
    text,
    utf8_sequences,
)

WORDS = st.lists(st.binary(max_size=4).map(lambda b: bytes(x % 3 + 97 for x in b)), min_size=1, max_size=12)
SAMPLES = [b"", b"a", b"b", b"c", b"ab", b"aab", b"abc", b"cab", b"aaaa", b"abab", b"cccc", b"bca"]
RANGES = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)).map(lambda p: (min(p), max(p))), max_size=5)


@given(WORDS)
def test_a_trie_is_the_set_of_its_words_and_shares_tails(words):
    automaton = trie(words)
    for sample in [*words, *SAMPLES]:
        assert automaton.matches(sample) == (sample in set(words))
    assert len(minimise(automaton)) == len(automaton)


@given(RANGES, RANGES)
def test_range_arithmetic(first, second):
    def members(ranges):
        return {code for low, high in ranges for code in range(low, high + 1)}

    assert members(merge_ranges(first)) == members(first)
    assert members(invert_ranges(first, 400)) == set(range(401)) - members(first)
    assert members(intersect_ranges(first, second)) == members(first) & members(second)


NAMES = ["x", "y"]
MACHINES = st.integers(1, 6).flatmap(
    lambda size: st.tuples(
        st.just(size),
        st.lists(st.tuples(*[st.integers(0, size - 1)] * 2, *[st.integers(97, 100)] * 2), max_size=12),
        st.lists(st.tuples(st.integers(0, size - 1), st.sampled_from(NAMES), st.integers(0, size - 1)), max_size=4),
        st.lists(st.tuples(*[st.integers(0, size - 1)] * 2), max_size=5),
        st.sets(st.integers(0, size - 1)),
    )
)
SYMBOLS = [97, 98, 99, 100, *NAMES]


def made(size, edges, calls, empties, _finals):
    builder = Builder()
    builder.state(size - 1)
    for source, to, one, other in edges:
        builder.edge(source, min(one, other), max(one, other), to)
    for call in calls:
        builder.call(*call)
    for move in empties:
        builder.empty(*move)
    return builder


def language(starts, step, final, longest=4):
    """All texts of symbols up to a length; ``step(states, symbol)`` leads on."""
    found, waiting = set(), [((), starts)]
    for text_, states in waiting:
        if final(states):
            found.add(text_)
        if len(text_) < longest and states:
            waiting += [((*text_, symbol), step(states, symbol)) for symbol in SYMBOLS]
    return found


def language_of(automaton):
    def step(states, symbol):
        return {
            to
            for state in states
            for *label, to in (automaton.calls if isinstance(symbol, str) else automaton.edges)[state]
            if (label == [symbol] if isinstance(symbol, str) else label[0] <= symbol <= label[1])
        }

    return language({0}, step, lambda states: any(automaton.finals[state] for state in states))


def language_of_moves(size, edges, calls, empties, finals):
    """By the definition, with sets."""

    def closed(states):
        while True:
            more = states | {to for source, to in empties if source in states}
            if more == states:
                return states
            states = more

    def step(states, symbol):
        read = {to for source, to, a, b in edges if source in states and symbol in range(min(a, b), max(a, b) + 1)}
        return closed(read | {to for source, name, to in calls if source in states and name == symbol})

    return language(closed({0}), step, lambda states: bool(states & finals))


@given(MACHINES)
@settings(max_examples=200)
@pytest.mark.slow
def test_determinising_trimming_and_minimising_keep_the_language(machine):
    want = language_of_moves(*machine)
    subsets = made(*machine).determinise(-1, finals=machine[-1])
    assert is_deterministic(subsets) and language_of(subsets) == want
    for calls in subsets.calls:
        assert len({name for name, _ in calls}) == len(calls)
    small = minimise(trim(subsets))
    assert language_of(small) == want
    states = range(len(small))
    # no two states of the minimal automaton go on alike, and every one is needed
    rows = {(frozenset(language_from(small, state)), small.finals[state]) for state in states}
    assert len(rows) == len(small)
    assert language_of(trim(small)) == want and len(trim(small)) == len(small)


def language_from(automaton, state):
    """What a deterministic automaton accepts from a state on, up to its number of states."""
    found, waiting = set(), [((), state)]
    for text_, here in waiting:
        if automaton.finals[here]:
            found.add(text_)
        if len(text_) < 5:
            waiting += [((*text_, name), to) for name, to in automaton.calls[here]]
            waiting += [((*text_, byte), to) for a, b, to in automaton.edges[here] for byte in range(a, b + 1)]
    return found


@given(MACHINES)
def test_lists_and_arrays_say_the_same(machine):
    automaton = made(*machine).determinise(-1, finals=machine[-1])
    lists = Automaton(automaton.edges, automaton.calls, automaton.finals)
    again = arrays(lists)
    assert (again.edges, again.calls, again.finals) == (lists.edges, lists.calls, lists.finals)
    assert (lists.separable, lists.opens, lists.regular) == (again.separable, again.opens, again.regular)
    ways_on = [[*edges, *calls] for edges, calls in zip(lists.edges, lists.calls, strict=True)]
    ends = [state for state, final in enumerate(lists.finals) if final]
    one_end = len(ends) == 1 and ends[0] != 0 and not ways_on[ends[0]]
    assert again.separable == (one_end and all(to != 0 for ways in ways_on for *_, to in ways))
    assert again.called() == {name for calls in lists.calls for name, _ in calls}


def test_edges_that_lead_alike_are_one():
    automaton = build(alt(*(text(letter) for letter in "abcdefgh")))
    assert automaton.edges == [[(97, 104, 1)], []]


def test_unproductive_calls_go():
    automaton = build(alt(seq(Ref("good"), text("a")), seq(Ref("bad"), text("b"))))
    kept = trim(automaton, {"good"}.__contains__)
    assert kept.calls[0] == [("good", kept.calls[0][0][1])] and len(kept) == len(automaton) - 1


@given(st.characters(exclude_categories=["Cs"]), st.integers(0, LAST_CHAR), st.integers(0, LAST_CHAR))
@settings(max_examples=300)
def test_utf8_ranges_match_exactly_the_encodings(char, a, b):
    low, high = min(a, b), max(a, b)
    encoded = char.encode()
    matched = any(
        len(sequence) == len(encoded)
        and all(lo <= byte <= hi for (lo, hi), byte in zip(sequence, encoded, strict=True))
        for sequence in utf8_sequences(((low, high),))
    )
    assert matched == (low <= ord(char) <= high)


def test_utf8_leaves_surrogates_out():
    automaton = build(Chars(((0, LAST_CHAR),)))
    assert (
        not automaton.matches(b"\xed\xa0\x80")
        and automaton.matches("\ud7ff".encode())
        and automaton.matches("\ue000".encode())
    )
    assert utf8_sequences(((0xD800, 0xDFFF),)) == ()


def test_repetitions_and_optional_parts_do_not_leak():
    automaton = build(seq(star(text("a")), optional(text("b")), star(text("a")), text("c")))
    for sample in ("c", "aac", "abac", "bc", "aabaac"):
        assert automaton.matches(sample.encode())
    for sample in ("", "bb", "abba", "abbc", "a"):
        assert not automaton.matches(sample.encode())
    bounded = build(Repeat(alt(text("ab"), text("a")), 2, 4))
    for count in range(6):
        assert bounded.matches(b"a" * count) == (2 <= count <= 4)
    assert bounded.matches(b"abaab") and not bounded.matches(b"abb")
    nested = build(Repeat(Repeat(text("a"), 0, 2), 3, 3))
    assert all(nested.matches(b"a" * n) == (n <= 6) for n in range(9))


def test_copies_of_an_automaton_are_separable_or_not():
    unit = build(alt(text("ab"), text("cd")))
    assert unit.separable
    assert build(Repeat(unit, 2, 3)).matches(b"abcdab") and not build(Repeat(unit, 2, 3)).matches(b"ab")
    loop = build(star(text("a")))
    assert not loop.separable and build(seq(Repeat(loop, 5, 5), text("b"))).matches(b"aaab")


def test_graphs():
    graph = Graph(3, ((0, text("a"), 1), (1, text("b"), 1), (1, text("c"), 2)), frozenset({2}))
    automaton = build(graph)
    assert automaton.matches(b"abbc") and not automaton.matches(b"ab") and not automaton.matches(b"c")


def test_determinisation_gives_up_in_time_and_stays_right():
    pattern = seq(star(alt(text("a"), text("b"))), text("a"), Repeat(alt(text("a"), text("b")), 18, 18))
    automaton = build(pattern)
    assert not is_deterministic(automaton) and len(automaton) < 200
    oracle = re.compile(b"[ab]*a[ab]{18}")
    for sample in (b"a" * 19, b"b" * 19, b"ab" * 10, b"ba" * 15, b"a" * 18):
        assert automaton.matches(sample) == bool(oracle.fullmatch(sample))


def test_too_many_states_are_refused(monkeypatch):
    monkeypatch.setattr(automata, "MAX_STATES", 20_000)
    builder = Builder()
    with pytest.raises(GrammarError, match="automaton states"):
        for _ in range(3):
            builder.add(Bytes(b"a" * 9_000), 0)


def test_sizes_are_estimates_with_a_limit():
    assert expression_size(text("abc"), {}, 100) == 3
    assert expression_size(Repeat(text("abc"), 0, 10**9), {}, 100) == 100
    assert expression_size(Alt(tuple(text(str(n)) for n in range(1000))), {}, 50) == 50


def test_the_empty_automaton_accepts_nothing():
    assert Automaton([[]], [[]], [False]).empty and not build(Alt(())).matches(b"")
