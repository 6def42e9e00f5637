"""Objects in the schema's order: tries of the names that may follow, against every sequence of properties."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.constraints.grammar import Grammar, GrammarError

from ...common import accepts, compile_


def compile_schema(schema, **options):
    return compile_(Grammar.from_json_schema(schema, **options))


NAMES = ["a", "ab", "b", "ba", "ä", 'a"']


@settings(max_examples=12)
@given(st.permutations(NAMES), st.integers(0, 4), st.sets(st.sampled_from(NAMES)), st.booleans(), st.booleans())
def test_every_sequence_of_properties_is_judged_by_order_and_need(names, size, needed, closed, spaced):
    """Names that begin alike, a quotation mark in one, properties that are missing and further ones."""
    names = names[:size]
    needed = [name for name in names if name in needed]
    schema = {
        "type": "object", "properties": {name: {"type": "integer"} for name in names}, "required": needed,
        "additionalProperties": False if closed else {"type": "boolean"},
    }  # fmt: skip
    compiled = compile_schema(schema, any_whitespace=spaced)
    literals = {name: '"' + name.replace('"', '\\"') + '": ' for name in names}
    for count in range(min(size, 3) + 1):
        for chosen in itertools.permutations(names, count):
            right = list(chosen) == [name for name in names if name in chosen] and set(needed) <= set(chosen)
            parts = [literals[name] + "1" for name in chosen]
            assert accepts(compiled, "{" + ", ".join(parts) + "}") == right, (schema, chosen)
            more = [*parts, '"abc": true']
            assert accepts(compiled, "{" + ", ".join(more) + "}") == (right and not closed)
            if parts:  # further properties come last, none comes twice, and values keep their types
                assert not accepts(compiled, "{" + ", ".join(['"abc": true', *parts]) + "}")
                assert not accepts(compiled, "{" + ", ".join([*parts, parts[-1]]) + "}")
                assert not accepts(compiled, "{" + ", ".join([*parts[:-1], parts[-1][:-1] + "true"]) + "}")


def test_very_many_optional_properties_in_the_schemas_order():
    """Their tries share all but a path: twice as many take twice as large an automaton."""
    sizes = []
    for count in (100, 200):
        schema = {"type": "object", "properties": {f"property_{n}": {"type": "integer"} for n in range(count)}}
        compiled = compile_schema(schema)
        sizes.append(len(compiled.pushdown.tables.edge_to))
        assert accepts(compiled, '{"property_3": 1, "property_31": 2, "property_99": 3}')
        assert not accepts(compiled, '{"property_31": 1, "property_3": 2}')
    assert sizes[1] < 2.5 * sizes[0]


def test_very_many_optional_properties_that_are_counted_are_refused():
    properties = {f"property_{n}": {"type": "integer"} for n in range(501)}
    with pytest.raises(GrammarError, match="more than 500 optional properties in one object whose properties are"):
        compile_schema({"type": "object", "properties": properties, "minProperties": 1})
