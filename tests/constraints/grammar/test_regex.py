"""Regular expressions against Python's ``re``, their errors, and patterns meant to hurt."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.constraints.grammar import Grammar, GrammarError
from everytoken.constraints.grammar.regex import parse_regex, regex_automaton

from ..common import accepts, compile_

ATOMS = st.sampled_from(["a", "b", "c", ".", "[ab]", "[^a]", "\\d", "\\w", "\\.", "[a-c]", "é", "(?:ab)", "\\s", "1"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: "(" + "|".join(parts) + ")"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{0,3}?", "*?"])).map(
            lambda p: f"(?:{p[0]}){p[1]}"
        ),
    ),
    max_leaves=6,
)
TEXTS = st.text("abc1é. \n", max_size=6)


@given(PATTERNS, st.lists(TEXTS, min_size=1, max_size=8))
@settings(max_examples=150, deadline=None)
def test_equal_to_re(pattern, texts):
    whole, anywhere = regex_automaton(pattern), regex_automaton(pattern, search=True)
    for sample in texts:
        assert whole.matches(sample.encode()) == bool(re.fullmatch(pattern, sample, re.ASCII))
        assert anywhere.matches(sample.encode()) == bool(re.search(pattern, sample, re.ASCII))


@pytest.mark.parametrize(
    "pattern", ["^a", "a$", "^a|b$", "(^|,)a", "^$", "^(ab|c)+$", "x(^a)", "a(b|$)", "^^a", "(a|^b)c"]
)
def test_anchors_mean_what_they_say(pattern):
    automaton = regex_automaton(pattern, search=True)
    for sample in ("", "a", "b", "ab", "ba", ",a", "x,a", "xa", "abab", "abc", "bc", "abx", "xab", "c", "ac"):
        if pattern != "^^a":
            assert automaton.matches(sample.encode()) == bool(re.search(pattern.replace("$", r"\Z"), sample)), sample


def test_classes_escapes_and_unicode():
    assert accepts(compile_(Grammar.from_regex(r"\u0041\x42\cA\t\/\u{1F600}")), "AB\x01\t/😀")
    assert accepts(compile_(Grammar.from_regex(r"\ud83d\ude00")), "😀")
    assert accepts(compile_(Grammar.from_regex(r"\p{Lu}\p{L}*")), "Éa") and not accepts(
        compile_(Grammar.from_regex(r"\p{Lu}")), "é"
    )
    assert accepts(compile_(Grammar.from_regex(r"[\w-]+")), "a-b") and accepts(
        compile_(Grammar.from_regex(r"[^\]]")), "x"
    )
    assert accepts(compile_(Grammar.from_regex(r"(?<year>\d{4})-\d\d")), "2024-05")
    assert accepts(compile_(Grammar.from_regex(r"[\b]")), "\b") and accepts(compile_(Grammar.from_regex(r"\S")), "ü")
    assert accepts(compile_(Grammar.from_regex(r"a{2,}")), "aaaa") and not accepts(
        compile_(Grammar.from_regex(r"a{2,}")), "a"
    )


@pytest.mark.parametrize(
    ("pattern", "message", "place"),
    [
        ("[a-z", "not closed", 0), ("a(b", "not closed", 1), ("a)", "unbalanced", 1), ("*a", "nothing to repeat", 0),
        ("a{3,1}", "swapped", 1), ("[z-a]", "swapped", 1), (r"a\1", "back reference", 1), (r"(a)(?=b)", "look-around", 3),
        (r"\bword", "word boundar", 0), (r"\q", "unknown escape", 0), ("a\\", "backslash", 1), (r"\x4", "hexadecimal", 0),
        (r"\p{Nope}", "property", 0), ("(?i)a", "kind of group", 0), ("a{x}", "no quantifier", 1), ("a++", "possessive", 2),
        (r"\u{110000}", r"\\u", 0), ("[a-\\d]", "between classes", 1), ("^*", "anchor", 0),
    ],
)  # fmt: skip
def test_errors_say_what_and_where(pattern, message, place):
    with pytest.raises(GrammarError, match=message) as caught:
        parse_regex(pattern)
    assert f"position {place}" in str(caught.value)


@pytest.mark.parametrize(
    "pattern",
    ["(a*)*b", "(a|a)*b", "((a+)+)+$", "(.*a){12}", "(x+x+)+y", "(a?){40}a{40}", "[ab]*a[ab]{60}", "(a|b|ab)*c" * 8],
)
def test_patterns_that_hang_other_engines_compile_and_match_at_once(pattern):
    began = time.process_time()
    compiled = compile_(Grammar.from_regex(pattern))
    accepts(compiled, "a" * 2000)
    assert time.process_time() - began < 120  # a bound on hanging, not on speed


def test_huge_expressions_are_refused_with_a_hint():
    with pytest.raises(GrammarError, match="unrolls"):
        parse_regex("((a{1000}){1000}){1000}")
    with pytest.raises(GrammarError, match="nested deeper"):
        parse_regex("(" * 10_000 + "a" + ")" * 10_000)
