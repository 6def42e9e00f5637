"""Whether a value satisfies schemas: for enumerations, and for the names of properties."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

from .json_text import inner
from .schema_sets import at


def satisfies(schemas: Any, value: Any, parts: Any, closed: bool = False) -> bool:
    return parts is not None and all(holds(schemas, value, schema, pointer, closed) for schema, pointer in parts)


def holds(schemas: Any, value: Any, schema: Any, pointer: str, top: bool = False) -> bool:
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
            low, high = schemas.lengths([(part, where)], "minProperties", "maxProperties")
            if not low <= len(value) <= (len(value) if high is None else high):
                return False
            if any(name not in value for name in part.get("required", ())):
                return False
            relaxed = [(part, where)]
            mode, schemas.options = schemas.options, replace(schemas.options, strict_mode=False)
            try:
                if not all(
                    holds(schemas, item, s, p) for n, item in value.items() for s, p in schemas.property(relaxed, n)
                ):
                    return False
            finally:
                schemas.options = mode
        if isinstance(value, list):
            low, high = schemas.lengths([(part, where)], "minItems", "maxItems")
            if not low <= len(value) <= (len(value) if high is None else high):
                return False
            prefix, rest = schemas._prefix(part), schemas._rest(part)
            for place, item in enumerate(value):
                schema_here = prefix[place] if place < len(prefix) else rest
                if schema_here is not None and not holds(schemas, item, schema_here, at(where, "items")):
                    return False
    return True


def _string_holds(schemas: Any, value: str, part: dict[str, Any], where: str) -> bool:
    low, high = schemas.lengths([(part, where)], "minLength", "maxLength")
    if not low <= len(value) <= (len(value) if high is None else high):
        return False
    automaton = schemas.string_automaton([(part, where)], lengths=False)
    return automaton is None or automaton.matches(inner(value))


def _number_holds(schemas: Any, value: Any, part: dict[str, Any], where: str) -> bool:
    low, high, divisors = schemas.bounds([(part, where)])
    number = Decimal(str(value))
    if low is not None and (number < low[0] or (low[1] and number == low[0])):
        return False
    if high is not None and (number > high[0] or (high[1] and number == high[0])):
        return False
    return all(divisor > 0 and number % divisor == 0 for divisor in divisors)


def kind_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float, Decimal)):
        return "integer" if value == int(value) else "number"
    kinds: dict[Any, str] = {str: "string", list: "array", dict: "object"}
    return kinds[type(value)]


def equal(first: Any, second: Any) -> bool:
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


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)
