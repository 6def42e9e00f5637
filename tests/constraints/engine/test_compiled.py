"""A grammar compiled for a vocabulary: what is settled ahead and what when met, memory, serialised texts."""

from __future__ import annotations

import numpy as np
import pytest

from everytoken.constraints.engine.compiled import CompiledGrammar
from everytoken.constraints.engine.compiler import GrammarCompiler
from everytoken.constraints.engine.matcher import GrammarMatcher
from everytoken.constraints.grammar import Grammar
from everytoken.core.errors import BadInputError

from ..common import BYTES, PEOPLE, PERSON, compile_, encode


def test_warming_and_memory(info):
    compiled = GrammarCompiler(info, warm_seconds=0).compile_json_schema(PERSON)
    few = len(compiled._entries)
    compiled.warm()
    assert few < len(compiled._entries) == len(set(compiled.classes)) and compiled.memory_size_bytes > 10_000


def test_long_strings_share_entries(info):
    """A string of up to 2,000 characters has thousands of nodes, but hardly more entries than the longest token has
    bytes.
    """
    compiled = compile_(Grammar.from_json_schema({"type": "string", "maxLength": 2000}), info)
    assert compiled.pushdown.size > 20_000
    assert len(set(compiled.classes)) < 40 * (info.longest + 2)
    middle = len(set(compiled.classes[: compiled.pushdown.size // 2]))
    assert middle < 100


def test_contexts_ahead_of_time_say_what_is_found_when_met(info, embedded_tokenizer, monkeypatch):
    """Warmed on one thread, on several, not at all, or forgotten again and again: the masks are the same."""
    import everytoken.constraints.engine.compiled as module

    grammar = Grammar.builtin_json_grammar()
    cold = compile_(grammar, info)
    cold._entries.clear()
    alone = CompiledGrammar(cold.pushdown, info).warm()
    threads = CompiledGrammar(cold.pushdown, info).warm(max_threads=4)
    assert alone._entries.keys() == threads._entries.keys() == set(alone.classes)
    assert any(entry.deeper for entry in alone._entries.values()) and alone.warm() is alone
    forgetful = CompiledGrammar(cold.pushdown, info)
    matchers = [GrammarMatcher(compiled) for compiled in (cold, alone, threads, forgetful)]
    monkeypatch.setattr(module, "CONTEXTS", 1)
    for token in encode(embedded_tokenizer, PEOPLE[0]):
        masks = [matcher.allowed_tokens() for matcher in matchers]
        assert all(np.array_equal(masks[0], other) for other in masks[1:])
        assert all(matcher.accept_token(token) for matcher in matchers)


def test_serialised_grammars_keep_their_masks(person, info, embedded_tokenizer):
    again = CompiledGrammar.deserialise(person.serialise(), info)
    one, two = GrammarMatcher(person), GrammarMatcher(again)
    for token in encode(embedded_tokenizer, PEOPLE[0]):
        assert np.array_equal(one.allowed_tokens(), two.allowed_tokens())
        assert one.accept_token(token) and two.accept_token(token)
    with pytest.raises(BadInputError, match="another vocabulary"):
        CompiledGrammar.deserialise(person.serialise(), BYTES)
    text = person.serialise()
    for broken in ("", "{}", text[: len(text) // 2], text.replace("edge_to", "edge_of")):
        with pytest.raises(BadInputError, match="no serialised grammar"):
            CompiledGrammar.deserialise(broken, info)
