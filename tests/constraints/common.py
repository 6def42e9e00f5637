"""Small vocabularies and helpers of the constraint tests."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np

from everytoken.constraints.engine.compiler import GrammarCompiler
from everytoken.constraints.engine.matcher import GrammarMatcher
from everytoken.constraints.engine.vocabulary import TokenizerInfo
from everytoken.constraints.grammar import Grammar

from .oracle import ALPHABET

EOS = 256
BYTES = TokenizerInfo([bytes([byte]) for byte in range(256)] + [None], [EOS])
"""Every byte is a token."""

ABC = TokenizerInfo(
    [None] + ["".join(t).encode() for n in (1, 2, 3) for t in itertools.product(ALPHABET, repeat=n)], [0]
)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"}, "age": {"type": "integer", "minimum": 1, "maximum": 150}, "tags": {"type": "array", "items": {"enum": ["red", "rose"]}},
        "mail": {"type": "string", "pattern": "^[a-z]+@[a-z]+$"}, "more": {"type": "object", "properties": {"k": {"type": "null"}}, "additionalProperties": False},
    },
    "required": ["name", "age"], "additionalProperties": False,
}  # fmt: skip
PEOPLE = [
    {"name": 'Ann é "q" \\ 😀', "age": 31, "tags": ["red", "rose"], "mail": "a@b", "more": {"k": None}},
    {"name": "", "age": 7},
]


def compile_(grammar, info=BYTES):
    return GrammarCompiler(info, cache_limit=0, warm_seconds=0).compile_grammar(grammar)


def accepts(compiled, text):
    """Whether the whole text is in the language."""
    matcher = GrammarMatcher(compiled)
    return matcher.accept_string(text) and matcher.can_end()


def in_schema(schema, value, **options):
    text = value if isinstance(value, str) and options.pop("raw", False) else json.dumps(value, ensure_ascii=False)
    return accepts(compile_(Grammar.from_json_schema(schema, **options)), text)


def random_text(compiled, rng: random.Random, limit=400, stop=0.3):
    """A random member of the language, byte by byte; None if it has not ended after ``limit`` bytes."""
    matcher = GrammarMatcher(compiled)
    output = bytearray()
    while len(output) < limit:
        allowed = matcher.allowed_tokens()
        assert len(allowed), f"dead end after {bytes(output)!r}"
        if EOS in allowed and (len(allowed) == 1 or rng.random() < stop):
            return bytes(output)
        choices = [token for token in allowed.tolist() if token != EOS]
        closing = [token for token in choices if token in b'"}]']
        plain = [token for token in choices if 0x20 < token < 0x7F and token != 0x5C]
        pick = rng.choice(
            closing if closing and rng.random() < 0.25 else plain if plain and rng.random() < 0.9 else choices
        )
        assert matcher.accept_token(pick)
        output.append(pick)
    return None


def bits(row, size):
    return set(
        np.flatnonzero(np.unpackbits(np.asarray(row, np.int32).view(np.uint8), bitorder="little")[:size]).tolist()
    )


def encode(tokenizer, value):
    return tokenizer(json.dumps(value, ensure_ascii=False), add_special_tokens=False)["input_ids"]
