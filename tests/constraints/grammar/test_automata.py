"""Automata: determinisation, products, tries, UTF-8, against Python's own sets and regular expressions."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.constraints.grammar import automata
from everytoken.constraints.grammar.automata import (
    Automaton,
    Builder,
    build,
    disjoint,
    is_deterministic,
    minimise,
    trie,
)
from everytoken.constraints.grammar.expressions import (
    LAST_CHAR,
    Alt,
    Bytes,
    Chars,
    GrammarError,
    Graph,
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


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(0, 3)), max_size=40))
def test_disjoint_ranges_keep_every_target(edges):
    edges = [(min(a, b), max(a, b), to) for a, b, to in edges]
    pieces = disjoint(edges)
    for byte in range(256):
        want = tuple(sorted({to for low, high, to in edges if low <= byte <= high}))
        got = [targets for low, high, targets in pieces if low <= byte <= high]
        assert got == ([want] if want else [])


def test_many_overlapping_edges_take_the_sweep():
    edges = [(low, low + 20, low % 5) for low in range(0, 200, 2)] + [(250, 255, 9)]
    pieces = disjoint(edges)
    for byte in range(256):
        found = [set(targets) for low, high, targets in pieces if low <= byte <= high]
        want = {to for low, high, to in edges if low <= byte <= high}
        assert found == ([want] if want else [])


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
