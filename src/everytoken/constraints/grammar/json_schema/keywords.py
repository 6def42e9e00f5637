"""What every keyword of JSON Schema is here: supported, without effect on documents, or refused.

``tests/constraints/grammar/json_schema/test_keywords.py`` compares these lists with the code, with the standard's
own schemas and
with the table of docs/constraints.md, and shows for each supported keyword a document that it excludes.
"""

from __future__ import annotations

COMBINATION = frozenset({
    "type", "nullable", "enum", "const", "anyOf", "oneOf", "allOf", "not", "if", "then", "else",
})  # fmt: skip
STRINGS_AND_NUMBERS = frozenset({
    "pattern", "format", "minLength", "maxLength",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
})  # fmt: skip
OBJECTS = frozenset({
    "properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties",
    "maxProperties", "unevaluatedProperties", "dependentRequired", "dependentSchemas", "dependencies",
})  # fmt: skip
ARRAYS = frozenset({
    "items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "unevaluatedItems",
    "contains", "minContains", "maxContains",
})  # fmt: skip
"""``uniqueItems`` where an array has at most one item, where its items are few values, or in enumerations' values."""
REFERENCES = frozenset({"$ref", "$defs", "definitions", "$id", "id", "$anchor", "$dynamicAnchor"})
"""Within one document; ``$dynamicAnchor`` names a place as ``$anchor`` does."""
SUPPORTED = COMBINATION | STRINGS_AND_NUMBERS | OBJECTS | ARRAYS | REFERENCES

ANNOTATIONS = frozenset({
    "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment",
    "$schema", "$vocabulary", "contentMediaType", "contentEncoding", "contentSchema",
})  # fmt: skip
"""They say nothing about which documents are valid."""

REFUSED = {
    "$dynamicRef": "Use $ref.",
    "$recursiveRef": "Use $ref.",
    "$recursiveAnchor": "Use $anchor.",
}
"""Refused keywords, and what to do instead; ignored with a warning under ``strict=False``."""
NEAR = sorted(SUPPORTED - REFERENCES | {"$ref"})
"""What a misspelt keyword may have meant."""
NEAR_SHAPES: dict[str, type | tuple[type, ...]] = {
    "type": (str, list), "enum": list, "anyOf": list, "oneOf": list, "allOf": list, "pattern": str, "format": str,
    "minLength": int, "maxLength": int, "minimum": (int, float), "maximum": (int, float), "required": list,
    "exclusiveMinimum": (int, float), "exclusiveMaximum": (int, float), "multipleOf": (int, float), "properties": dict,
    "patternProperties": dict, "minProperties": int, "maxProperties": int, "minItems": int, "maxItems": int,
    "uniqueItems": bool, "$ref": str, "minContains": int, "maxContains": int, "nullable": bool,
}  # fmt: skip
"""What its value would have to be; an unknown keyword of another shape meant something else."""
