"""Whether a value satisfies schemas: for enumerations, and for the names of properties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from itertools import combinations

from ..json_text import Json, inner
from .places import further_items, prefix_items, property_schemas
from .rules import SchemaRules
from .sets import Place, Schema, SchemaObject, at
from .strings_and_numbers import bounds, lengths, string_automaton


def satisfies(schemas: SchemaRules, value: Json, parts: Sequence[Place] | None, closed: bool = False) -> bool:
    """Whether a value satisfies all parts (None: no value does); ``closed`` parts bring all of their ``$ref`` and
    ``allOf``."""
    return parts is not None and all(holds(schemas, value, schema, pointer, closed) for schema, pointer in parts)


def holds(schemas: SchemaRules, value: Json, schema: Schema, pointer: str, top: bool = False) -> bool:
    """Whether a value satisfies one schema; at the ``top`` what ``$ref`` and ``allOf`` bring is judged beside it."""
    if isinstance(schema, bool):
        return schema
    expanded = [(schema, pointer)] if top else schemas.expand([(schema, pointer)])
    if expanded is None:
        return False
    for part, where in expanded:
        kind = kind_of(value)
        if "type" in part:
            given = part["type"] if isinstance(part["type"], list) else [part["type"]]
            fits = kind in given or (kind == "integer" and "number" in given)
            if not fits and not (value is None and part.get("nullable") is True):
                return False
        if "const" in part and not equal(part["const"], value):
            return False
        if "enum" in part and not any(equal(option, value) for option in part["enum"]):
            return False
        for key, enough in (("anyOf", lambda n: n >= 1), ("oneOf", lambda n: n == 1)):
            if key in part:
                held = sum(holds(schemas, value, branch, at(where, f"{key}/{i}")) for i, branch in enumerate(part[key]))
                if not enough(held):
                    return False
        if "not" in part and holds(schemas, value, part["not"], at(where, "not")):
            return False
        if isinstance(value, str) and not _string_holds(schemas, value, part, where):
            return False
        if kind in ("integer", "number") and not _number_holds(schemas, value, part, where):
            return False
        if isinstance(value, dict):
            low, high = lengths([(part, where)], "minProperties", "maxProperties")
            if not low <= len(value) <= (len(value) if high is None else high):
                return False
            if any(name not in value for name in part.get("required", ())):
                return False
            naming, named = part.get("propertyNames", True), at(where, "propertyNames")
            if not all(holds(schemas, name, naming, named) for name in value):
                return False
            relaxed = [(part, where)]
            mode, schemas.options = schemas.options, replace(schemas.options, strict_mode=False)
            try:
                if not all(
                    holds(schemas, item, s, p)
                    for n, item in value.items()
                    for s, p in property_schemas(schemas, relaxed, n)
                ):
                    return False
            finally:
                schemas.options = mode
        if isinstance(value, list):
            low, high = lengths([(part, where)], "minItems", "maxItems")
            if not low <= len(value) <= (len(value) if high is None else high):
                return False
            if part.get("uniqueItems") is True and any(equal(a, b) for a, b in combinations(value, 2)):
                return False
            prefix, rest = prefix_items(part), further_items(part)
            for place, item in enumerate(value):
                schema_here = prefix[place] if place < len(prefix) else rest
                if schema_here is not None and not holds(schemas, item, schema_here, at(where, "items")):
                    return False
    return True


def _string_holds(schemas: SchemaRules, value: str, part: SchemaObject, where: str) -> bool:
    low, high = lengths([(part, where)], "minLength", "maxLength")
    if not low <= len(value) <= (len(value) if high is None else high):
        return False
    automaton = string_automaton(schemas, [(part, where)], with_lengths=False)
    return automaton is None or automaton.matches(inner(value))


def _number_holds(schemas: SchemaRules, value: Json, part: SchemaObject, where: str) -> bool:
    low, high, divisors = bounds(schemas, [(part, where)])
    number = Decimal(str(value))
    if low is not None and (number < low[0] or (low[1] and number == low[0])):
        return False
    if high is not None and (number > high[0] or (high[1] and number == high[0])):
        return False
    return all(divisor > 0 and number % divisor == 0 for divisor in divisors)


def kind_of(value: Json) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float, Decimal)):
        return "integer" if value == int(value) else "number"
    kinds: dict[type, str] = {str: "string", list: "array", dict: "object"}
    return kinds[type(value)]


def equal(first: Json, second: Json) -> bool:
    """JSON equality: 1 is 1.0, but true is not 1."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(equal, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    return (type(first) is type(second) and first == second) or (
        is_number(first) and is_number(second) and first == second
    )


def is_number(value: Json) -> bool:
    return isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)
