"""Strings and numbers: ``pattern``, ``format`` and lengths; bounds and ``multipleOf``.

Conditions that must hold together (two patterns, a pattern and a length) become intersections of automata.
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Literal

from ..automata import build, is_deterministic, minimise, trie
from ..automaton import Automaton
from ..counting import counted
from ..expressions import NOTHING, Expression, GrammarError, Ref, Repeat, seq, star
from ..formats import FORMATS, REFUSED_FORMATS, SILENT_FORMATS
from ..json_text import CANONICAL, COUNTED, FREE, QUOTE, Json, inner, spell
from ..numbers import number_automaton
from ..regex import regex_automaton
from .negation import NOT_ENUM, NOT_FORMAT, NOT_INTEGER, NOT_MULTIPLE, NOT_PATTERN
from .rules import SchemaRules
from .sets import Parts, at

INLINE = 2_000
"""Automata up to this size are built into the rules that mention them."""
Bound = tuple[Decimal, bool]
"""A bound, and whether it is excluded."""


def is_number(value: Json) -> bool:
    return isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)


def bounds(schemas: SchemaRules, parts: Parts) -> tuple[Bound | None, Bound | None, list[Decimal]]:
    low: Bound | None = None
    high: Bound | None = None
    divisors: list[Decimal] = []
    for schema, pointer in parts:
        for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf"):
            if key not in schema:
                continue
            try:
                value = Decimal(str(schema[key])) if not isinstance(schema[key], bool) else Decimal()
                assert value.is_finite() and abs(value.adjusted()) < 400
            except (InvalidOperation, AssertionError):
                schemas.fail(at(pointer, key), f"{key} must be a finite number; got {schema[key]!r}.")
            if isinstance(schema[key], bool):  # draft 4: it is looked at beside the bound
                continue
            exclusive = key.startswith("exclusive") or schema.get(f"exclusive{key[0].upper()}{key[1:]}") is True
            if key == "multipleOf":
                divisors.append(value)
            elif key.endswith("inimum"):
                low = (value, exclusive) if low is None or (value, exclusive) > low else low
            else:
                high = (value, exclusive) if high is None or (value, not exclusive) < (high[0], not high[1]) else high
    return low, high, divisors


def number_rule(schemas: SchemaRules, parts: Parts, integer: bool) -> Expression:
    low, high, divisors = bounds(schemas, parts)
    apart = [Decimal(str(schema[NOT_MULTIPLE])) for schema, _ in parts if NOT_MULTIPLE in schema]
    if any(NOT_INTEGER in schema for schema, _ in parts):
        apart.append(Decimal(1))
    values = [value for schema, _ in parts for value in schema.get(NOT_ENUM, ()) if is_number(value)]
    values = [Decimal(str(value)) for value in values]
    try:
        return numbers(integer, low, high, tuple(divisors), tuple(apart), tuple(values))
    except GrammarError as error:
        where = next((p for s, p in parts if "multipleOf" in s or NOT_MULTIPLE in s), "")
        schemas.unsupported(where, str(error.message).removesuffix(" is not supported."), error.hint or "")
        return number_automaton(integer, low, high, [])


@lru_cache(maxsize=256)
def numbers(
    integer: bool,
    low: Bound | None,
    high: Bound | None,
    divisors: tuple[Decimal, ...],
    apart: tuple[Decimal, ...],
    values: tuple[Decimal, ...],
) -> Expression:
    """Numbers by what is said of them; kept, because schemas repeat it."""
    return number_automaton(integer, low, high, list(divisors), list(apart), list(values))


def lengths(parts: Parts, low_key: str, high_key: str) -> tuple[int, int | None]:
    low = max((int(schema.get(low_key, 0)) for schema, _ in parts), default=0)
    highs = [int(schema[high_key]) for schema, _ in parts if high_key in schema]
    return low, min(highs) if highs else None


def string_automaton(schemas: SchemaRules, parts: Parts, with_lengths: bool = True) -> Automaton | None:
    """Contents of the string (no quotes) as an automaton over canonical spelling; None if nothing is asked."""
    low, high = lengths(parts, "minLength", "maxLength")
    result = pattern_automaton(schemas, parts)
    if result is None or not with_lengths or (low == 0 and high is None):
        return result
    return counted(result, low, high)


def pattern_automaton(schemas: SchemaRules, parts: Parts) -> Automaton | None:
    """The same without the lengths."""
    wanted: list[Automaton] = []
    unwanted: list[Automaton] = []
    for schema, pointer in parts:
        for key, found in (("pattern", wanted), (NOT_PATTERN, unwanted)):
            if key in schema:
                try:
                    found.append(pattern(schema[key], True))
                except GrammarError as error:
                    schemas.unsupported(at(pointer, "pattern"), f"this pattern ({error.message})", error.hint or "")
        for key, found in (("format", wanted), (NOT_FORMAT, unwanted)):
            if key in schema:
                expression = FORMATS.get(schema[key])
                if expression is not None:
                    found.append(pattern(expression, False))
                elif schema[key] in REFUSED_FORMATS:
                    schemas.unsupported(
                        at(pointer, "format"), f"the format {schema[key]!r}", REFUSED_FORMATS[schema[key]]
                    )
                elif schema[key] not in SILENT_FORMATS:
                    schemas.warn(
                        f"{at(pointer, 'format')}: the format {schema[key]!r} is not known and says nothing. "
                        f"Known: {', '.join(FORMATS)}."
                    )
        if NOT_ENUM in schema:
            unwanted.append(listed(tuple(value for value in schema[NOT_ENUM] if isinstance(value, str))))
    if not wanted and not unwanted:
        return None
    result = wanted[0] if wanted else canonical_text()
    hows: tuple[tuple[list[Automaton], Literal["and", "minus"]], ...] = ((wanted[1:], "and"), (unwanted, "minus"))
    for automata, how in hows:
        for other in automata:
            result = schemas.joined(how, result, other)
    return result


@lru_cache(maxsize=256)
def pattern(expression: str, search: bool) -> Automaton:
    """A pattern over canonical spelling; kept, because schemas repeat their patterns."""
    found = regex_automaton(expression, search, CANONICAL, spell)
    return minimise(found) if is_deterministic(found) else found


@lru_cache(maxsize=256)
def listed(values: tuple[str, ...]) -> Automaton:
    """These strings."""
    return trie([inner(value) for value in values])


@lru_cache(maxsize=1)
def canonical_text() -> Automaton:
    """All strings, as ``json.dumps(..., ensure_ascii=False)`` spells them."""
    return minimise(build(star(CANONICAL)))


@lru_cache(maxsize=1)
def free_string() -> Automaton:
    """Any string with its quotes, in any spelling."""
    return minimise(build(seq(QUOTE, star(FREE), QUOTE)))


def string_rule(schemas: SchemaRules, parts: Parts) -> Expression:
    automaton = string_automaton(schemas, parts)
    if automaton is not None:
        if len(automaton) <= INLINE:
            return seq(QUOTE, automaton, QUOTE)
        name = f"pattern_{len(schemas.rules)}"
        schemas.rules[name] = automaton  # a rule of its own: it is taken as it is
        return seq(QUOTE, Ref(name), QUOTE)
    low, high = lengths(parts, "minLength", "maxLength")
    if low == 0 and high is None:
        return Ref("string")
    if high is not None and high < low:
        return NOTHING
    name = f"chars_{low}_{high}"
    if name not in schemas.rules:  # a rule of its own: strings of equal length share it
        schemas.rules[name] = Repeat(COUNTED, low, high)
    return seq(QUOTE, Ref(name), QUOTE)
