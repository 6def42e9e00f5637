"""Strings and numbers: ``pattern``, ``format`` and lengths; bounds and ``multipleOf``.

Conditions that must hold together (two patterns, a pattern and a length) become intersections of automata.
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

from ..automata import Automaton, build, intersection, is_deterministic
from ..expressions import NOTHING, Expression, GrammarError, Ref, Repeat, seq
from ..formats import FORMATS
from ..json_text import CANONICAL, COUNTED, QUOTE, spell
from ..numbers import number_automaton
from ..regex import regex_automaton
from .rules import SchemaRules
from .sets import Parts, at

Bound = tuple[Decimal, bool]
"""A bound, and whether it is excluded."""


def bounds(schemas: SchemaRules, parts: Parts) -> tuple[Bound | None, Bound | None, list[Decimal]]:
    low: Bound | None = None
    high: Bound | None = None
    divisors: list[Decimal] = []
    for schema, pointer in parts:
        for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf"):
            if key not in schema:
                continue
            try:
                value = Decimal(str(schema[key]))
                assert value.is_finite() and abs(value.adjusted()) < 400
            except (InvalidOperation, AssertionError):
                schemas.fail(at(pointer, key), f"{key} must be a finite number; got {schema[key]!r}.")
            exclusive = key.startswith("exclusive")
            if key == "multipleOf":
                divisors.append(value)
            elif key.endswith("inimum"):
                low = (value, exclusive) if low is None or (value, exclusive) > low else low
            else:
                high = (value, exclusive) if high is None or (value, not exclusive) < (high[0], not high[1]) else high
    return low, high, divisors


def number_rule(schemas: SchemaRules, parts: Parts, integer: bool) -> Expression:
    low, high, divisors = bounds(schemas, parts)
    try:
        return number_automaton(integer, low, high, divisors)
    except GrammarError as error:
        where = next((p for s, p in parts if "multipleOf" in s), "")
        schemas.unsupported(where, str(error.message).removesuffix(" is not supported."), error.hint or "")
        return number_automaton(integer, low, high, [])


def lengths(parts: Parts, low_key: str, high_key: str) -> tuple[int, int | None]:
    low = max((int(schema.get(low_key, 0)) for schema, _ in parts), default=0)
    highs = [int(schema[high_key]) for schema, _ in parts if high_key in schema]
    return low, min(highs) if highs else None


def string_automaton(schemas: SchemaRules, parts: Parts, with_lengths: bool = True) -> Automaton | None:
    """Contents of the string (no quotes) as an automaton over canonical spelling; None if nothing is asked."""
    found: list[Automaton] = []
    for schema, pointer in parts:
        if "pattern" in schema:
            try:
                found.append(regex_automaton(schema["pattern"], True, CANONICAL, spell))
            except GrammarError as error:
                schemas.unsupported(at(pointer, "pattern"), f"this pattern ({error.message})", error.hint or "")
        if "format" in schema:
            pattern = FORMATS.get(schema["format"])
            if pattern is None:
                schemas.unsupported(
                    at(pointer, "format"), f"the format {schema['format']!r}", f"Known: {', '.join(FORMATS)}."
                )
            else:
                found.append(regex_automaton(pattern, False, CANONICAL, spell))
    if not found:
        return None
    low, high = lengths(parts, "minLength", "maxLength")
    if with_lengths and (low or high is not None):
        if max(low, high or 0) > 20_000:
            schemas.fail(parts[0][1], "a pattern or format with a length bound over 20,000.", "Lower the bound.")
        bound = build(Repeat(CANONICAL, low, high))
        found.append(bound)
    result = found[0]
    for other in found[1:]:
        if not (is_deterministic(result) and is_deterministic(other)):
            schemas.fail(parts[0][1], "patterns that must hold together are too complex.", "Simplify one of them.")
        result = intersection(result, other)
    return result


def string_rule(schemas: SchemaRules, parts: Parts) -> Expression:
    automaton = string_automaton(schemas, parts)
    if automaton is not None:
        return seq(QUOTE, automaton, QUOTE)
    low, high = lengths(parts, "minLength", "maxLength")
    if low == 0 and high is None:
        return Ref("string")
    if high is not None and high < low:
        return NOTHING
    name = f"chars_{low}_{high}"
    if name not in schemas.rules:  # a rule of its own: strings of equal length share it
        schemas.rules[name] = Repeat(COUNTED, low, high)
    return seq(QUOTE, Ref(name), QUOTE)
