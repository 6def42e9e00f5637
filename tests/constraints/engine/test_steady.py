"""Tokens inside free text, known beforehand, against looking at each of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from everytoken.constraints.engine import steady
from everytoken.constraints.engine.vocabulary import TokenizerInfo
from everytoken.constraints.grammar import Grammar

from ..common import compile_

PIECES = [b"a", b"b", b" ", b"xyz", b'"', b'",', b'": ', b"\\", b"n", b"\n", "é".encode(), "😀".encode()]
PIECES += ["é".encode()[:1], "é".encode()[1:], "😀".encode()[:3], b"\xff", b"7", b"]", b"}"]
TOKENS = [*{b"".join(t) for n in (1, 2, 3) for t in itertools.product(PIECES, repeat=n)}, b"a" * 9, b'b"' * 5]
INFO = TokenizerInfo([*TOKENS, None], [len(TOKENS)])
SCHEMAS = {
    "a free string": {"type": "string"},
    "lengths": {"type": "string", "minLength": 2, "maxLength": 5},
    "a short string": {"type": "string", "maxLength": 4},
    "a pattern": {"type": "string", "pattern": "^[^x]{2,4}$"},
    "blocks of characters": {"type": "string", "maxLength": 3_000},
    "an object": {
        "type": "object", "required": ["a"],
        "properties": {"a": {"type": "string"}, "b": {"type": "string", "maxLength": 4}, "ab": {"enum": ["xyz", "x"]}},
    },
    "anything": True,
}  # fmt: skip
GRAMMARS = {
    "free text up to a mark": r'root ::= [^\n]* "\n" root | "a"',
    "a run that may end, and letters behind it": 'root ::= part "a" | part "]"\npart ::= [^"]{0,3} | part2\npart2 ::= "7"',
    "a run, and a letter of the same kind behind it": 'root ::= [^"]{2} "b"',
    "two ways from one character": 'root ::= [^"]{3} "b" | "a" [^"]{1} "]"',
    "a rule called inside a run": 'root ::= "a" middle [^"]{2} "\\""\nmiddle ::= [^"] other | "b"\nother ::= "7" middle?',
    "a run that is called": 'root ::= text "\\"" root | "7"\ntext ::= [^"]*',
}


def same_tokens(compiled):
    """How many nodes need no look at all tokens; all of them get the entries that they get otherwise."""
    known = 0
    for node in {group: node for node, group in enumerate(compiled.classes)}.values():
        if compiled._runs.known(node) is None:
            continue
        known += 1
        mine, theirs = compiled._settle_node(node), compiled._settle(None, [[node]])[0]
        assert np.array_equal(mine.mask(), theirs.mask())
        assert mine.count == theirs.count
        depends = [sorted(entry.part.token_ids.tolist()) if entry.part else [] for entry in (mine, theirs)]
        assert depends[0] == depends[1]
    return known


@pytest.mark.parametrize("name", SCHEMAS)
def test_strings_of_schemas(name, monkeypatch):
    monkeypatch.setattr(steady, "MANY", 1)
    assert same_tokens(compile_(Grammar.from_json_schema(SCHEMAS[name]), INFO))


@pytest.mark.parametrize("name", GRAMMARS)
def test_runs_of_grammars(name, monkeypatch):
    monkeypatch.setattr(steady, "MANY", 1)
    same_tokens(compile_(Grammar.from_ebnf(GRAMMARS[name]), INFO))


def test_a_vocabularys_free_text_is_found_once_and_few_kinds_are_kept(monkeypatch):
    monkeypatch.setattr(steady, "MANY", 1)
    monkeypatch.setattr(steady, "KINDS", 2)
    info = TokenizerInfo(INFO.vocabulary, INFO.stop_token_ids)
    made = []
    original = steady._made
    monkeypatch.setattr(steady, "_made", lambda *args: made.append(args) or original(*args))
    for pattern in ("^[^a]*$", "^[^a]*aa$", "^[^b]*$", "^[^7]*$"):
        assert same_tokens(compile_(Grammar.from_json_schema({"type": "string", "pattern": pattern}), info))
    assert len(made) == 3
    assert len(info.__dict__["_free_texts"]) == 2


def test_what_a_token_holds_before_its_first_other_character():
    inside = [byte != ord('"') for byte in range(128)]
    for token, size in ((b"ab", 2), (b'ab"c', 2), ("é".encode() + b'"', 2), (b"a\xc3", 1), (b"\xa9a", 0), (b"", 0)):
        assert steady.beginning(token, inside) == size
    assert steady.beginning(b"a\xed\xa0\x80", inside) == 1  # a surrogate is no character
