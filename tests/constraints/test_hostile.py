"""Hostile and random input to the three parsers: an answer or a clear error, after a bounded amount of work.

Work is counted in automaton states and table entries, not in seconds.
"""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from everytoken.constraints.grammar import Grammar, GrammarError
from everytoken.constraints.grammar.automata import Builder
from everytoken.constraints.grammar.automaton import Automaton
from everytoken.core.errors import BadInputError

from .common import accepts, compile_

MAX_MADE = 2_000_000
"""States that may be made on the way, those thrown away again and those of refused grammars included."""
MAX_ENTRIES = 4_000_000
"""Nodes, edges and calls that the tables may have."""


class Made:
    """How many automaton states have been made while it is open."""

    def __enter__(self):
        self.count = 0
        self.patch = pytest.MonkeyPatch()
        for kind in (Automaton, Builder):
            self.patch.setattr(kind, "state", self.counted(kind.state))
        return self

    def counted(self, original):
        def state(*args):
            self.count += 1
            return original(*args)

        return state

    def __exit__(self, *error):
        self.patch.undo()


def bounded(make):
    """A compiled grammar or the error, after so much work and no more; tables of no more than so many entries."""
    with Made() as made:
        try:
            compiled = compile_(make())
        except BadInputError as error:
            assert len(str(error)) < 2000
            compiled = None
    assert made.count <= MAX_MADE
    if compiled is not None:
        tables = compiled.pushdown.tables
        assert compiled.pushdown.size + len(tables.edge_to) + len(tables.call_to) <= MAX_ENTRIES
    return compiled


def nested(depth, wrap):
    value = {"type": "null"}
    for _ in range(depth):
        value = wrap(value)
    return value


@pytest.mark.parametrize(
    "schema",
    [
        nested(10_000, lambda inner: {"type": "object", "properties": {"a": inner}}),
        nested(10_000, lambda inner: {"type": "array", "items": inner}),
        nested(3_000, lambda inner: {"anyOf": [inner]}),
        nested(3_000, lambda inner: {"allOf": [inner]}),
        {"$defs": {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}, {"$ref": f"#/$defs/d{n + 1}"}]} for n in range(60)} | {"d60": {"type": "null"}}, "$ref": "#/$defs/d0"},
        {"$defs": {f"d{n}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(60)} | {"d60": {"type": "null"}}, "$ref": "#/$defs/d0"},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"allOf": [{"anyOf": [{"minimum": n}, {"maximum": n}]} for n in range(30)]},
        {"type": "string", "minLength": 10**9}, {"type": "string", "maxLength": 10**9}, {"type": "array", "minItems": 10**9},
        {"type": "array", "maxItems": 10**12}, {"type": "object", "minProperties": 10**9}, {"type": "object", "maxProperties": 10**6},
        {"type": "integer", "minimum": -(10**300), "maximum": 10**300}, {"type": "number", "minimum": 1e-300}, {"type": "integer", "multipleOf": 1999},
        {"type": "string", "pattern": "(a|a)*b", "minLength": 5, "maxLength": 50}, {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"},
        {"type": "string", "pattern": "^(a?){30}a{30}$", "maxLength": 60}, {"type": "string", "pattern": "(x+x+)+y"},
        {"type": "object", "patternProperties": {"^a.*b$": {}, "a{50}": {}, "c": {}}, "additionalProperties": False},
        {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(3000)}},
        {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(450)}},
        {"oneOf": [{"const": f"v{n}"} for n in range(120)]},
    ],
    ids=lambda schema: next(iter(schema)),
)  # fmt: skip
@pytest.mark.rotating
def test_schema_bombs(schema):
    bounded(lambda: Grammar.from_json_schema(schema))


@pytest.mark.slow
def test_a_huge_enumeration():
    values = [f"item-{n * 7919 % 100_003:06d}-{n}" for n in range(100_000)]
    compiled = bounded(lambda: Grammar.from_json_schema({"enum": values}))
    assert compiled is not None and accepts(compiled, json.dumps(values[777])) and not accepts(compiled, '"item-x"')


@pytest.mark.parametrize(
    "pattern",
    ["(" * 5000, "[" * 5000, "a{999999999}", "(a{9999}){9999}", "((a|b)*c){500}", "(a*)*" * 50, "\\" * 4001, "(?:" * 90 + "a" + ")*" * 90,
     *(pytest.param(bomb, marks=pytest.mark.slow) for bomb in ("[\\u0000-\\uffff]{2000}", "(.|\\n){5000}", "\\p{L}{300}")), "^^^^$$$$", "(|a)+|(|b)+", "([^a]|[^b])*" * 20],
)  # fmt: skip
def test_regex_bombs(pattern):
    bounded(lambda: Grammar.from_regex(pattern))
    bounded(lambda: Grammar.from_json_schema({"type": "string", "pattern": pattern}))


@pytest.mark.parametrize(
    "source",
    ['root ::= ("a"{1000}){1000}{1000}', "root ::= " + "(" * 99 + '"a"' + ")*" * 99, "root ::= root", 'root ::= root root | "a"',
     "root ::= " + " | ".join(f'"{n}"' for n in range(30_000)), "\n".join(f'r{n} ::= "x" | r{(n * 7 + 1) % 900} "y" '
         f'r{(n * 3 + 2) % 900}' for n in range(900)) + "\nroot ::= r5",
     'root ::= ""*', 'root ::= (""* "a"?)* root?', "root ::= [" + "\\U0010FFFF" * 500 + "]"],
)  # fmt: skip
def test_ebnf_bombs(source):
    bounded(lambda: Grammar.from_ebnf(source))


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.one_of(st.text("ab()[]{}|*+?^$\\.,-0123456789d", max_size=24), st.text(max_size=12)))
@pytest.mark.slow
def test_random_regexes_never_crash(pattern):
    bounded(lambda: Grammar.from_regex(pattern))


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.text('rootx :=|()[]{}*+?"\\\n#a-z0123,.', max_size=40).map(lambda tail: "root ::= " + tail))
def test_random_grammars_never_crash(source):
    bounded(lambda: Grammar.from_ebnf(source))


KEYWORDS = ["type", "properties", "items", "anyOf", "enum", "const", "minLength", "maxItems", "pattern", "$ref", "required", "minimum", "allOf",
            "additionalProperties", "prefixItems", "format", "oneOf", "not", "patternProperties", "multipleOf", "propertyNames"]  # fmt: skip
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-5, 5),
        st.floats(allow_nan=False),
        st.sampled_from(["string", "object", "#", "a+", "date", ""]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=4)),
    max_leaves=12,
)


@settings(max_examples=250, suppress_health_check=list(HealthCheck))
@given(JSON)
@example({"required": [[]]})
@pytest.mark.filterwarnings("ignore")
def test_random_schemas_never_crash(schema):
    bounded(lambda: Grammar.from_json_schema(schema))
    bounded(lambda: Grammar.from_json_schema(schema, strict=False, strict_mode=False))


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(st.text(max_size=60))
def test_random_text_is_no_schema_and_says_so(source):
    with contextlib.suppress(GrammarError):
        Grammar.from_json_schema(source)
