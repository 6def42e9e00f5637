"""Sets whose schemas branch or list values: ``anyOf``, ``oneOf``, ``enum`` and ``const``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import NoReturn

from ..expressions import Expression, GrammarError, alt
from ..json_text import Json
from ..products import intersection
from .places import property_schemas, required
from .rules import SchemaRules
from .sets import Member, Parts, Place, Schema, SchemaObject, at, kinds
from .strings_and_numbers import bounds, lengths, string_automaton
from .values import satisfies

MAX_CASES = 20_000
MAX_COMPARED, MAX_LEVEL = 8, 4
"""So many branching schemas of a set are compared, and so many properties deep a contradiction is looked for."""
BESIDE = {"type", "required", "properties", "patternProperties", "additionalProperties", "allOf", "$ref"}
"""Keywords beside a oneOf that may tell its branches apart."""
MAX_PRODUCT = 1_000_000
"""Patterns whose automata are larger together are not looked at for a text that both match."""


def branching(schema: SchemaObject) -> bool:
    return "anyOf" in schema or "oneOf" in schema


def branches(schemas: SchemaRules, members: frozenset[Member], undecided: list[int], depth: int) -> Expression:
    """The documents of a set some of whose schemas branch: one of these is decided.

    The one that leaves the fewest cases comes first: what follows from the rest is not multiplied by it.
    """
    made: list[frozenset[Member]] | None = None
    for index in undecided[:MAX_COMPARED]:
        found = cases(schemas, members, index)
        if made is None or len(found) < len(made):
            made = found
        if len(made) < 2:
            break
    assert made is not None
    if len(undecided) > 1:
        schemas.cases += len(made)
    if schemas.cases > MAX_CASES:
        refuse_cases(schemas, schemas.pointers[undecided[0]])
    return alt(*(schemas.rule(choice, depth) for choice in made))


def refuse_cases(schemas: SchemaRules, pointer: str) -> NoReturn:
    schemas.fail(
        pointer, f"anyOf and oneOf that hold together make more than {MAX_CASES:,} cases.", "Split the schema."
    )


def cases(schemas: SchemaRules, members: frozenset[Member], index: int) -> list[frozenset[Member]]:
    """The sets that one branching schema of a set makes of it, without those that evidently allow nothing."""
    schema, pointer = schemas.part(index)
    rest = (members - {(index, False)}) | {(index, True)}
    choices: list[list[Place]] = [[]]
    for key in ("anyOf", "oneOf"):
        if key not in schema:
            continue
        options = branches_of(schemas, index, key)
        choices = [[*chosen, option] for chosen in choices for option in options]
        if len(choices) > MAX_CASES:
            refuse_cases(schemas, pointer)
    present = {member for member, _ in members}
    made: list[frozenset[Member]] = []
    for chosen in choices:
        extra = schemas.members(chosen)
        if extra is None:
            continue
        if all(member in present for member, _ in extra):
            return [rest]  # holds anyway: nothing is left to choose
        undecided = {member for member in extra if (member[0], True) not in rest}
        case = frozenset(rest | undecided)
        if not hopeless(schemas, case):
            made.append(case)
    return list(dict.fromkeys(made))


def hopeless(schemas: SchemaRules, members: frozenset[Member], level: int = 0) -> bool:
    """Whether no document evidently satisfies a set: no type, no listed value, no value of a required property."""
    numbers = frozenset(member for member, _ in members)
    known = schemas.hopeless.get(numbers)
    if known is None and level < MAX_LEVEL:
        schemas.hopeless[numbers] = False  # a set that leads back to itself is not evident
        known = schemas.hopeless[numbers] = contradictory(schemas, [schemas.part(n) for n in sorted(numbers)], level)
    return bool(known)


def contradictory(schemas: SchemaRules, parts: Parts, level: int = 0) -> bool:
    """Whether the parts evidently exclude each other."""
    allowed = kinds(parts)
    if not allowed:
        return True
    if any("enum" in schema or "const" in schema for schema, _ in parts):
        for schema, _ in parts:
            if branching(schema):
                refuse_cycle(schemas, schemas.numbers[id(schema)])
        return not listed_values(schemas, parts)
    if allowed == ["object"]:
        for name in required(parts):
            if any(name in schema.get("properties", ()) for schema, _ in parts):
                value = schemas.members(property_schemas(schemas, parts, name))
                if value is None or hopeless(schemas, value, level + 1):
                    return True
    if allowed == ["string"]:
        low, high = lengths(parts, "minLength", "maxLength")
        return high is not None and high < low
    return False


def refuse_cycle(schemas: SchemaRules, index: int) -> None:
    """Raises where anyOf, oneOf, allOf and $ref lead from a schema back to itself at the same place of the document."""
    stack = [(index, branches_in_place(schemas, index))] if index not in schemas.walked else []
    schemas.walked.setdefault(index, False)  # open; True once nothing below leads back
    while stack:
        current, following = stack[-1]
        member = next(following, None)
        if member is None:
            schemas.walked[current] = True
            stack.pop()
        elif member not in schemas.walked:
            schemas.walked[member] = False
            stack.append((member, branches_in_place(schemas, member)))
        elif not schemas.walked[member]:
            schemas.fail(
                schemas.pointers[member],
                "a $ref leads back to itself without describing anything.",
                "Break the cycle.",
            )


def branches_in_place(schemas: SchemaRules, index: int) -> Iterator[int]:
    """The sub-schemas that the branches of one bring along for the same place of the document."""
    schema, pointer = schemas.schemas[index], schemas.pointers[index]
    for key in ("anyOf", "oneOf"):
        for place, branch in enumerate(schema.get(key, ()) if isinstance(schema, dict) else ()):
            if not isinstance(branch, bool):
                yield from schemas.flatten(schemas.number(branch, at(pointer, f"{key}/{place}")))


def branches_of(schemas: SchemaRules, index: int, key: str) -> list[Place]:
    """Schemas of which one holds where the anyOf (oneOf) of a sub-schema does."""
    schema, pointer = schemas.part(index)
    options: list[Place] = [(branch, at(pointer, f"{key}/{place}")) for place, branch in enumerate(schema[key])]
    if key == "anyOf":
        return options
    if index not in schemas.exclusive:
        beside = {key: value for key, value in schema.items() if key in BESIDE}
        schemas.exclusive[index] = exclusive_branches(schemas, options, (beside, pointer))
    return schemas.exclusive[index]


def exclusive_branches(schemas: SchemaRules, options: list[Place], beside: Place) -> list[Place]:
    """oneOf is anyOf of its branches without what the others allow, where they are not evidently disjoint already.

    Branches may be disjoint only for what stands ``beside`` them: properties that tell them apart are required there.
    """
    others: list[list[Schema]] = [[] for _ in options]
    mode, schemas.options = schemas.options, replace(schemas.options, strict_mode=False)
    try:
        for first, second in combinations(range(len(options)), 2):
            one, other = options[first], options[second]
            if not disjoint(schemas, [one], [other]) and not (beside[0] and disjoint(schemas, [one, beside], [other])):
                others[first].append({"not": options[second][0]})
                others[second].append({"not": options[first][0]})
    finally:
        schemas.options = mode
    return [
        ({"allOf": [branch, *excluded]}, pointer) if excluded else (branch, pointer)
        for (branch, pointer), excluded in zip(options, others, strict=True)
    ]


def disjoint(schemas: SchemaRules, first: Sequence[Place], second: Sequence[Place], level: int = 0) -> bool:
    """Whether evidently no document satisfies both; False when in doubt."""
    if level > 4:
        return False
    mine, theirs = schemas.expand(first), schemas.expand(second)
    if mine is None or theirs is None:
        return True
    for parts, other in ((mine, theirs), (theirs, mine)):
        for schema, pointer in parts:
            for key in ("anyOf", "oneOf"):
                if key in schema and all(
                    disjoint(schemas, [(branch, at(pointer, f"{key}/{i}"))], other, level + 1)
                    for i, branch in enumerate(schema[key])
                ):
                    return True
            values = schema.get("enum", [schema["const"]] if "const" in schema else None)
            if values is not None and not any(satisfies(schemas, value, list(other)) for value in values):
                return True
    types, others = set(kinds(mine)), set(kinds(theirs))
    shared = {
        k
        for k in types
        if k in others or (k == "integer" and "number" in others) or (k == "number" and "integer" in others)
    }
    if not shared:
        return True
    if shared <= {"number", "integer"}:
        low, high, _ = bounds(schemas, [*mine, *theirs])
        if low is not None and high is not None and (low[0] > high[0] or (low[0] == high[0] and (low[1] or high[1]))):
            return True
    if shared == {"object"}:
        for parts, other in ((mine, theirs), (theirs, mine)):
            for name in required(parts):
                here, there = property_schemas(schemas, parts, name), property_schemas(schemas, other, name)
                if disjoint(schemas, here, there, level + 1):
                    return True
    if shared == {"string"}:
        try:
            pair = [string_automaton(schemas, parts) for parts in (mine, theirs)]
            if pair[0] is not None and pair[1] is not None:
                return len(pair[0]) * len(pair[1]) < MAX_PRODUCT and intersection(pair[0], pair[1]).empty
        except GrammarError:
            return False
    return False


def listed_values(schemas: SchemaRules, parts: Parts) -> list[Json]:
    """The values of parts that list values."""
    lists = [
        (schema["enum"] if "enum" in schema else [schema["const"]], place)
        for place, (schema, _) in enumerate(parts)
        if "enum" in schema or "const" in schema
    ]
    shortest, place = min(lists, key=lambda pair: len(pair[0]))
    others = list(parts)
    schema, pointer = parts[place]  # its own values need not be looked for among themselves
    own = "enum" if "enum" in schema else "const"
    others[place] = (schemas.without(schema, own), pointer)
    return [value for value in shortest if satisfies(schemas, value, others, closed=True)]


def enumeration(schemas: SchemaRules, parts: Parts, depth: int) -> Expression:
    return alt(*(schemas.literal(value, depth) for value in listed_values(schemas, parts)))
