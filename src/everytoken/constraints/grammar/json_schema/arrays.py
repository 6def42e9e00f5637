"""Arrays: items at the start one by one, then any number of one kind, and how many there may be."""

from __future__ import annotations

from ..expressions import EMPTY, NOTHING, Bytes, Expression, Repeat, alt, optional, seq
from .places import further_items, otherwise, prefix_items
from .rules import SchemaRules
from .sets import Parts, Place, at
from .strings_and_numbers import lengths


def array_rule(schemas: SchemaRules, parts: Parts, depth: int) -> Expression:
    opening, between, closing, _ = schemas.separators(depth)
    low, high = lengths(parts, "minItems", "maxItems")
    if any(schema.get("uniqueItems") is True for schema, _ in parts) and (high is None or high > 1):
        schemas.unsupported(
            next(p for s, p in parts if s.get("uniqueItems")), "uniqueItems", "List the combinations with enum."
        )
    prefixes = [(prefix_items(schema), further_items(schema), pointer) for schema, pointer in parts]
    size = max((len(prefix) for prefix, _, _ in prefixes), default=0)

    def item(place: int) -> Expression:
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
        return schemas.sub(found, depth + 1)

    fixed = [item(place) for place in range(size)]
    tail = item(size)
    open_ended = tail != NOTHING
    if high is None and not open_ended:
        high = size
    if high is not None and (high < low or (high > size and not open_ended)):
        high = min(high, size) if not open_ended else high
    if (high is not None and high < low) or (low > size and not open_ended):
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
    if low == 0:
        options.append(schemas.blank() if schemas.free_layout else EMPTY)
    return seq(Bytes(b"["), alt(*options), Bytes(b"]"))
