"""Patterns with a length: against the pattern and the length apart."""

from __future__ import annotations

import itertools
import re

import pytest

from everytoken.constraints.grammar import Grammar, GrammarError
from everytoken.constraints.grammar.counting import counted
from everytoken.constraints.grammar.json_text import CANONICAL, inner, spell
from everytoken.constraints.grammar.regex import regex_automaton

from ..common import accepts, compile_

PATTERNS = ["^a*b$", "^(aa)*$", "^[^b]+$", "b", "^(a|bb)*$", "^a{2,4}$", "^é+a?$", '^(\\n|")*$', "^(au0000b|\\u0000b)$"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_counts_are_those_of_the_characters(pattern):
    automaton = regex_automaton(pattern, True, CANONICAL, spell)
    python = pattern.replace("$", r"\Z")  # Python's $ also stands before a last line break
    texts = ["".join(t) for n in range(6) for t in itertools.product('abé\n"', repeat=n)] + ["au0000b", "\0b"]
    for low, high in ((0, 3), (2, 4), (3, 3), (2, None), (0, 0), (4, 2)):
        bounded = counted(automaton, low, high)
        for text in texts:
            expected = bool(re.search(python, text)) and low <= len(text) <= (len(text) if high is None else high)
            assert bounded.matches(inner(text)) == expected, (pattern, low, high, text)


@pytest.mark.parametrize(
    ("name", "text", "limit"), [("email", "{}@b.c", 255), ("uri", "http://{}", 2048), ("hostname", "{}", 253)]
)
def test_formats_with_a_length(name, text, limit):
    compiled = compile_(Grammar.from_json_schema({"type": "string", "format": name, "maxLength": limit}))
    longest = ".".join(["a" * 61] * 4) if name == "hostname" else "a" * limit
    longest = longest[: limit - len(text) + 2]
    assert accepts(compiled, '"' + text.format(longest) + '"')
    over = text.format(longest + "b" * (limit + 1 - len(text.format(longest))))
    assert len(over) == limit + 1 and not accepts(compiled, '"' + over + '"')


def test_far_too_many_states_are_refused_with_a_bound():
    with pytest.raises(GrammarError, match="Lower the bound to"):
        Grammar.from_json_schema({"type": "string", "format": "uri", "maxLength": 1_000_000})


@pytest.mark.parametrize(("low", "high"), [(0, 100_000), (70_000, 100_000), (3_000, 5_000), (40_000, None)])
def test_long_strings_are_counted_in_blocks(low, high):
    schema = {"type": "string", "minLength": low} | ({} if high is None else {"maxLength": high})
    compiled = compile_(Grammar.from_json_schema(schema))
    assert compiled.pushdown.size < 100_000
    for size in {0, low - 1, low, low + 1, (high or low) - 1, high or low, (high or low) + 1} - {-1}:
        assert accepts(compiled, '"' + "a" * size + '"') == (low <= size <= (size if high is None else high)), size
