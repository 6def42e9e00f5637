"""Objects: declared properties in their order (or in any), further ones after them, and how many there may be."""

from __future__ import annotations

from itertools import combinations

from ..automata import Automaton, build, difference, intersection, trie
from ..expressions import EMPTY, NOTHING, Bytes, Expression, Graph, Ref, Repeat, alt, seq, star
from ..json_text import CANONICAL, QUOTE, inner
from .places import key_automaton, otherwise, property_schemas, required
from .rules import SchemaRules
from .sets import Parts, Place, at, escaped, kinds
from .strings_and_numbers import lengths, string_automaton
from .values import satisfies

MAX_ANY_ORDER = 10
MAX_OPTIONAL = 500
"""After any of them each later one may follow, which makes the automaton's size the square of their number."""
MAX_PATTERNS = 4
Entry = tuple[str, Expression]
"""A property's name, and its key and value."""
Filled = tuple[Expression, bool]
"""At least one entry; and whether none is fine too."""


def object_rule(schemas: SchemaRules, parts: Parts, depth: int) -> Expression:
    opening, between, closing, colon = schemas.separators(depth)
    needed = set(required(parts))
    names = list(dict.fromkeys(name for schema, _ in parts for name in schema.get("properties", ())))
    names += [name for name in required(parts) if name not in set(names)]
    naming = [(s["propertyNames"], at(p, "propertyNames")) for s, p in parts if "propertyNames" in s]
    entries: list[Entry] = []
    for name in names:
        allowed = not naming or satisfies(schemas, name, schemas.expand(naming))
        value = schemas.members(property_schemas(schemas, parts, name)) if allowed else None
        if value is None:
            if name in needed:
                return NOTHING
            continue
        entries.append((name, seq(schemas.key(name), colon, schemas.rule(value, depth + 1))))
    if sum(name not in needed for name, _ in entries) > MAX_OPTIONAL:
        schemas.fail(
            parts[0][1],
            f"more than {MAX_OPTIONAL:,} optional properties in one object.",
            "Make some required, or group them.",
        )
    low, high = lengths(parts, "minProperties", "maxProperties")
    extra = further_entry(schemas, parts, names, naming, depth, colon)
    if high is not None and high < len([name for name, _ in entries if name in needed]):
        return NOTHING
    counted = high is not None or low > len([name for name, _ in entries if name in needed])
    limit = high if high is not None else low
    if counted and limit * (len(entries) + 1) > 100_000:
        schemas.fail(parts[0][1], "minProperties or maxProperties is too large here.", "Lower it.")
    if schemas.options.property_order == "any" and len(entries) > 1:
        graph = any_order(schemas, entries, needed, extra, between, low, high, counted, parts[0][1])
    else:
        graph = in_order(schemas, entries, needed, extra, between, low, high, counted)
    if graph is None:
        return NOTHING
    if schemas.options.indent is not None or not schemas.free_layout:
        # an empty object has nothing between its braces
        filled, empty = graph
        whole = seq(Bytes(b"{"), opening, filled, closing, Bytes(b"}"))
        return alt(whole, Bytes(b"{}")) if empty else whole
    filled, empty = graph
    return seq(Bytes(b"{"), opening, alt(seq(filled, closing), EMPTY) if empty else seq(filled, closing), Bytes(b"}"))


def in_order(
    schemas: SchemaRules,
    entries: list[Entry],
    required: set[str],
    extra: Expression | None,
    between: Expression,
    low: int,
    high: int | None,
    counted: bool,
) -> Filled | None:
    """``(graph of at least one entry, whether none is fine too)``: states are (place, any yet, how many)."""
    top = 0 if not counted else high if high is not None else low
    states: dict[tuple[int, bool, int], int] = {}
    order: list[tuple[int, bool, int]] = []

    def state(place: int, any_yet: bool, count: int) -> int:
        key = (place, any_yet, min(count, top))
        if key not in states:
            states[key] = len(states)
            order.append(key)
        return states[key]

    state(0, False, 0)
    edges: list[tuple[int, Expression, int]] = []
    finals = set()
    empty = False
    for place, any_yet, count in order:
        here = states[place, any_yet, count]
        full = high is not None and count >= high
        if place < len(entries):
            name, entry = entries[place]
            if name not in required:
                edges.append((here, EMPTY, state(place + 1, any_yet, count)))
            if not full:
                edges.append((here, seq(between, entry) if any_yet else entry, state(place + 1, True, count + 1)))
            continue
        if extra is not None and not full:
            edges.append((here, seq(between, extra) if any_yet else extra, state(place, True, count + 1)))
        if count >= (low if counted else 0):
            if any_yet:
                finals.add(here)
            else:
                empty = True
    if not finals and not empty:
        return None
    return Graph(len(states), tuple(edges), frozenset(finals)), empty


def any_order(
    schemas: SchemaRules, entries: list[Entry], required: set[str], extra: Expression | None, between: Expression,
    low: int, high: int | None,
    counted: bool, pointer: str,
) -> Filled | None:  # fmt: skip
    if len(entries) > MAX_ANY_ORDER:
        schemas.fail(
            pointer,
            f"property_order='any' with {len(entries)} properties.",
            f"At most {MAX_ANY_ORDER} are possible.",
        )
    need = sum(1 << place for place, (name, _) in enumerate(entries) if name in required)
    top = 0 if not counted else high if high is not None else low
    pairs = []
    for place, (_, entry) in enumerate(entries):
        name = f"entry_{len(schemas.rules)}_{place}"
        schemas.rules[name] = entry
        pairs.append(Ref(name))
    states: dict[tuple[int, bool, int], int] = {(0, False, 0): 0}
    order = [(0, False, 0)]
    edges: list[tuple[int, Expression, int]] = []
    finals, empty = set(), False
    for used, any_yet, count in order:
        here = states[used, any_yet, count]
        moves: list[tuple[int, Expression]] = [
            (used | 1 << place, pair) for place, pair in enumerate(pairs) if not used >> place & 1
        ]
        moves += [(used, extra)] if extra is not None else []
        for mask, entry in moves if high is None or count < high else []:
            key = (mask, True, min(count + 1, top))
            if key not in states:
                states[key] = len(states)
                order.append(key)
            edges.append((here, seq(between, entry) if any_yet else entry, states[key]))
        if used & need == need and count >= (low if counted else 0):
            if any_yet:
                finals.add(here)
            else:
                empty = True
    return (Graph(len(states), tuple(edges), frozenset(finals)), empty) if finals or empty else None


def further_entry(
    schemas: SchemaRules,
    parts: Parts,
    names: list[str],
    naming: list[Place],
    depth: int,
    colon: Expression,
) -> Expression | None:
    """A key and value beyond the declared ones, or None where there can be none."""
    patterns = list(dict.fromkeys(p for schema, _ in parts for p in schema.get("patternProperties", ())))
    if len(patterns) > MAX_PATTERNS:
        schemas.fail(
            parts[0][1],
            f"more than {MAX_PATTERNS} patternProperties together.",
            "Join patterns whose schemas are equal.",
        )
    options = []
    allowed = names_automaton(schemas, naming)
    for size in range(len(patterns) + 1):
        for chosen in combinations(patterns, size):
            applying: list[Place] = []
            for schema, pointer in parts:
                mine = [p for p in schema.get("patternProperties", {}) if p in chosen]
                applying += [
                    (schema["patternProperties"][p], at(pointer, f"patternProperties/{escaped(p)}")) for p in mine
                ]
                if not mine and "additionalProperties" in schema:
                    applying.append((schema["additionalProperties"], at(pointer, "additionalProperties")))
            if not chosen and not any("additionalProperties" in schema for schema, _ in parts):
                applying += otherwise(schemas, parts, "unevaluatedProperties", ("properties", "patternProperties"))
            value = schemas.members(applying)
            if value is None:
                continue
            if not patterns and not names and allowed is None:
                options.append(seq(Ref("string"), colon, schemas.rule(value, depth + 1)))
                continue
            key = allowed if allowed is not None else build(star(CANONICAL))
            for pattern in patterns:
                other = key_automaton(schemas, pattern, parts[0][1])
                key = intersection(key, other) if pattern in chosen else difference(key, other)
            if names:
                key = difference(key, trie([inner(name) for name in names]))
            if not key.empty:
                options.append(seq(QUOTE, key, QUOTE, colon, schemas.rule(value, depth + 1)))
    if not options:
        return None
    name = f"further_{len(schemas.rules)}"
    schemas.rules[name] = alt(*options)
    return Ref(name)


def names_automaton(schemas: SchemaRules, naming: list[Place]) -> Automaton | None:
    if not naming:
        return None
    parts = schemas.expand(naming)
    if parts is None or "string" not in kinds(parts):
        return Automaton([[]], [[]], [False])
    for schema, pointer in parts:
        if "anyOf" in schema or "oneOf" in schema or "not" in schema:
            schemas.unsupported(pointer, "a combination inside propertyNames", "Use one pattern.")
    values = next((s["enum"] if "enum" in s else [s["const"]] for s, _ in parts if "enum" in s or "const" in s), None)
    if values is not None:
        return trie([inner(v) for v in values if isinstance(v, str) and satisfies(schemas, v, parts)])
    found = string_automaton(schemas, parts)
    if found is None:
        low, high = lengths(parts, "minLength", "maxLength")
        found = build(Repeat(CANONICAL, low, high))
    return found
