"""Products of automata against Python's own sets and regular expressions."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everytoken.constraints.grammar.automata import build, is_deterministic, minimise, trie
from everytoken.constraints.grammar.expressions import GrammarError, Repeat, alt, seq, star, text
from everytoken.constraints.grammar.json_schema.strings_and_numbers import canonical_text
from everytoken.constraints.grammar.products import combine, difference, intersection

from .test_automata import SAMPLES, WORDS

LETTERS = alt(text("a"), text("b"), text("c"))


@given(WORDS, WORDS)
def test_products_are_set_operations(first, second):
    both, only = intersection(trie(first), trie(second)), difference(trie(first), trie(second))
    for sample in {*first, *second, *SAMPLES}:
        assert both.matches(sample) == (sample in first and sample in second)
        assert only.matches(sample) == (sample in first and sample not in second)
    assert both.empty == (not set(first) & set(second))


@given(WORDS, st.integers(0, 3), st.integers(0, 3))
def test_without_words_is_the_difference(words, least, more):
    """Of finite and of infinite languages, as the general product gives it after minimising."""
    first = minimise(build(Repeat(LETTERS, least, None if more == 3 else least + more)))
    listed = trie(words)
    quick, slow = difference(first, listed), combine(first, listed, lambda a, b: a and not b)
    oracle = re.compile(rb"[abc]{%d,%s}" % (least, b"" if more == 3 else b"%d" % (least + more)))
    for sample in {*words, *SAMPLES}:
        assert quick.matches(sample) == (bool(oracle.fullmatch(sample)) and sample not in words)
    assert quick.empty == slow.empty
    if not quick.empty:
        assert is_deterministic(quick)
        assert len(minimise(quick)) == len(slow)


def test_all_texts_but_some_names_is_the_same_language():
    names = ["name", "names", "näme", "", "a\\\\b"]
    listed = trie([name.encode() for name in names])
    quick = difference(canonical_text(), listed)
    slow = combine(canonical_text(), listed, lambda a, b: a and not b)
    assert len(minimise(quick)) == len(slow)
    assert combine(quick, slow, lambda a, b: a != b).empty
    assert not any(quick.matches(name.encode()) for name in names)
    assert quick.matches(b"nam") and quick.matches(b"namesx")


def test_an_automaton_that_is_not_deterministic_is_refused():
    pattern = seq(star(alt(text("a"), text("b"))), text("a"), Repeat(alt(text("a"), text("b")), 18, 18))
    automaton = build(pattern)
    with pytest.raises(GrammarError, match="too complex"):
        intersection(automaton, automaton)
    with pytest.raises(GrammarError, match="too complex"):
        difference(automaton, trie([b"a"]))
