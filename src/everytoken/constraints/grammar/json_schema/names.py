"""The strings of any schema as one automaton: for the names of properties, and where many conditions meet.

Strings in canonical spelling are a regular language, so ``allOf``, ``anyOf``, ``oneOf`` and ``not`` are operations on
automata; each is made minimal before the next.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..automaton import Automaton
from .rules import SchemaRules
from .sets import Place, Schema, SchemaObject, at, kinds
from .strings_and_numbers import canonical_text, listed, string_automaton
from .values import satisfies


def names_automaton(schemas: SchemaRules, naming: list[Place]) -> Automaton | None:
    """Names (canonical spelling, no quotes) that satisfy all these schemas; None if every name does."""
    if all(schema is True or schema == {} for schema, _ in naming):
        return None
    return strings_of(schemas, naming)


def strings_of(schemas: SchemaRules, places: Iterable[Place]) -> Automaton:
    """The strings that satisfy all these schemas."""
    result: Automaton | None = None
    for schema, pointer in places:
        found = _strings(schemas, schema, pointer)
        result = found if result is None else schemas.joined("and", result, found)
    return canonical_text() if result is None else result


def _strings(schemas: SchemaRules, schema: Schema, pointer: str) -> Automaton:
    if isinstance(schema, bool) or schema == {}:
        return canonical_text() if schema is not False else listed(())
    index = schemas.number(schema, pointer)
    known = schemas.strings.get(index, 0)
    if known is None:
        schemas.fail(pointer, "a $ref leads back to itself without describing anything.", "Break the cycle.")
    if not isinstance(known, Automaton):
        schemas.strings[index] = None  # open
        known = schemas.strings[index] = _combined(schemas, schema, pointer)
    return known


def _combined(schemas: SchemaRules, schema: SchemaObject, pointer: str) -> Automaton:
    if "string" not in kinds([(schema, pointer)]):
        return listed(())

    def of(part: Schema, where: str) -> Automaton:
        return _strings(schemas, part, at(pointer, where))

    def opposite(automaton: Automaton) -> Automaton:
        return schemas.joined("minus", canonical_text(), automaton)

    own = string_automaton(schemas, [(schema, pointer)])
    result = canonical_text() if own is None else own
    if own is None and ("minLength" in schema or "maxLength" in schema):
        result = schemas.counted(result, schema)
    if "enum" in schema or "const" in schema:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        strings = [value for value in values if isinstance(value, str)]
        result = listed(tuple(value for value in strings if satisfies(schemas, value, [(schema, pointer)])))
    conditions: list[Automaton] = []
    if "$ref" in schema:
        target, where = schemas.resolve(schema["$ref"], schema, pointer)
        conditions.append(_strings(schemas, target, where))
    conditions += [of(branch, f"allOf/{place}") for place, branch in enumerate(schema.get("allOf", ()))]
    for key in ("anyOf", "oneOf"):
        if key in schema:
            once = twice = listed(())
            for place, branch in enumerate(schema[key]):
                found = of(branch, f"{key}/{place}")
                if key == "oneOf":
                    twice = schemas.joined("or", twice, schemas.joined("and", once, found))
                once = schemas.joined("or", once, found)
            conditions.append(once if key == "anyOf" else schemas.joined("minus", once, twice))
    if "not" in schema:
        conditions.append(opposite(of(schema["not"], "not")))
    if "if" in schema and ("then" in schema or "else" in schema):
        condition = of(schema["if"], "if")
        yes = schemas.joined("and", condition, of(schema.get("then", True), "then"))
        no = schemas.joined("minus", of(schema.get("else", True), "else"), condition)
        conditions.append(schemas.joined("or", yes, no))
    for condition in conditions:
        result = schemas.joined("and", result, condition)
    return result
