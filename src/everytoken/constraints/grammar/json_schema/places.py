"""Which schemas apply to a property or an item of a document, given the parts that apply to the whole."""

from __future__ import annotations

from ..automaton import Automaton
from ..expressions import GrammarError
from ..json_text import inner
from .negation import OPEN
from .rules import SchemaRules
from .sets import Parts, Place, Schema, SchemaObject, at, escaped
from .strings_and_numbers import pattern

UNCERTAIN = ("anyOf", "not", "if", "dependentSchemas", "dependencies", "contains")
"""Keywords that may evaluate properties or items, depending on the document."""


def required(parts: Parts) -> list[str]:
    return list(dict.fromkeys(name for schema, _ in parts for name in schema.get("required", ())))


def property_schemas(schemas: SchemaRules, parts: Parts, name: str) -> list[Place]:
    """All schemas that the value of a property must satisfy."""
    found: list[Place] = []
    declared = any(name in schema.get("properties", ()) for schema, _ in parts)
    for schema, pointer in parts:
        before = len(found)
        if name in schema.get("properties", {}):
            found.append((schema["properties"][name], at(pointer, f"properties/{escaped(name)}")))
        for expression, value in schema.get("patternProperties", {}).items():
            if key_matches(schemas, expression, name, pointer):
                found.append((value, at(pointer, f"patternProperties/{escaped(expression)}")))
                declared = True
        if len(found) == before and "additionalProperties" in schema:
            found.append((schema["additionalProperties"], at(pointer, "additionalProperties")))
    if not declared and not any("additionalProperties" in schema for schema, _ in parts):
        found += otherwise(schemas, parts, "unevaluatedProperties", ("properties", "patternProperties"))
    return found


def otherwise(schemas: SchemaRules, parts: Parts, key: str, closing: tuple[str, ...]) -> list[Place]:
    """What applies to a property or item that no part mentions."""
    given = [(schema[key], at(pointer, f"{key}")) for schema, pointer in parts if key in schema]
    if given:
        check_unevaluated(schemas, parts, key)
        return given
    closed = schemas.options.strict_mode and any(
        name in schema for schema, _ in parts if OPEN not in schema for name in closing
    )
    return [(False, "")] if closed else []


def check_unevaluated(schemas: SchemaRules, parts: Parts, key: str) -> None:
    """``unevaluated*`` looks at its own schema and what that includes, and at nothing beside it.

    Exact where all parts come from the one schema that has the keyword, by $ref, allOf or oneOf.
    """
    owners = [(schema, pointer) for schema, pointer in parts if key in schema]
    inside: set[int] = set()
    pending = list(schemas.flatten(schemas.numbers[id(owners[0][0])]))
    while pending:
        index = pending.pop()
        if index not in inside:
            inside.add(index)
            schema, pointer = schemas.schemas[index], schemas.pointers[index]
            for place, branch in enumerate(schema.get("oneOf", ()) if isinstance(schema, dict) else ()):
                if not isinstance(branch, bool):
                    pending += schemas.flatten(schemas.number(branch, at(pointer, f"oneOf/{place}")))
    if (
        len(owners) > 1
        or any(schemas.numbers[id(schema)] not in inside for schema, _ in parts)
        or any(word in schema for schema, _ in parts for word in UNCERTAIN)
    ):
        schemas.unsupported(
            owners[0][1], f"{key} beside other schemas", "Use additionalProperties: false, or items: false."
        )


def key_matches(schemas: SchemaRules, pattern: str, name: str, pointer: str) -> bool:
    return key_automaton(schemas, pattern, pointer).matches(inner(name))


def key_automaton(schemas: SchemaRules, expression: str, pointer: str) -> Automaton:
    try:
        return pattern(expression, True)
    except GrammarError as error:
        schemas.fail(at(pointer, "patternProperties"), error.message, error.hint)


def prefix_items(schema: SchemaObject) -> list[Schema]:
    if "prefixItems" in schema:
        return schema["prefixItems"]
    return schema["items"] if isinstance(schema.get("items"), list) else []  # drafts before 2020-12


def further_items(schema: SchemaObject) -> Schema | None:
    if isinstance(schema.get("items"), list):
        return schema.get("additionalItems")
    return schema.get("items")
