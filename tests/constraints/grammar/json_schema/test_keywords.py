"""The lists of keywords against the code, the standard's own schemas, the documentation, and documents."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import get_type_hints

import pytest
from jsonschema_specifications import REGISTRY

import everytoken.constraints.grammar.json_schema as package
from everytoken.constraints.grammar import Grammar, GrammarError
from everytoken.constraints.grammar.json_schema import SUPPORTED, SchemaOptions, SchemaSettings
from everytoken.constraints.grammar.json_schema.keywords import (
    ANNOTATIONS,
    ARRAYS,
    COMBINATION,
    OBJECTS,
    REFERENCES,
    REFUSED,
    STRINGS_AND_NUMBERS,
)

from ...common import accepts, compile_

FOLDER = Path(package.__file__).parent
DOCS = Path(__file__).parents[4] / "docs" / "constraints.md"


def standard_keywords():
    """Every keyword that the own schemas of draft 4 and later define."""
    found, pending = set(), [REGISTRY[uri].contents for uri in REGISTRY if "draft-03" not in uri]
    for schema in pending:
        found |= set(schema.get("properties", {}))
    return found


def strings_of(path):
    """All string constants of a module, its docstrings aside."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    }


def test_every_keyword_of_the_standard_has_one_place():
    lists = [COMBINATION, STRINGS_AND_NUMBERS, OBJECTS, ARRAYS, REFERENCES, ANNOTATIONS, set(REFUSED)]
    assert sum(map(len, lists)) == len(set().union(*lists))
    known = standard_keywords()
    assert len(known) > 50 and known <= set().union(*lists), known - set().union(*lists)


def test_what_the_code_mentions_is_what_is_listed():
    """A keyword is handled where the code names it; every listed one is named, and none that is not listed."""
    named = set().union(*(strings_of(path) for path in FOLDER.glob("*.py") if path.stem != "keywords"))
    assert SUPPORTED - {"$defs", "definitions"} <= named  # these are found by the pointers of $ref
    universe = standard_keywords() | SUPPORTED | ANNOTATIONS | set(REFUSED)
    searched_around = {"default", "examples"}  # values in there are no schemas
    assert named & universe - searched_around <= SUPPORTED | set(REFUSED)


def test_the_documentation_lists_the_supported_keywords():
    text = DOCS.read_text(encoding="utf-8")
    assert not {keyword for keyword in SUPPORTED | set(REFUSED) if f"`{keyword}`" not in text}


# keyword: a schema, a document that it allows, and one that it would allow without the keyword
CASES = {
    "type": ({"type": "null"}, "null", "1"),
    "nullable": ({"type": "string", "nullable": False}, '"a"', None),
    "enum": ({"enum": [1]}, "1", "2"),
    "const": ({"const": 1}, "1", "2"),
    "anyOf": ({"anyOf": [{"type": "null"}]}, "null", "1"),
    "oneOf": ({"oneOf": [{"type": "null"}, {"type": "boolean"}]}, "null", "1"),
    "allOf": ({"allOf": [{"type": "null"}]}, "null", "1"),
    "not": ({"anyOf": [{"type": "null"}, {"not": {}}]}, "null", "1"),
    "if": ({"if": {"type": "null"}, "then": False}, "1", "null"),
    "then": ({"if": {"type": "null"}, "then": False}, "1", "null"),
    "else": ({"if": {"type": "null"}, "else": False}, "null", "1"),
    "contains": ({"type": "array", "contains": {"const": 1}}, "[2, 1]", "[2]"),
    "minContains": ({"type": "array", "contains": {"const": 1}, "minContains": 2}, "[1, 2, 1]", "[1]"),
    "maxContains": ({"type": "array", "contains": {"const": 1}, "maxContains": 1}, "[1, 2]", "[1, 1]"),
    "dependentRequired": ({"type": "object", "dependentRequired": {"a": ["b"]}}, '{"a": 1, "b": 1}', '{"a": 1}'),
    "dependentSchemas": ({"type": "object", "dependentSchemas": {"a": {"maxProperties": 1}}}, '{"a": 1}', '{"a": 1, "b": 1}'),
    "dependencies": ({"type": "object", "dependencies": {"a": ["b"]}}, '{"a": 1, "b": 1}', '{"a": 1}'),
    "pattern": ({"type": "string", "pattern": "^a$"}, '"a"', '"b"'),
    "format": ({"type": "string", "format": "date"}, '"2024-02-29"', '"b"'),
    "minLength": ({"type": "string", "minLength": 1}, '"a"', '""'),
    "maxLength": ({"type": "string", "maxLength": 1}, '"a"', '"ab"'),
    "minimum": ({"type": "integer", "minimum": 3}, "3", "2"),
    "maximum": ({"type": "integer", "maximum": 3}, "3", "4"),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 3}, "4", "3"),
    "exclusiveMaximum": ({"type": "integer", "exclusiveMaximum": 3}, "2", "3"),
    "multipleOf": ({"type": "integer", "multipleOf": 3}, "6", "7"),
    "properties": ({"type": "object", "properties": {"a": {"type": "null"}}}, '{"a": null}', '{"a": 1}'),
    "required": ({"type": "object", "required": ["a"]}, '{"a": 1}', "{}"),
    "additionalProperties": ({"type": "object", "additionalProperties": False}, "{}", '{"a": 1}'),
    "patternProperties": ({"type": "object", "patternProperties": {"^a": False}}, '{"b": 1}', '{"a": 1}'),
    "propertyNames": ({"type": "object", "propertyNames": {"maxLength": 1}}, '{"a": 1}', '{"ab": 1}'),
    "minProperties": ({"type": "object", "minProperties": 1}, '{"a": 1}', "{}"),
    "maxProperties": ({"type": "object", "maxProperties": 0}, "{}", '{"a": 1}'),
    "unevaluatedProperties": (
        {"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False}, '{"a": 1}', '{"b": 1}',
    ),
    "items": ({"type": "array", "items": {"type": "null"}}, "[null]", "[1]"),
    "prefixItems": ({"type": "array", "prefixItems": [{"type": "null"}]}, "[null]", "[1]"),
    "additionalItems": ({"type": "array", "items": [{}], "additionalItems": False}, "[1]", "[1, 2]"),
    "minItems": ({"type": "array", "minItems": 1}, "[1]", "[]"),
    "maxItems": ({"type": "array", "maxItems": 0}, "[]", "[1]"),
    "uniqueItems": ({"enum": [[1, 2], [1, 1.0]], "uniqueItems": True}, "[1, 2]", "[1, 1.0]"),
    "unevaluatedItems": ({"type": "array", "prefixItems": [{}], "unevaluatedItems": False}, "[1]", "[1, 2]"),
    "$ref": ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "null"}}}, "null", "1"),
}  # fmt: skip
POINTED_AT = {
    "$defs": {"$defs": {"x": {"type": "null"}}, "$ref": "#/$defs/x"},
    "definitions": {"definitions": {"x": {"type": "null"}}, "$ref": "#/definitions/x"},
    "$anchor": {"$defs": {"x": {"type": "null", "$anchor": "here"}}, "$ref": "#here"},
    "$dynamicAnchor": {"$defs": {"x": {"type": "null", "$dynamicAnchor": "here"}}, "$ref": "#here"},
    "$id": {"$defs": {"x": {"type": "null", "$id": "x.json"}}, "$ref": "x.json"},
    "id": {"definitions": {"x": {"type": "null", "id": "x.json"}}, "$ref": "x.json"},
}


def judged(schema, text):
    return accepts(compile_(Grammar.from_json_schema(schema, strict_mode=False)), text)


def without(schema, keyword):
    if isinstance(schema, list):
        return [without(item, keyword) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: without(value, keyword) for key, value in schema.items() if key != keyword}


def test_every_supported_keyword_is_exercised():
    assert CASES.keys() | POINTED_AT.keys() == SUPPORTED


@pytest.mark.parametrize("keyword", sorted(CASES))
def test_a_keyword_excludes_documents(keyword):
    schema, allowed, excluded = CASES[keyword]
    assert judged(schema, allowed)
    if keyword == "nullable":  # the one that adds documents
        assert not judged(schema, "null") and judged(schema | {"nullable": True}, "null")
        return
    assert not judged(schema, excluded) and judged(without(schema, keyword), excluded)


@pytest.mark.parametrize("keyword", sorted(POINTED_AT))
def test_what_references_lead_to(keyword):
    schema = POINTED_AT[keyword]
    assert judged(schema, "null") and not judged(schema, "1")
    with pytest.raises(GrammarError, match=r"leads|anchor"):
        Grammar.from_json_schema(without(schema, keyword))


@pytest.mark.parametrize("keyword", sorted(REFUSED))
def test_refused_keywords_are_named(keyword):
    with pytest.raises(GrammarError, match=re.escape(keyword)):
        Grammar.from_json_schema({keyword: {}})


def test_options_as_keywords_are_the_options():
    fields = {name: field.type for name, field in SchemaOptions.__dataclass_fields__.items()}
    assert list(SchemaSettings.__annotations__) == list(fields)
    assert get_type_hints(SchemaSettings) == get_type_hints(SchemaOptions)
