"""What every keyword of JSON Schema is here: supported, without effect on documents, or refused.

``tests/constraints/grammar/json_schema/test_keywords.py`` compares these lists with the code, with the standard's
own schemas and
with the table of docs/constraints.md, and shows for each supported keyword a document that it excludes.
"""

from __future__ import annotations

COMBINATION = frozenset({"type", "nullable", "enum", "const", "anyOf", "oneOf", "allOf", "not"})
"""``oneOf`` where its branches evidently exclude each other; ``not`` of everything and of nothing."""
STRINGS_AND_NUMBERS = frozenset({
    "pattern", "format", "minLength", "maxLength",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
})  # fmt: skip
OBJECTS = frozenset({
    "properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties",
    "maxProperties",
    "unevaluatedProperties",
})  # fmt: skip
ARRAYS = frozenset({
    "items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "unevaluatedItems",
})  # fmt: skip
"""``uniqueItems`` where an array has at most one item, or in enumerations' values."""
REFERENCES = frozenset({"$ref", "$defs", "definitions", "$id", "id", "$anchor", "$dynamicAnchor"})
"""Within one document; ``$dynamicAnchor`` names a place as ``$anchor`` does."""
SUPPORTED = COMBINATION | STRINGS_AND_NUMBERS | OBJECTS | ARRAYS | REFERENCES

ANNOTATIONS = frozenset({
    "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment",
    "$schema",
    "$vocabulary", "contentMediaType", "contentEncoding", "contentSchema",
})  # fmt: skip
"""They say nothing about which documents are valid."""

_OTHERWISE = "Say it with other keywords."
REFUSED = {
    "if": "Write the cases as anyOf, each with its own const.",
    "then": _OTHERWISE,
    "else": _OTHERWISE,
    "contains": "Use prefixItems for the item that must be there.",
    "minContains": _OTHERWISE,
    "maxContains": _OTHERWISE,
    "dependentRequired": "Write the cases as anyOf.",
    "dependentSchemas": _OTHERWISE,
    "dependencies": _OTHERWISE,
    "$dynamicRef": "Use $ref.",
    "$recursiveRef": _OTHERWISE,
    "$recursiveAnchor": _OTHERWISE,
}
"""Refused keywords, and what to do instead; ignored with a warning under ``strict=False``."""
BESIDE_IF = frozenset({"then", "else"})
BESIDE_CONTAINS = frozenset({"minContains", "maxContains"})
"""Keywords that say nothing without another one."""
NEAR = sorted(SUPPORTED - REFERENCES | {"$ref"})
"""What a misspelt keyword may have meant."""
