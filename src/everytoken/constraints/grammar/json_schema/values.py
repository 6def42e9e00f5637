"""Whether a value satisfies schemas: for enumerations, and for the names of properties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from itertools import combinations

from ..json_text import Json, inner
from .negation import NOT_ENUM, NOT_INTEGER, NOT_MULTIPLE, SOME_ITEM, SOME_PROPERTY
from .places import further_items, prefix_items, property_schemas
from .rules import SchemaRules
from .sets import Place, Schema, SchemaObject, at
from .strings_and_numbers import bounds, is_number, lengths, string_automaton


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
        if "enum" in part and not listed_in(value, part["enum"]):
            return False
        for key, enough in (("anyOf", lambda n: n >= 1), ("oneOf", lambda n: n == 1)):
            if key in part:
                held = sum(holds(schemas, value, branch, at(where, f"{key}/{i}")) for i, branch in enumerate(part[key]))
                if not enough(held):
                    return False
        if "not" in part and holds(schemas, value, part["not"], at(where, "not")):
            return False
        if "if" in part:
            branch = "then" if holds(schemas, value, part["if"], at(where, "if")) else "else"
            if branch in part and not holds(schemas, value, part[branch], at(where, branch)):
                return False
        if NOT_ENUM in part and listed_in(value, part[NOT_ENUM]):
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
            for key in ("dependentRequired", "dependentSchemas", "dependencies"):
                for name, needed in part.get(key, {}).items():
                    rule: Schema = {"required": needed} if isinstance(needed, list) else needed
                    if name in value and not holds(schemas, value, rule, at(where, key)):
                        return False
            if SOME_PROPERTY in part:
                named_as, item = part[SOME_PROPERTY]
                if not any(
                    holds(schemas, n, named_as, where) and holds(schemas, v, item, where) for n, v in value.items()
                ):
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
            if "contains" in part:
                held = sum(holds(schemas, item, part["contains"], at(where, "contains")) for item in value)
                if not part.get("minContains", 1) <= held <= part.get("maxContains", held):
                    return False
            if SOME_ITEM in part:
                first, wanted = part[SOME_ITEM]
                if not any(holds(schemas, item, wanted, where) for item in value[first:]):
                    return False
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
    if NOT_INTEGER in part and number == number.to_integral_value():
        return False
    if NOT_MULTIPLE in part and is_multiple(number, Decimal(str(part[NOT_MULTIPLE]))):
        return False
    return all(is_multiple(number, divisor) for divisor in divisors)


def is_multiple(number: Decimal, divisor: Decimal) -> bool:
    """Exactly, however far apart their sizes are."""
    return divisor > 0 and (Fraction(number) / Fraction(divisor)).denominator == 1


def kind_of(value: Json) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float, Decimal)):
        return "integer" if value == int(value) else "number"
    kinds: dict[type, str] = {str: "string", list: "array", dict: "object"}
    return kinds[type(value)]


def listed_in(value: Json, values: list[Json]) -> bool:
    """Whether a value equals one of a list's."""
    return value in values if isinstance(value, str) else any(equal(other, value) for other in values)


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
