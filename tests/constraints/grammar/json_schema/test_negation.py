"""The complement of a schema: compared with the package jsonschema on every value of a pool, both ways."""

from __future__ import annotations

import json

import jsonschema
import pytest

from everytoken.constraints.grammar import Grammar, GrammarError

from ...common import accepts, compile_

POOL = [
    None, True, False, 0, 1, 2, 3, 5, 6, 10, 12.5, -1, 0.5, "", "a", "b", "ab", "abc", "x1", "é", "a\n", "2024-02-29",
    [], [1], [2], [1, 2], [2, 1], [1, 1], ["a"], ["a", 1], [1, 2, 3], [None], [[1]],
    {}, {"a": 1}, {"b": 1}, {"a": "x"}, {"a": 1, "b": 2}, {"a": 1, "b": "x"}, {"c": 1}, {"a": 1, "c": 3}, {"a1": 1}, {"a": {"a": 1}},
]  # fmt: skip
SCHEMAS = [
    {"not": {"type": "string"}}, {"not": {"type": ["integer", "null"]}}, {"not": {"enum": [1, "a", None, True, [1], {"a": 1}]}},
    {"not": {"const": [1, 2]}}, {"not": {"const": 0}}, {"not": {"minimum": 2}}, {"not": {"exclusiveMaximum": 2}},
    {"not": {"multipleOf": 5}}, {"not": {"multipleOf": 2.5}}, {"type": "string", "not": {"pattern": "^a"}},
    {"type": "string", "not": {"minLength": 2}}, {"not": {"maxLength": 1}}, {"not": {"format": "date"}},
    {"not": {"required": ["a"]}}, {"not": {"required": ["a", "b"]}}, {"not": {"properties": {"a": {"type": "integer"}}}},
    {"not": {"additionalProperties": {"type": "integer"}}}, {"not": {"patternProperties": {"^a": {"type": "integer"}}}},
    {"not": {"properties": {"a": {}}, "additionalProperties": False}}, {"not": {"propertyNames": {"maxLength": 1}}},
    {"not": {"propertyNames": {"enum": ["a", "b"]}}}, {"not": {"minProperties": 2}}, {"not": {"maxProperties": 1}},
    {"not": {"items": {"type": "integer"}}}, {"not": {"prefixItems": [{"const": 1}]}}, {"not": {"minItems": 2}},
    {"not": {"contains": {"const": 1}}}, {"not": {"contains": {"const": 1}, "minContains": 0, "maxContains": 1}},
    {"not": {"anyOf": [{"type": "string"}, {"minimum": 2}]}}, {"not": {"allOf": [{"type": "integer"}, {"minimum": 2}]}},
    {"not": {"oneOf": [{"type": "integer"}, {"minimum": 2}]}}, {"not": {"not": {"type": "integer"}}},
    {"not": {"if": {"type": "integer"}, "then": {"minimum": 2}, "else": {"type": "string"}}},
    {"not": {"dependentRequired": {"a": ["b"]}}}, {"not": {"$ref": "#/$defs/x"}, "$defs": {"x": {"type": "object"}}},
    {"oneOf": [{"type": "integer"}, {"minimum": 2}]}, {"oneOf": [{"required": ["a"]}, {"required": ["b"]}], "type": "object"},
    {"oneOf": [{"multipleOf": 2}, {"multipleOf": 3}, {"multipleOf": 5}], "type": "integer"},
    {"oneOf": [{"pattern": "a"}, {"pattern": "b"}, {"maxLength": 1}], "type": "string"},
    {"oneOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"b": {"const": 2}}}]},
    {"if": {"required": ["a"]}, "then": {"required": ["b"]}}, {"if": {"properties": {"a": {"const": 1}}}, "else": False},
    {"dependencies": {"a": {"properties": {"b": {"type": "string"}}}}}, {"dependentSchemas": {"a": {"maxProperties": 1}}},
    {"contains": {"const": 1}}, {"contains": {"type": "integer"}, "minContains": 2}, {"contains": {"const": 1}, "maxContains": 1},
    {"contains": {"minimum": 2}, "allOf": [{"contains": {"maximum": 1}}]}, {"contains": {"const": 1}, "prefixItems": [{"const": 2}]},
    {"type": "array", "uniqueItems": True, "items": {"enum": [1, 2, 3]}}, {"uniqueItems": True, "items": {"type": ["null", "boolean"]}, "type": "array"},
    {"type": "object", "propertyNames": {"anyOf": [{"const": "a"}, {"not": {"maxLength": 1}}]}},
    {"$defs": {"t": {"type": "object", "properties": {"a": {"$ref": "#/$defs/t"}}}}, "not": {"$ref": "#/$defs/t"}},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_exactly_what_the_schema_allows(number):
    schema = SCHEMAS[number]
    draft = jsonschema.Draft7Validator if "dependencies" in schema else jsonschema.Draft202012Validator
    validator = draft(schema, format_checker=jsonschema.FormatChecker())
    compiled = compile_(Grammar.from_json_schema(schema, strict_mode=False, property_order="any"))
    for value in POOL:
        found = accepts(compiled, json.dumps(value, ensure_ascii=False))
        assert found == validator.is_valid(value), (schema, value)


def test_a_schema_and_its_opposite_leave_nothing():
    for schema in SCHEMAS[:12]:
        both = {"allOf": [schema, {"not": schema}]}
        with pytest.raises(GrammarError, match="No text"):
            compile_(Grammar.from_json_schema(both, strict_mode=False))


def test_a_schema_that_is_its_own_opposite_is_refused():
    with pytest.raises(GrammarError, match="leads back"):
        Grammar.from_json_schema({"not": {"$ref": "#"}})


def test_closed_objects_stay_closed_and_open_ones_open():
    """What is made for an opposite lists properties, but does not close objects under strict_mode."""
    from ...common import in_schema

    assert in_schema({"type": "object", "not": {"required": ["b"]}}, {"c": 1})
    assert not in_schema({"type": "object", "properties": {"a": {}}, "not": {"required": ["b"]}}, {"c": 1})
    overlapping = {
        "type": "object",
        "oneOf": [{"properties": {"a": {}}, "required": ["a"]}, {"properties": {"b": {}}, "required": ["b"]}],
    }
    assert in_schema(overlapping, {"a": 1}) and not in_schema(overlapping, {"a": 1, "b": 1})
