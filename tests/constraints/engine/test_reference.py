"""The kernels against the readable reference: masks, single tokens, texts, ends, rollbacks and forks on random
grammars.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from everytoken.constraints.engine.matcher import GrammarMatcher
from everytoken.constraints.engine.reference import START, ReferenceMatcher, can_end, close, read
from everytoken.constraints.engine.vocabulary import TokenizerInfo
from everytoken.constraints.grammar import Grammar, GrammarError
from everytoken.core.errors import BadInputError, EverytokenError

from ..common import ABC, compile_
from ..oracle import ebnf, grammars, productive

PIECES = [
    b"a",
    b"b",
    b"z",
    b'"',
    b"\\",
    b"\n",
    b"7",
    b"\xc3",
    b"\xa9",
    "é".encode(),
    "漢".encode(),
    b"\xe6\xbc",
    b"\xf0",
    "😀".encode(),
]
MIXED = TokenizerInfo(
    [None, *PIECES, *(a + b for a, b in itertools.product(PIECES, repeat=2)), b"zzzz", b"abab", b"zzzz"], [0], 222
)
"""Characters, halves of characters, pairs of both, a token twice, and padding rows."""


def check(matcher, reference, rng, steps):
    """A random walk of both; everything that can be asked is compared after each step."""
    info, taken = reference.info, 0
    for _ in range(steps):
        allowed = reference.allowed_tokens()
        assert matcher.allowed_tokens().tolist() == allowed
        assert [token for token in range(-1, info.vocab_size + 1) if matcher.accepts(token)] == allowed
        assert matcher.is_terminated() == reference.is_terminated()
        assert matcher.can_end() == reference.can_end()
        assert matcher.find_jump_forward_string() == reference.find_jump_forward_string()
        text = b"".join(info.vocabulary[token] or b"" for token in rng.choices(range(len(info.vocabulary)), k=3))
        assert matcher.longest_prefix(text) == reference.longest_prefix(text)
        action = rng.random()
        if action < 0.2 and taken:
            back = rng.randint(1, taken)
            matcher.rollback(back)
            reference.rollback(back)
            taken -= back
        elif action < 0.3:
            matcher, reference = matcher.fork(), reference.fork()
        elif action < 0.4 and text:
            accepted = matcher.accept_string(text)
            assert accepted == reference.accept_string(text)
            taken += accepted
        elif action < 0.5 or not allowed:
            token = rng.randrange(info.vocab_size)
            accepted = matcher.accept_token(token)
            assert accepted == reference.accept_token(token)
            taken += accepted
        else:
            token = rng.choice(allowed)
            assert matcher.accept_token(token) and reference.accept_token(token)
            taken += 1
    with pytest.raises(BadInputError, match=f"only {taken} have"):
        matcher.rollback(taken + 1)


def compare(source, info, rng, steps):
    try:
        compiled = compile_(source, info)
    except GrammarError as error:
        assume("left-recursive" not in str(error) and "No text" not in str(error))
        raise
    try:
        check(GrammarMatcher(compiled), ReferenceMatcher(compiled.pushdown, info), rng, steps)
    except EverytokenError as error:  # the documented refusal of grammars with thousands of parses alive
        assert "so ambiguous" in str(error)


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(grammars(), st.randoms(use_true_random=False))
def test_random_grammars(trees, rng):
    assume(productive(trees))
    compare(ebnf(trees), ABC, rng, 8)


@pytest.mark.rotating
@settings(max_examples=1200, suppress_health_check=list(HealthCheck))
@given(grammars(), st.randoms(use_true_random=False))
def test_many_random_grammars(trees, rng):
    assume(productive(trees))
    compare(ebnf(trees), ABC, rng, 12)


PARTS = st.tuples(
    st.sampled_from(["[a-y]", "[a-z]", '[^"]', "[^]", "[^\\x00-\\x7f]", "é", "ab", "(?:[a-z]{3})"]),
    st.sampled_from(["", "?", "*", "+", "{2,5}", "{0,9}"]),
)


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(st.lists(PARTS, min_size=1, max_size=4), st.booleans(), st.randoms(use_true_random=False))
@pytest.mark.slow
def test_random_character_runs(parts, nested, rng):
    """Long runs, where the kernels accept whole subtrees; nested, where tokens leave a rule and depend on its caller."""
    pattern = "".join(item + times for item, times in parts)
    run = Grammar.from_regex(f"(?:{pattern})")
    if not nested:
        compare(run, MIXED, rng, 6)
        return
    frame = Grammar.from_ebnf('root ::= "a" root "z" | "b" root "7" | "\\""')
    compare(Grammar.concat(frame, run, frame), MIXED, rng, 6)


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        {"type": "object", "additionalProperties": {"enum": ["a", "bz", 7]}},
        {"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"},
    ],
)
@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False))
def test_schemas(schema, rng):
    pieces = [bytes([byte]) for byte in range(0x20, 0x7F)] + [
        b'"}',
        b'"]',
        b"],[",
        b'","',
        b"]]",
        b'": "',
        b'{"a":',
        b"\xc3",
        b"\xa9",
    ]
    compare(Grammar.from_json_schema(schema), TokenizerInfo([None, *pieces], [0]), rng, 8)


def test_the_reference_itself_by_hand():
    """root ::= "a" root "b" | "c": the stacks are what they should be."""
    tables = compile_('root ::= "a" root "b" | "c"', ABC).pushdown.tables
    state = read(tables, START, b"aa")
    assert [len(stack) for stack in state] == [2]  # one caller waits; the next one is called when the stacks are closed
    assert sorted(len(stack) for stack in close(tables, state)) == [2, 3]
    inside = read(tables, state, b"c")
    assert [len(stack) for stack in inside] == [3]
    assert not can_end(tables, inside) and can_end(tables, read(tables, inside, b"bb"))
    assert not read(tables, inside, b"bbb") and not read(tables, state, b"b")
