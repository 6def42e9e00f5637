"""Structural tags: free text, triggers, contents, ends."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.constraints.grammar import Grammar, GrammarError, StructuralTag
from everytoken.constraints.grammar.structural_tags import aho_corasick

from ..common import accepts, compile_

TAGS = [
    StructuralTag("<fn=add>", {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}, "</fn>"),
    StructuralTag("<fn=say>", Grammar.from_regex("[a-z]+"), "</fn>"),
]


def test_free_text_around_tags():
    compiled = compile_(Grammar.from_structural_tag(TAGS, ["<fn="]))
    for good in ("", "hello <b>é</b>", 'I call <fn=add>{"x": 3}</fn> and <fn=say>hi</fn>!', "<<fn=say>a</fn>", "a <fn"):
        assert accepts(compiled, good), good
    for bad in ("<fn=", "<fn=sub>", '<fn=add>{"x": "a"}</fn>', "<fn=say>hi", "x<fn=say>HI</fn>"):
        assert not accepts(compiled, bad), bad


def test_at_least_one_and_stop_after_first():
    some = compile_(Grammar.from_structural_tag(TAGS, ["<fn="], at_least_one=True))
    assert accepts(some, "a<fn=say>b</fn>c<fn=say>d</fn>") and not accepts(some, "abc")
    first = compile_(Grammar.from_structural_tag(TAGS, ["<fn="], stop_after_first=True))
    assert accepts(first, "abc") and accepts(first, "a<fn=say>b</fn>") and not accepts(first, "a<fn=say>b</fn>c")
    one = compile_(Grammar.from_structural_tag(TAGS, ["<fn="], at_least_one=True, stop_after_first=True))
    assert accepts(one, "a<fn=say>b</fn>") and not accepts(one, "a")


def test_several_triggers():
    tags = [
        StructuralTag("[call]", Grammar.from_choices(["x"]), ";"),
        StructuralTag("{{", Grammar.from_choices(["y"]), "}}"),
    ]
    compiled = compile_(Grammar.from_structural_tag(tags, ["[call]", "{{"]))
    assert accepts(compiled, "[cal [call]x;{ {{y}} [c[call]x;") and not accepts(compiled, "[call]y;")


@given(
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3, unique=True), st.text("abc", max_size=12)
)
@settings(max_examples=200)
def test_aho_corasick_notices_the_first_trigger(words, sample):
    if any(a != b and a in b for a in words for b in words):
        return
    goto, completed = aho_corasick([word.encode() for word in words])
    state, seen = 0, None
    for place, byte in enumerate(sample.encode()):
        state = goto[state].get(byte, 0)
        if state in completed:
            seen = (place + 1, completed[state].decode())
            break
    found = [match for word in words if (match := re.search(re.escape(word), sample))]
    first = min(((m.end(), m[0]) for m in found), default=None)
    assert seen == first


@pytest.mark.parametrize(
    ("tags", "triggers", "message"),
    [
        ([], ["<"], "at least one tag"), (TAGS, [], "at least one"), (TAGS, [""], "empty"), (TAGS, ["<fn=", "fn"], "part of another"),
        (TAGS, ["<fn=", "[x"], "starts no tag"), (TAGS, ["<fn=add"], "No trigger starts"),
    ],
)  # fmt: skip
def test_bad_tags(tags, triggers, message):
    with pytest.raises(GrammarError, match=message):
        Grammar.from_structural_tag(tags, triggers)
