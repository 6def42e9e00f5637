"""Arrays: items at the start one by one, then any number of one kind, and how many there may be.

``contains`` and its like make an item one of those counted or not; ``uniqueItems`` remembers which of few values have
been written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

from ..expressions import EMPTY, NOTHING, Bytes, Expression, Graph, Repeat, alt, optional, seq
from ..json_text import Json
from .combination import branches_of, branching, refuse_cycle
from .negation import SOME_ITEM, complement
from .places import further_items, otherwise, prefix_items
from .rules import SchemaRules
from .sets import Part, Parts, Place, at, kinds
from .strings_and_numbers import lengths
from .values import equal, satisfies

MAX_CLAIMS, MAX_DISTINCT, MAX_STATES = 4, 10, 20_000


@dataclass
class Claim:
    """Of the items from ``first`` on, ``low`` to ``high`` satisfy a schema."""

    first: int
    schema: Place
    low: int
    high: int | None


def array_rule(schemas: SchemaRules, parts: Parts, depth: int) -> Expression:
    low, high = lengths(parts, "minItems", "maxItems")
    prefixes = [(prefix_items(schema), further_items(schema), pointer) for schema, pointer in parts]
    size = max((len(prefix) for prefix, _, _ in prefixes), default=0)

    def item(place: int) -> list[Place]:
        found: list[Place] = []
        mentioned = False
        for prefix, rest, pointer in prefixes:
            if place < len(prefix):
                found.append((prefix[place], at(pointer, f"prefixItems/{place}")))
                mentioned = True
            elif rest is not None:
                found.append((rest, at(pointer, "items")))
                mentioned = True
        if not mentioned:
            found += otherwise(schemas, parts, "unevaluatedItems", ("prefixItems",))
        return found

    claims = claims_of(parts)
    if high is not None and high < low:
        return NOTHING
    unique = next((pointer for schema, pointer in parts if schema.get("uniqueItems") is True), None)
    if unique is not None and (high is None or high > 1):
        places = [item(place) for place in range(size + 1)]
        values = distinct_values(schemas, places, size + 1 if high is None else high)
        if values is not None:
            return unique_array(schemas, places, values, claims, low, high, depth)
        if schemas.members(places[-1]) is not None or size > 1:
            schemas.unsupported(
                unique,
                f"uniqueItems of items with more than {MAX_DISTINCT} possible values",
                "List the combinations with enum, or give the items an enum of few values.",
            )
    if claims:
        return counting_array(schemas, [item(place) for place in range(size + 1)], claims, low, high, depth)
    return plain_array(schemas, lambda place: schemas.sub(item(place), depth + 1), size, low, high, depth)


def claims_of(parts: Parts) -> list[Claim]:
    found = []
    for schema, pointer in parts:
        if "contains" in schema:
            low, high = int(schema.get("minContains", 1)), schema.get("maxContains")
            if low > 0 or high is not None:
                claim = (schema["contains"], at(pointer, "contains"))
                found.append(Claim(0, claim, low, None if high is None else int(high)))
        if SOME_ITEM in schema:
            first, wanted = schema[SOME_ITEM]
            found.append(Claim(first, (wanted, pointer), 1, None))
    return found


def plain_array(
    schemas: SchemaRules, item: Callable[[int], Expression], size: int, low: int, high: int | None, depth: int
) -> Expression:
    """The first ``size`` items have schemas of their own."""
    opening, between, closing, _ = schemas.separators(depth)
    fixed = [item(place) for place in range(size)]
    tail = item(size)
    open_ended = tail != NOTHING
    if not open_ended:
        high = size if high is None else min(high, size)
    if high is not None and high < low:
        return NOTHING
    options: list[Expression] = []
    following: Expression | None = None  # items from `place` on, each with its separator
    if open_ended and (high is None or high > size):
        least = max(low - size, 0)
        most = None if high is None else high - size
        if size == 0:
            more = Repeat(seq(between, tail), max(least - 1, 0), None if most is None else most - 1)
            options.append(seq(opening, tail, more, closing))
        else:
            following = Repeat(seq(between, tail), least, most)
    if size and (high is None or high > 0):
        chain: Expression = following if following is not None else EMPTY
        for place in reversed(range(1, min(size, high if high is not None else size))):
            here = seq(between, fixed[place], chain)
            chain = optional(here) if place >= low else here
        options.append(seq(opening, fixed[0], chain, closing))
    return bracketed(schemas, options, low == 0)


def bracketed(schemas: SchemaRules, options: list[Expression], empty: bool) -> Expression:
    """``options`` are the contents of arrays that have items."""
    if empty:
        options.append(schemas.blank() if schemas.free_layout else EMPTY)
    return seq(Bytes(b"["), alt(*options), Bytes(b"]")) if options else NOTHING


State = tuple[int, ...]
Moves = Iterator[tuple[Expression, State]]


def graph_array(
    schemas: SchemaRules,
    start: State,
    moves: Callable[[State], Moves],
    complete: Callable[[State], bool],
    depth: int,
    pointer: str,
) -> Expression:
    """An array whose items lead from state to state."""
    opening, between, closing, _ = schemas.separators(depth)
    states = {(start, False): 0}
    order = [(start, False)]
    edges: list[tuple[int, Expression, int]] = []
    finals: set[int] = set()
    for state, any_yet in order:
        here = states[state, any_yet]
        for entry, to in moves(state):
            key = (to, True)
            if key not in states:
                states[key] = len(states)
                order.append(key)
                if len(states) > MAX_STATES:
                    schemas.fail(pointer, "counting this array's items needs too many states.", "Lower maxItems.")
            edges.append((here, seq(between, entry) if any_yet else entry, states[key]))
        if any_yet and complete(state):
            finals.add(here)
    graph = Graph(len(states), tuple(edges), frozenset(finals))
    return bracketed(schemas, [seq(opening, graph, closing)] if finals else [], complete(start))


def counting_array(
    schemas: SchemaRules, places: list[list[Place]], claims: list[Claim], low: int, high: int | None, depth: int
) -> Expression:
    """States are how many items there are, and how many of them were counted for each claim."""
    if len(claims) > MAX_CLAIMS:
        schemas.fail(claims[0].schema[1], f"more than {MAX_CLAIMS} contains at one place.", "Join them.")
    top = max(len(places) - 1, low, high or 0, *(claim.first for claim in claims))
    tops = [claim.low if claim.high is None else claim.high for claim in claims]

    def moves(state: State) -> Moves:
        place, *counts = state
        if high is not None and place >= high:
            return
        possible = [
            n
            for n, claim in enumerate(claims)
            if place >= claim.first and (counts[n] < tops[n])  # what is counted in full is not looked for any more
        ]
        for size in range(len(possible) + 1):
            for chosen in combinations(possible, size):
                applying = [*places[min(place, len(places) - 1)], *(claims[n].schema for n in chosen)]
                for n, claim in enumerate(claims):
                    if claim.high is not None and n not in chosen:
                        applying.append(complement(schemas, *claim.schema))
                entry = schemas.sub(applying, depth + 1)
                if entry != NOTHING:
                    after = tuple(count + (n in chosen) for n, count in enumerate(counts))
                    yield entry, (min(place + 1, top), *after)

    def complete(state: State) -> bool:
        return state[0] >= low and all(count >= claim.low for count, claim in zip(state[1:], claims, strict=True))

    return graph_array(schemas, (0,) * (1 + len(claims)), moves, complete, depth, claims[0].schema[1])


def unique_array(
    schemas: SchemaRules,
    places: list[list[Place]],
    values: list[Json],
    claims: list[Claim],
    low: int,
    high: int | None,
    depth: int,
) -> Expression:
    """States are how many items there are, which values have been used, and the counts of claims."""
    allowed = [{n for n, value in enumerate(values) if satisfies(schemas, value, places_)} for places_ in places]
    fulfilled = [{n for n, value in enumerate(values) if satisfies(schemas, value, [c.schema])} for c in claims]

    def moves(state: State) -> Moves:
        place, used, *counts = state
        if high is not None and place >= high:
            return
        for n in sorted(allowed[min(place, len(places) - 1)]):
            after = [
                count + (n in held and place >= claim.first)
                for count, claim, held in zip(counts, claims, fulfilled, strict=True)
            ]
            if not used >> n & 1 and all(c.high is None or m <= c.high for m, c in zip(after, claims, strict=True)):
                yield schemas.literal(values[n], depth + 1), (place + 1, used | 1 << n, *after)

    def complete(state: State) -> bool:
        return state[0] >= low and all(count >= claim.low for count, claim in zip(state[2:], claims, strict=True))

    return graph_array(schemas, (0,) * (2 + len(claims)), moves, complete, depth, places[0][0][1])


def distinct_values(schemas: SchemaRules, places: list[list[Place]], most: int) -> list[Json] | None:
    """All values that the items can have, if they are few."""
    found: list[Json] = []
    for place in places:
        if place is places[-1] and len(places) > most:
            break
        values = few_values(schemas, place)
        if values is None:
            return None
        found += [value for value in values if not any(equal(value, other) for other in found)]
    return found if len(found) <= MAX_DISTINCT else None


def few_values(schemas: SchemaRules, place: list[Place], level: int = 0) -> list[Json] | None:
    """The values of a schema that lists them; None if it does not."""
    parts = schemas.expand(place)
    if parts is None:
        return []
    listed = next((s["enum"] if "enum" in s else [s["const"]] for s, _ in parts if "enum" in s or "const" in s), None)
    if listed is None and set(kinds(parts)) <= {"null", "boolean"}:
        simple: dict[str, list[Json]] = {"null": [None], "boolean": [True, False]}
        listed = [value for kind in kinds(parts) for value in simple[kind]]
    if listed is not None:
        for schema, _ in parts:
            if branching(schema):
                refuse_cycle(schemas, schemas.numbers[id(schema)])
        return [value for value in listed if satisfies(schemas, value, parts, closed=True)]
    for schema, _ in parts:
        if branching(schema) and level < 4:
            key = "anyOf" if "anyOf" in schema else "oneOf"
            options: list[Json] = []
            for option in branches_of(schemas, schemas.numbers[id(schema)], key):
                values = few_values(schemas, [*_places(parts), option], level + 1)
                if values is None:
                    return None
                options += values
            return options
    return None


def _places(parts: list[Part]) -> list[Place]:
    return [(schema, pointer) for schema, pointer in parts]
