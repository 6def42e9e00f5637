"""Objects: declared properties in their order (or in any), further ones after them, and how many there may be.

Claims say that some property exists whose name and value satisfy schemas (the opposite of ``patternProperties`` and
its like): a choice of claims that it fulfils is part of every entry, and what has been fulfilled part of the state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from ..automaton import Automaton, run_starts
from ..expressions import EMPTY, NOTHING, Bytes, Expression, Graph, Ref, Seq, alt, seq
from ..json_text import QUOTE, inner
from ..tries import name_tries
from .names import names_automaton
from .negation import SOME_PROPERTY
from .places import key_automaton, otherwise, property_schemas, required
from .rules import SchemaRules
from .sets import Member, Parts, Place, SchemaObject, at, escaped
from .strings_and_numbers import INLINE, canonical_text, lengths, listed
from .values import satisfies

MAX_ANY_ORDER = 10
MAX_EXACT, MAX_FREE = 7, 10
"""``flexible``: objects of up to ``MAX_EXACT`` properties are written in any order and each once; up to ``MAX_FREE``
required ones of larger objects come in any order."""
MAX_OPTIONAL = 500
"""Of counted ones: after any of them each later one may follow, which makes the automaton's size the square of their
number."""
MAX_CELLS, MAX_CLAIMS = 64, 6
Entry = tuple[str, dict[int, Expression]]
"""A property's name, and its key and value by the claims (as bits) that they fulfil."""
Filled = tuple[Expression, bool]
"""At least one entry; and whether none is fine too."""


def object_rule(schemas: SchemaRules, parts: Parts, depth: int) -> Expression:
    opening, between, closing, colon = schemas.separators(depth)
    needed = set(required(parts))
    names = declared_names(schemas, parts)
    naming = [(s["propertyNames"], at(p, "propertyNames")) for s, p in parts if "propertyNames" in s]
    claims = claims_of(schemas, parts)
    entries: list[Entry] = []
    for name in names:
        allowed = not naming or satisfies(schemas, name, schemas.expand(naming))
        possible = [n for n, claim in enumerate(claims) if claim.names is None or claim.names.matches(inner(name))]
        nothing: list[tuple[bool | dict[str, Any], str]] = [(False, "")]
        applying = property_schemas(schemas, parts, name) if allowed else nothing
        values = dict(claimed(schemas, applying, claims, possible))
        if not values:
            if name in needed:
                return NOTHING
            continue
        key = schemas.key(name)
        made = {bits: seq(key, colon, schemas.rule(value, depth + 1)) for bits, value in values.items()}
        entries.append((name, made))
    low, high = lengths(parts, "minProperties", "maxProperties")
    extra = further_entries(schemas, parts, names, naming, claims, depth, colon)
    sure = sum(name in needed for name, _ in entries)
    if high is not None and high < sure:
        return NOTHING
    if not extra and (low > len(entries) or (high is not None and high >= len(entries))):
        if low > len(entries):
            return NOTHING
        high = None  # there are no more properties than that
    counted = high is not None or low > sure
    limit = high if high is not None else low
    if counted and limit * (len(entries) + 1) > 100_000:
        schemas.fail(parts[0][1], "minProperties or maxProperties is too large here.", "Lower it.")
    shape = Shape(low if counted else 0, high, (high if high is not None else low) if counted else 0, len(claims))
    order = schemas.options.property_order
    if len(entries) > 1 and (order == "any" or (order == "flexible" and len(entries) <= MAX_EXACT)):
        graph = any_order(schemas, entries, needed, extra, between, shape, parts[0][1])
    elif order == "flexible" and len(entries) > 1 and not counted and not claims:
        graph = flexible_order(schemas, entries, required(parts), extra, between)
    else:  # names that may be written twice cannot be counted, nor fulfil a claim for sure
        if (counted or claims) and sum(name not in needed for name, _ in entries) > MAX_OPTIONAL:
            schemas.fail(
                parts[0][1],
                f"more than {MAX_OPTIONAL:,} optional properties in one object whose properties are counted.",
                "Make some required, or group them.",
            )
        graph = in_order(entries, needed, extra, between, shape)
        places = {name: place for place, name in enumerate(required(parts))}
        other = sorted(entries, key=lambda entry: places.get(entry[0], len(places)))  # stable: the rest keeps its order
        if order in ("required_first", "flexible") and graph is not None and other != entries:
            second = in_order(other, needed, extra, between, shape)
            assert second is not None
            graph = alt(graph[0], second[0]), graph[1]
    if graph is None:
        return NOTHING
    filled, empty = graph
    if schemas.options.indent is not None or not schemas.free_layout:
        # an empty object has nothing between its braces
        whole = seq(Bytes(b"{"), opening, filled, closing, Bytes(b"}"))
        return alt(whole, Bytes(b"{}")) if empty else whole
    return seq(Bytes(b"{"), opening, alt(seq(filled, closing), EMPTY) if empty else seq(filled, closing), Bytes(b"}"))


def declared_names(schemas: SchemaRules, parts: Parts) -> list[str]:
    """Properties in their order: what a ``$ref`` brings comes before what is said beside it."""
    by_number = {schemas.numbers[id(schema)]: schema for schema, _ in parts}
    ordered: dict[int, SchemaObject] = {}
    pending = [(schema, pointer, False) for schema, pointer in reversed(parts)]
    while pending:
        schema, pointer, ready = pending.pop()
        number = schemas.numbers[id(schema)]
        if number in ordered:
            continue
        target = schemas.resolve(schema["$ref"], schema, pointer) if "$ref" in schema and not ready else None
        before = None if target is None else by_number.get(schemas.number(*target))
        if target is None or before is None:
            ordered[number] = schema
        else:
            pending += [(schema, pointer, True), (before, target[1], False)]
    names = dict.fromkeys(name for schema in ordered.values() for name in schema.get("properties", ()))
    return list(names | dict.fromkeys(required(parts)))


@dataclass
class Shape:
    """How many properties there may be (counted up to ``top``), and how many claims must be fulfilled."""

    low: int
    high: int | None
    top: int
    claims: int

    def full(self, count: int) -> bool:
        return self.high is not None and count >= self.high

    def complete(self, count: int, fulfilled: int) -> bool:
        return count >= self.low and fulfilled == (1 << self.claims) - 1


def in_order(
    entries: list[Entry], required: set[str], extra: dict[int, Expression], between: Expression, shape: Shape
) -> Filled | None:
    """``(graph of at least one entry, whether none is fine too)``; states are (place, any yet, how many, claims)."""
    if entries and not shape.top and not shape.claims:
        return by_tries(entries, required, extra, between)
    states: dict[tuple[int, bool, int, int], int] = {}
    order: list[tuple[int, bool, int, int]] = []

    def state(place: int, any_yet: bool, count: int, fulfilled: int) -> int:
        key = (place, any_yet, min(count, shape.top), fulfilled)
        if key not in states:
            states[key] = len(states)
            order.append(key)
        return states[key]

    state(0, False, 0, 0)
    edges: list[tuple[int, Expression, int]] = []
    finals = set()
    empty = False
    for place, any_yet, count, fulfilled in order:
        here = states[place, any_yet, count, fulfilled]
        last = place == len(entries)
        if not last and entries[place][0] not in required:
            edges.append((here, EMPTY, state(place + 1, any_yet, count, fulfilled)))
        for bits, entry in (extra if last else entries[place][1]).items() if not shape.full(count) else ():
            if not bits & fulfilled:
                to = state(place if last else place + 1, True, count + 1, fulfilled | bits)
                edges.append((here, seq(between, entry) if any_yet else entry, to))
        if last and shape.complete(count, fulfilled):
            if any_yet:
                finals.add(here)
            else:
                empty = True
    if not finals and not empty:
        return None
    return Graph(len(states), tuple(edges), frozenset(finals)), empty


def by_tries(entries: list[Entry], required: set[str], extra: dict[int, Expression], between: Expression) -> Filled:
    """``in_order`` where nothing is counted or claimed: for each place a trie of the names that may follow.

    The trie of a place is that of the next one and a name, with which it shares all but the name's own path. So all of
    them together are as large as the names, where separate ones, or an edge from each property to each later one,
    would be as large as the square of their number.
    """
    last = len(entries)
    names = [key.data for key in (entry.parts[0] for entry in firsts(entries)) if isinstance(key, Bytes)]
    needed = np.array([name in required for name, _ in entries], np.bool_)
    data = np.frombuffer(b"".join(names), np.uint8)
    roots, source, byte, target, size = name_tries(data, run_starts([len(name) for name in names]), needed)
    open_from = [True, *np.logical_and.accumulate(~needed[::-1]).tolist()][::-1]  # whether no required one is left
    # states: 0 .. last after so many places, then the ends of the names, then the nodes of the tries
    base = 2 * last + 1
    starts = [*(roots[:-1] + base).tolist(), 0]
    edges: list[tuple[int, Expression, int]] = []
    for place in range(last + 1):
        further = extra if open_from[place] else {}
        if further and place == last:
            starts[place] = base + size
            size += 1
        if place < last or further:
            edges.append((place, between if place else EMPTY, starts[place]))
        edges += [(starts[place], entry, last) for entry in further.values()]
    edges += [(last + 1 + n, seq(*entry.parts[1:]), n + 1) for n, entry in enumerate(firsts(entries))]
    finals = frozenset(place for place in range(1, last + 1) if open_from[place])
    reads = (
        tuple((source + base).tolist()),
        byte.astype(np.uint8).tobytes(),
        tuple(np.where(target < 0, last - target, target + base).tolist()),
    )
    return Graph(base + size, tuple(edges), finals, reads), open_from[0]


def firsts(entries: list[Entry]) -> Iterator[Seq]:
    """Entries that fulfil no claim: key, colon and value."""
    for _, made in entries:
        entry = made[0]
        assert isinstance(entry, Seq) and isinstance(entry.parts[0], Bytes)
        yield entry


def any_order(
    schemas: SchemaRules,
    entries: list[Entry],
    required: set[str],
    extra: dict[int, Expression],
    between: Expression,
    shape: Shape,
    pointer: str,
) -> Filled | None:
    if len(entries) > MAX_ANY_ORDER:
        schemas.fail(
            pointer,
            f"property_order='any' with {len(entries)} properties.",
            f"At most {MAX_ANY_ORDER} are possible.",
        )
    need = sum(1 << place for place, (name, _) in enumerate(entries) if name in required)
    pairs: list[dict[int, Expression]] = []
    for place, (_, made) in enumerate(entries):
        pairs.append({})
        for bits, entry in made.items():
            name = f"entry_{len(schemas.rules)}_{place}"
            schemas.rules[name] = entry
            pairs[-1][bits] = Ref(name)
    states: dict[tuple[int, bool, int, int], int] = {(0, False, 0, 0): 0}
    order = [(0, False, 0, 0)]
    edges: list[tuple[int, Expression, int]] = []
    finals, empty = set(), False
    for used, any_yet, count, fulfilled in order:
        here = states[used, any_yet, count, fulfilled]
        moves: list[tuple[int, int, Expression]] = [
            (used | 1 << place, bits, entry)
            for place, pair in enumerate(pairs)
            if not used >> place & 1
            for bits, entry in pair.items()
        ]
        moves += [(used, bits, entry) for bits, entry in extra.items()]
        for mask, bits, entry in moves if not shape.full(count) else []:
            if bits & fulfilled:
                continue
            key = (mask, True, min(count + 1, shape.top), fulfilled | bits)
            if key not in states:
                states[key] = len(states)
                order.append(key)
            edges.append((here, seq(between, entry) if any_yet else entry, states[key]))
        if used & need == need and shape.complete(count, fulfilled):
            if any_yet:
                finals.add(here)
            else:
                empty = True
    return (Graph(len(states), tuple(edges), frozenset(finals)), empty) if finals or empty else None


def flexible_order(
    schemas: SchemaRules, entries: list[Entry], needed: list[str], extra: dict[int, Expression], between: Expression
) -> Filled:
    """Optional properties at any place; required ones in any order if they are few, otherwise in one of two orders.

    States are the required properties that have been written. The optional ones are not remembered: a name may come
    twice, and both of its values satisfy the schema.
    """
    keys: dict[tuple[Expression, ...], list[Expression]] = {}  # by colon and value, which many share
    for name, made in entries:
        if name not in needed:
            assert isinstance(made[0], Seq)
            keys.setdefault(made[0].parts[1:], []).append(made[0].parts[0])
    optional = [seq(alt(*names), *rest) for rest, names in keys.items()]
    optional += extra.values()
    others: Expression = NOTHING
    if optional:
        name = f"optional_{len(schemas.rules)}"
        schemas.rules[name] = alt(*optional)
        others = Ref(name)
    keyed: dict[str, Expression] = {}
    for place, (name, made) in enumerate(entries):
        if name in needed:
            rule = f"entry_{len(schemas.rules)}_{place}"
            schemas.rules[rule] = made[0]
            keyed[name] = Ref(rule)
    if len(keyed) <= MAX_FREE:
        graph: Expression = subsets(list(keyed.values()), others, between)
    else:
        lanes = [list(keyed.values()), [keyed[name] for name in needed]]
        graph = alt(*(in_turn(lane, others, between) for lane in lanes))
    return graph, not keyed


def subsets(wanted: list[Expression], others: Expression, between: Expression) -> Graph:
    """All of ``wanted`` in any order, and any number of ``others`` anywhere: at least one entry in all."""
    full = (1 << len(wanted)) - 1
    edges: list[tuple[int, Expression, int]] = []
    for used in range(full + 1):  # 2 used: where an entry may start; 2 used + 1: after one
        edges += [(2 * used, entry, 2 * (used | 1 << n) + 1) for n, entry in enumerate(wanted) if not used >> n & 1]
        if others != NOTHING:
            edges.append((2 * used, others, 2 * used + 1))
        if used != full or others != NOTHING:
            edges.append((2 * used + 1, between, 2 * used))
    return Graph(2 * full + 2, tuple(edges), frozenset({2 * full + 1}))


def in_turn(wanted: list[Expression], others: Expression, between: Expression) -> Graph:
    """The same with ``wanted`` in this order."""
    last = len(wanted)
    edges: list[tuple[int, Expression, int]] = []
    for place in range(last + 1):
        if place < last:
            edges.append((2 * place, wanted[place], 2 * place + 3))
        if others != NOTHING:
            edges.append((2 * place, others, 2 * place + 1))
        if place < last or others != NOTHING:
            edges.append((2 * place + 1, between, 2 * place))
    return Graph(2 * last + 2, tuple(edges), frozenset({2 * last + 1}))


@dataclass
class Cell:
    """Names of further properties that the same patterns match.

    Attributes:
        names: their automaton; None for all names.
        patterns: the ``patternProperties`` that match them.
        claims: which properties that must exist (``Claim``) they can be.
    """

    names: Automaton | None
    patterns: frozenset[str]
    claims: frozenset[int]


@dataclass
class Claim:
    """Some property has one of these names and such a value."""

    names: Automaton | None
    value: Place


def claims_of(schemas: SchemaRules, parts: Parts) -> list[Claim]:
    found = []
    for schema, pointer in parts:
        if SOME_PROPERTY in schema:
            names, value = schema[SOME_PROPERTY]
            found.append(Claim(names_automaton(schemas, [(names, pointer)]), (value, pointer)))
    if len(found) > MAX_CLAIMS:
        schemas.fail(parts[0][1], f"more than {MAX_CLAIMS} properties that must exist by a pattern.", "Say less.")
    return found


def cells(schemas: SchemaRules, parts: Parts, names: list[str], naming: list[Place], claims: list[Claim]) -> list[Cell]:
    """All names beyond the declared ones, cut along the patterns."""
    patterns = list(dict.fromkeys(p for schema, _ in parts for p in schema.get("patternProperties", ())))
    if not patterns and schemas.members(beyond(schemas, parts, frozenset())) is None:
        return []  # as most objects: there are no further properties
    key = names_automaton(schemas, naming)
    if key is None and (names or patterns or any(claim.names for claim in claims)):
        key = canonical_text()
    if names and key is not None:
        key = schemas.joined("minus", key, listed(tuple(sorted(names))))
    found = [Cell(key, frozenset(), frozenset())]

    def cut(cell: Cell, other: Automaton, inside: Cell) -> list[Cell]:
        assert cell.names is not None
        pieces = [
            replace(inside, names=schemas.joined("and", cell.names, other)),
            replace(cell, names=schemas.joined("minus", cell.names, other)),
        ]
        return [piece for piece in pieces if piece.names is not None and not piece.names.empty]

    for pattern in patterns:
        other = key_automaton(schemas, pattern, parts[0][1])
        found = [p for cell in found for p in cut(cell, other, replace(cell, patterns=cell.patterns | {pattern}))]
    for place, claim in enumerate(claims):
        if claim.names is None:
            found = [replace(cell, claims=cell.claims | {place}) for cell in found]
        else:
            found = [p for cell in found for p in cut(cell, claim.names, replace(cell, claims=cell.claims | {place}))]
    if len(found) > MAX_CELLS:
        schemas.fail(
            parts[0][1],
            f"patternProperties that match {len(found)} different kinds of names together.",
            "Join patterns whose schemas are equal.",
        )
    return [cell for cell in found if cell.names is None or not cell.names.empty]


def beyond(schemas: SchemaRules, parts: Parts, patterns: frozenset[str]) -> list[Place]:
    """What applies to the value of a property that is not declared and whose name these patterns match."""
    applying: list[Place] = []
    for schema, pointer in parts:
        mine = [p for p in schema.get("patternProperties", {}) if p in patterns]
        applying += [(schema["patternProperties"][p], at(pointer, f"patternProperties/{escaped(p)}")) for p in mine]
        if not mine and "additionalProperties" in schema:
            applying.append((schema["additionalProperties"], at(pointer, "additionalProperties")))
    if not patterns and not any("additionalProperties" in schema for schema, _ in parts):
        applying += otherwise(schemas, parts, "unevaluatedProperties", ("properties", "patternProperties"))
    return applying


def further_entries(
    schemas: SchemaRules,
    parts: Parts,
    names: list[str],
    naming: list[Place],
    claims: list[Claim],
    depth: int,
    colon: Expression,
) -> dict[int, Expression]:
    """Keys and values beyond the declared ones, by the claims (as bits) that they fulfil."""
    options: dict[int, list[Expression]] = {}
    for cell in cells(schemas, parts, names, naming, claims):
        applying = beyond(schemas, parts, cell.patterns)
        key = Ref("string") if cell.names is None else seq(QUOTE, own_rule(schemas, cell.names), QUOTE)
        for bits, value in claimed(schemas, applying, claims, cell.claims):
            options.setdefault(bits, []).append(seq(key, colon, schemas.rule(value, depth + 1)))
    entries: dict[int, Expression] = {}
    for bits, found in options.items():
        name = f"further_{len(schemas.rules)}"
        schemas.rules[name] = alt(*found)
        entries[bits] = Ref(name)
    return entries


def claimed(
    schemas: SchemaRules, applying: list[Place], claims: list[Claim], possible: Iterable[int]
) -> Iterator[tuple[int, frozenset[Member]]]:
    """For every choice of claims that a property is to fulfil (as bits): the schemas of its value."""
    for size in range(len(claims) + 1):
        for chosen in combinations(sorted(possible), size):
            value = schemas.members([*applying, *(claims[place].value for place in chosen)])
            if value is not None:
                yield sum(1 << place for place in chosen), value


def own_rule(schemas: SchemaRules, automaton: Automaton) -> Expression:
    """Large automata become rules of their own, which are taken as they are."""
    if len(automaton) <= INLINE:
        return automaton
    name = f"names_{len(schemas.rules)}"
    schemas.rules[name] = automaton
    return Ref(name)
