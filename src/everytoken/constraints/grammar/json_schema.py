"""JSON Schema (draft 2020-12, and what older drafts share with it) as grammar rules.

A schema is taken as the set of all sub-schemas that apply to one place in the document: ``$ref`` and ``allOf`` add members,
``anyOf`` and ``oneOf`` branch. Such a set becomes one rule, named after its members, so recursive schemas end in recursive
rules. What a set says about strings, numbers, objects and arrays is merged before anything is built; conditions that must
hold together (two patterns, a pattern and a length) become intersections of automata.

What cannot be expressed exactly raises, or is ignored with a warning under ``strict=False``. See docs/constraints.md for the
table of keywords and for the spelling of documents (canonical strings where a pattern, format or enumeration applies; bounded
numbers without exponents).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal, InvalidOperation
from itertools import combinations
from typing import Any

from .automata import Automaton, build, difference, intersection, is_deterministic, trie
from .expressions import (
    EMPTY,
    NOTHING,
    Bytes,
    GrammarError,
    Graph,
    Ref,
    Repeat,
    alt,
    optional,
    seq,
    star,
    text,
)
from .formats import FORMATS
from .json_text import CANONICAL, COUNTED, FREE, QUOTE, WS, inner, spell
from .numbers import number_automaton
from .regex import regex_automaton
from .schema_sets import TYPES, Member, SchemaOptions, SchemaSets, at, escaped
from .schema_values import satisfies

BY_TYPE = {
    "object": {"properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties",
               "maxProperties", "unevaluatedProperties", "dependentRequired", "dependentSchemas", "dependencies"},
    "array": {"items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "unevaluatedItems", "contains",
              "minContains", "maxContains"},
    "string": {"pattern", "format", "minLength", "maxLength"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}  # fmt: skip
MAX_ANY_ORDER = 10
MAX_CASES = 20_000
MAX_OPTIONAL = 500
"""After any of them each later one may follow, which makes the automaton's size the square of their number."""
MAX_PATTERNS = 4
MAX_INDENT_DEPTH = 12


def schema_rules(schema: Any, **options: Any) -> dict[str, Any]:
    """The rules of a schema, ``root`` among them; see ``Grammar.from_json_schema``."""
    known = set(SchemaOptions.__dataclass_fields__)
    for name in options:
        if name not in known:
            from ...core.errors import UnknownNameError

            raise UnknownNameError("JSON Schema option", name, known)
    if isinstance(schema, (str, bytes)):
        try:
            schema = json.loads(schema)
        except json.JSONDecodeError as error:
            raise GrammarError(
                f"The schema is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.",
                "Check quotes and commas.",
            ) from error
        except (RecursionError, UnicodeDecodeError) as error:
            raise GrammarError(f"The schema cannot be read: {error}.", "Nest it less deeply; use UTF-8.") from error
    converter = _Converter(schema, SchemaOptions(**options))
    return converter.convert()


class _Converter(SchemaSets):
    def __init__(self, document: Any, options: SchemaOptions):
        super().__init__(document, options)
        self.names: dict[tuple[frozenset[Member], int], str] = {}
        self.pending: list[tuple[str, frozenset[Member], int]] = []
        self.rules: dict[str, Any] = {}
        self.walked: dict[int, bool] = {}
        self.cases = 0
        self.key_automata: dict[str, Automaton] = {}

    def rule(self, members: frozenset[Member] | None, depth: int) -> Any:
        """A reference to the rule of a set (made when its turn comes)."""
        if members is None:
            return NOTHING
        depth = depth if self.options.indent is not None else 0
        if depth > MAX_INDENT_DEPTH:
            return NOTHING
        key = (members, depth)
        if key not in self.names:
            where = self.pointers[min(members)[0]] if members else "any"
            stem = re.sub(r"[^A-Za-z0-9]+", "_", where).strip("_") or "value"
            name = f"{stem[-60:]}_{len(self.names)}"
            self.names[key] = name
            self.pending.append((name, members, depth))
        return Ref(self.names[key])

    def sub(self, schemas: Iterable[tuple[Any, str]], depth: int) -> Any:
        return self.rule(self.members(schemas), depth)

    def convert(self) -> dict[str, Any]:
        blank = self.options.max_whitespace
        self.rules["ws"] = star(WS) if blank is None else Repeat(WS, 0, blank)
        self.rules["string"] = seq(QUOTE, star(FREE), QUOTE)
        root = self.sub([(self.document, "#")], 0)
        while self.pending:
            name, members, depth = self.pending.pop()
            self.rules[name] = self.body(members, depth)
        self.rules["root"] = root
        return self.rules

    # -- layout ----------------------------------------------------------------------------------------------------------
    def blank(self) -> Any:
        return Ref("ws") if self.free_layout else EMPTY

    @property
    def free_layout(self) -> bool:
        return self.options.any_whitespace and self.options.indent is None and self.options.separators is None

    def separators(self, depth: int) -> tuple[Any, Any, Any, Any]:
        """``(after the opening, between items, before the closing, between key and value)``."""
        if self.free_layout:
            ws = Ref("ws")
            return ws, seq(ws, Bytes(b","), ws), ws, seq(ws, Bytes(b":"), ws)
        indent = self.options.indent
        comma, colon = self.options.separators or ((", ", ": ") if indent is None else (",", ": "))
        if indent is None:
            return EMPTY, text(comma), EMPTY, text(colon)
        line = "\n" + " " * (indent * (depth + 1))
        return text(line), text(comma + line), text("\n" + " " * (indent * depth)), text(colon)

    # -- one set ---------------------------------------------------------------------------------------------------------
    def body(self, members: frozenset[Member], depth: int) -> Any:
        parts = [(self.schemas[index], self.pointers[index]) for index, _ in sorted(members)]
        for index, decided in sorted(members):
            schema, pointer = self.schemas[index], self.pointers[index]
            if not decided and ("anyOf" in schema or "oneOf" in schema):
                return self.branches(members, index, schema, pointer, depth)
        for schema, pointer in parts:
            if "not" in schema:
                self.negation(schema["not"], pointer)
                if schema["not"] is True or schema["not"] == {}:
                    return NOTHING
        if any("enum" in schema or "const" in schema for schema, _ in parts):
            return self.enumeration(parts, depth)
        kinds = self.kinds(parts)
        options = []
        for kind in kinds:
            if kind == "null":
                options.append(Bytes(b"null"))
            elif kind == "boolean":
                options += [Bytes(b"true"), Bytes(b"false")]
            elif kind in ("number", "integer"):
                options.append(self.numeric(parts, kind == "integer"))
            elif kind == "string":
                options.append(self.string(parts))
            elif kind == "object":
                options.append(self.object(parts, depth))
            else:
                options.append(self.array(parts, depth))
        return alt(*options)

    def kinds(self, parts: Sequence[tuple[dict[str, Any], str]]) -> list[str]:
        """The JSON types that all parts allow, ``number`` or ``integer`` but not both."""
        allowed = set(TYPES)
        for schema, _ in parts:
            if "type" in schema:
                given = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
                types = set(given)
                if schema.get("nullable") is True:
                    types.add("null")
                if "number" in types:
                    types.add("integer")
                allowed &= types
        if "number" in allowed:
            allowed.discard("integer")
        return [kind for kind in TYPES if kind in allowed]

    def negation(self, schema: Any, pointer: str) -> None:
        if schema is False or schema is True or schema == {}:
            return
        self.unsupported(pointer, "not", "Say what is allowed instead.")

    def branches(self, members: frozenset[Member], index: int, schema: dict[str, Any], pointer: str, depth: int) -> Any:
        self.refuse_cycle(index)
        rest = (members - {(index, False)}) | {(index, True)}
        choices: list[list[tuple[Any, str]]] = [[]]
        for key in ("anyOf", "oneOf"):
            if key not in schema:
                continue
            options = [(branch, at(pointer, f"{key}/{place}")) for place, branch in enumerate(schema[key])]
            if key == "oneOf":
                options = self.exclusive(options, pointer)
            choices = [[*chosen, option] for chosen in choices for option in options]
        if sum(not decided for _, decided in members) > 1:
            self.cases += len(choices)
        if len(choices) > MAX_CASES or self.cases > MAX_CASES:
            self.fail(
                pointer, f"anyOf and oneOf that hold together make more than {MAX_CASES:,} cases.", "Split the schema."
            )
        made = []
        for chosen in choices:
            extra = self.members(chosen)
            if extra is not None:
                undecided = {member for member in extra if (member[0], True) not in rest}
                made.append(self.rule(frozenset(rest | undecided), depth))
        return alt(*made)

    def refuse_cycle(self, index: int) -> None:
        """Raises where anyOf, oneOf, allOf and $ref lead from a schema back to itself at the same place of the document."""
        stack = [(index, self.in_place(index))] if index not in self.walked else []
        self.walked.setdefault(index, False)  # open; True once nothing below leads back
        while stack:
            current, following = stack[-1]
            member = next(following, None)
            if member is None:
                self.walked[current] = True
                stack.pop()
            elif member not in self.walked:
                self.walked[member] = False
                stack.append((member, self.in_place(member)))
            elif not self.walked[member]:
                self.fail(
                    self.pointers[member],
                    "a $ref leads back to itself without describing anything.",
                    "Break the cycle.",
                )

    def in_place(self, index: int) -> Iterator[int]:
        """The sub-schemas that the branches of one bring along for the same place of the document."""
        schema, pointer = self.schemas[index], self.pointers[index]
        for key in ("anyOf", "oneOf"):
            for place, branch in enumerate(schema.get(key, ()) if isinstance(schema, dict) else ()):
                if not isinstance(branch, bool):
                    yield from self.flatten(self.number(branch, at(pointer, f"{key}/{place}")))

    def exclusive(self, options: list[tuple[Any, str]], pointer: str) -> list[tuple[Any, str]]:
        """oneOf is anyOf where no two branches can hold at once; that must be evident."""
        for (first, where), (second, other) in combinations(options, 2):
            if not self.disjoint([(first, where)], [(second, other)]):
                self.unsupported(
                    pointer, f"oneOf whose branches {where.rsplit('/', 1)[-1]} and {other.rsplit('/', 1)[-1]} may both hold",
                    "Use anyOf, or give the branches a required property with different const values.",
                )  # fmt: skip
                break
        return options

    def expand(self, schemas: Sequence[tuple[Any, str]]) -> list[tuple[dict[str, Any], str]] | None:
        members = self.members(schemas)
        if members is None:
            return None
        return [(self.schemas[index], self.pointers[index]) for index, _ in sorted(members)]

    def disjoint(self, first: Sequence[tuple[Any, str]], second: Sequence[tuple[Any, str]], level: int = 0) -> bool:
        """Whether evidently no document satisfies both; False when in doubt."""
        if level > 4:
            return False
        mine, theirs = self.expand(first), self.expand(second)
        if mine is None or theirs is None:
            return True
        for parts, other in ((mine, theirs), (theirs, mine)):
            for schema, pointer in parts:
                for key in ("anyOf", "oneOf"):
                    if key in schema and all(
                        self.disjoint([(branch, at(pointer, f"{key}/{i}"))], other, level + 1)
                        for i, branch in enumerate(schema[key])
                    ):
                        return True
                values = schema.get("enum", [schema["const"]] if "const" in schema else None)
                if values is not None and not any(satisfies(self, value, list(other)) for value in values):
                    return True
        kinds, others = set(self.kinds(mine)), set(self.kinds(theirs))
        shared = {
            k
            for k in kinds
            if k in others or (k == "integer" and "number" in others) or (k == "number" and "integer" in others)
        }
        if not shared:
            return True
        if shared <= {"number", "integer"}:
            low, high, _ = self.bounds([*mine, *theirs])
            if (
                low is not None
                and high is not None
                and (low[0] > high[0] or (low[0] == high[0] and (low[1] or high[1])))
            ):
                return True
        if shared == {"object"}:
            for parts, other in ((mine, theirs), (theirs, mine)):
                for name in self.required(parts):
                    here, there = self.property(parts, name), self.property(other, name)
                    if self.disjoint(here, there, level + 1):
                        return True
        if shared == {"string"}:
            pair = [self.string_automaton(parts) for parts in (mine, theirs)]
            if pair[0] is not None and pair[1] is not None:
                try:
                    return intersection(pair[0], pair[1]).empty
                except GrammarError:
                    return False
        return False

    # -- enumerations ----------------------------------------------------------------------------------------------------
    def enumeration(self, parts: Sequence[tuple[dict[str, Any], str]], depth: int) -> Any:
        lists = [
            (schema["enum"] if "enum" in schema else [schema["const"]], place)
            for place, (schema, _) in enumerate(parts)
            if "enum" in schema or "const" in schema
        ]
        shortest, place = min(lists, key=lambda pair: len(pair[0]))
        others = list(parts)
        schema, pointer = parts[place]  # its own values need not be looked for among themselves
        own = "enum" if "enum" in schema else "const"
        others[place] = ({key: value for key, value in schema.items() if key != own}, pointer)
        values = [value for value in shortest if satisfies(self, value, others, closed=True)]
        return alt(*(self.literal(value, depth) for value in values))

    def literal(self, value: Any, depth: int) -> Any:
        """One JSON value, with the layout's white space."""
        if isinstance(value, (dict, list)) and value:
            opening, between, closing, colon = self.separators(depth)
            if isinstance(value, dict):
                items = [seq(self.key(name), colon, self.literal(item, depth + 1)) for name, item in value.items()]
                marks = (Bytes(b"{"), Bytes(b"}"))
            else:
                items = [self.literal(item, depth + 1) for item in value]
                marks = (Bytes(b"["), Bytes(b"]"))
            joined = [items[0], *(seq(between, item) for item in items[1:])]
            return seq(marks[0], opening, *joined, closing, marks[1])
        if value in ({}, []) and self.free_layout:
            return seq(Bytes(b"{" if value == {} else b"["), self.blank(), Bytes(b"}" if value == {} else b"]"))
        return text(json.dumps(value, ensure_ascii=False))

    def key(self, name: str) -> Bytes:
        try:
            return text(json.dumps(name, ensure_ascii=False))
        except UnicodeEncodeError:
            return text(json.dumps(name))

    # -- numbers ---------------------------------------------------------------------------------------------------------
    def bounds(self, parts: Sequence[tuple[dict[str, Any], str]]) -> tuple[Any, Any, list[Decimal]]:
        low: tuple[Decimal, bool] | None = None
        high: tuple[Decimal, bool] | None = None
        divisors: list[Decimal] = []
        for schema, pointer in parts:
            for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf"):
                if key not in schema:
                    continue
                try:
                    value = Decimal(str(schema[key]))
                    assert value.is_finite() and abs(value.adjusted()) < 400
                except (InvalidOperation, AssertionError):
                    self.fail(at(pointer, key), f"{key} must be a finite number; got {schema[key]!r}.")
                exclusive = key.startswith("exclusive")
                if key == "multipleOf":
                    divisors.append(value)
                elif key.endswith("inimum"):
                    low = (value, exclusive) if low is None or (value, exclusive) > low else low
                else:
                    high = (
                        (value, exclusive) if high is None or (value, not exclusive) < (high[0], not high[1]) else high
                    )
        return low, high, divisors

    def numeric(self, parts: Sequence[tuple[dict[str, Any], str]], integer: bool) -> Any:
        low, high, divisors = self.bounds(parts)
        try:
            return number_automaton(integer, low, high, divisors)
        except GrammarError as error:
            where = next((p for s, p in parts if "multipleOf" in s), "")
            self.unsupported(where, str(error.message).removesuffix(" is not supported."), error.hint or "")
            return number_automaton(integer, low, high, [])

    # -- strings ---------------------------------------------------------------------------------------------------------
    def lengths(
        self, parts: Sequence[tuple[dict[str, Any], str]], low_key: str, high_key: str
    ) -> tuple[int, int | None]:
        low = max((int(schema.get(low_key, 0)) for schema, _ in parts), default=0)
        highs = [int(schema[high_key]) for schema, _ in parts if high_key in schema]
        return low, min(highs) if highs else None

    def string_automaton(self, parts: Sequence[tuple[dict[str, Any], str]], lengths: bool = True) -> Automaton | None:
        """Contents of the string (no quotes) as an automaton over canonical spelling; None if nothing is asked."""
        found: list[Automaton] = []
        for schema, pointer in parts:
            if "pattern" in schema:
                try:
                    found.append(regex_automaton(schema["pattern"], True, CANONICAL, spell))
                except GrammarError as error:
                    self.unsupported(at(pointer, "pattern"), f"this pattern ({error.message})", error.hint or "")
            if "format" in schema:
                pattern = FORMATS.get(schema["format"])
                if pattern is None:
                    self.unsupported(
                        at(pointer, "format"), f"the format {schema['format']!r}", f"Known: {', '.join(FORMATS)}."
                    )
                else:
                    found.append(regex_automaton(pattern, False, CANONICAL, spell))
        if not found:
            return None
        low, high = self.lengths(parts, "minLength", "maxLength")
        if lengths and (low or high is not None):
            if max(low, high or 0) > 20_000:
                self.fail(parts[0][1], "a pattern or format with a length bound over 20,000.", "Lower the bound.")
            bound = build(Repeat(CANONICAL, low, high))
            found.append(bound)
        result = found[0]
        for other in found[1:]:
            if not (is_deterministic(result) and is_deterministic(other)):
                self.fail(parts[0][1], "patterns that must hold together are too complex.", "Simplify one of them.")
            result = intersection(result, other)
        return result

    def string(self, parts: Sequence[tuple[dict[str, Any], str]]) -> Any:
        automaton = self.string_automaton(parts)
        if automaton is not None:
            return seq(QUOTE, automaton, QUOTE)
        low, high = self.lengths(parts, "minLength", "maxLength")
        if low == 0 and high is None:
            return Ref("string")
        if high is not None and high < low:
            return NOTHING
        name = f"chars_{low}_{high}"
        if name not in self.rules:  # a rule of its own: strings of equal length share it
            self.rules[name] = Repeat(COUNTED, low, high)
        return seq(QUOTE, Ref(name), QUOTE)

    # -- objects ---------------------------------------------------------------------------------------------------------
    def required(self, parts: Sequence[tuple[dict[str, Any], str]]) -> list[str]:
        return list(dict.fromkeys(name for schema, _ in parts for name in schema.get("required", ())))

    def property(self, parts: Sequence[tuple[dict[str, Any], str]], name: str) -> list[tuple[Any, str]]:
        """All schemas that the value of a property must satisfy."""
        found: list[tuple[Any, str]] = []
        declared = any(name in schema.get("properties", ()) for schema, _ in parts)
        for schema, pointer in parts:
            before = len(found)
            if name in schema.get("properties", {}):
                found.append((schema["properties"][name], at(pointer, f"properties/{escaped(name)}")))
            for pattern, value in schema.get("patternProperties", {}).items():
                if self.key_matches(pattern, name, pointer):
                    found.append((value, at(pointer, f"patternProperties/{escaped(pattern)}")))
                    declared = True
            if len(found) == before and "additionalProperties" in schema:
                found.append((schema["additionalProperties"], at(pointer, "additionalProperties")))
        if not declared and not any("additionalProperties" in schema for schema, _ in parts):
            found += self.otherwise(parts, "unevaluatedProperties", ("properties", "patternProperties"))
        return found

    def otherwise(
        self, parts: Sequence[tuple[dict[str, Any], str]], key: str, closing: tuple[str, ...]
    ) -> list[tuple[Any, str]]:
        """What applies to a property or item that no part mentions."""
        given = [(schema[key], at(pointer, f"{key}")) for schema, pointer in parts if key in schema]
        if given:
            self.check_unevaluated(parts, key)
            return given
        closed = self.options.strict_mode and any(name in schema for schema, _ in parts for name in closing)
        return [(False, "")] if closed else []

    def check_unevaluated(self, parts: Sequence[tuple[dict[str, Any], str]], key: str) -> None:
        """``unevaluated*`` looks at its own schema and what that includes, and at nothing beside it.

        Exact where all parts come from the one schema that has the keyword, by $ref, allOf or oneOf.
        """
        owners = [(schema, pointer) for schema, pointer in parts if key in schema]
        inside: set[int] = set()
        pending = list(self.flatten(self.numbers[id(owners[0][0])]))
        while pending:
            index = pending.pop()
            if index not in inside:
                inside.add(index)
                schema, pointer = self.schemas[index], self.pointers[index]
                for place, branch in enumerate(schema.get("oneOf", ()) if isinstance(schema, dict) else ()):
                    if not isinstance(branch, bool):
                        pending += self.flatten(self.number(branch, at(pointer, f"oneOf/{place}")))
        if (
            len(owners) > 1
            or any(self.numbers[id(schema)] not in inside for schema, _ in parts)
            or any(
                word in schema for schema, _ in parts for word in ("anyOf", "not", "if", "dependentSchemas", "contains")
            )
        ):
            self.unsupported(
                owners[0][1], f"{key} beside other schemas", "Use additionalProperties: false, or items: false."
            )

    def key_matches(self, pattern: str, name: str, pointer: str) -> bool:
        return self.key_automaton(pattern, pointer).matches(inner(name))

    def key_automaton(self, pattern: str, pointer: str) -> Automaton:
        cache = self.key_automata
        if pattern not in cache:
            try:
                cache[pattern] = regex_automaton(pattern, True, CANONICAL, spell)
            except GrammarError as error:
                self.fail(at(pointer, "patternProperties"), error.message, error.hint)
        return cache[pattern]

    def object(self, parts: Sequence[tuple[dict[str, Any], str]], depth: int) -> Any:
        opening, between, closing, colon = self.separators(depth)
        required = set(self.required(parts))
        names = list(dict.fromkeys(name for schema, _ in parts for name in schema.get("properties", ())))
        names += [name for name in self.required(parts) if name not in set(names)]
        naming = [(s["propertyNames"], at(p, "propertyNames")) for s, p in parts if "propertyNames" in s]
        entries: list[tuple[str, Any]] = []
        for name in names:
            allowed = not naming or satisfies(self, name, self.expand(naming))
            value = self.members(self.property(parts, name)) if allowed else None
            if value is None:
                if name in required:
                    return NOTHING
                continue
            entries.append((name, seq(self.key(name), colon, self.rule(value, depth + 1))))
        if sum(name not in required for name, _ in entries) > MAX_OPTIONAL:
            self.fail(
                parts[0][1],
                f"more than {MAX_OPTIONAL:,} optional properties in one object.",
                "Make some required, or group them.",
            )
        low, high = self.lengths(parts, "minProperties", "maxProperties")
        extra = self.further(parts, names, naming, depth, colon)
        if high is not None and high < len([name for name, _ in entries if name in required]):
            return NOTHING
        counted = high is not None or low > len([name for name, _ in entries if name in required])
        limit = high if high is not None else low
        if counted and limit * (len(entries) + 1) > 100_000:
            self.fail(parts[0][1], "minProperties or maxProperties is too large here.", "Lower it.")
        if self.options.property_order == "any" and len(entries) > 1:
            graph = self.any_order(entries, required, extra, between, low, high, counted, parts[0][1])
        else:
            graph = self.in_order(entries, required, extra, between, low, high, counted)
        if graph is None:
            return NOTHING
        if self.options.indent is not None or not self.free_layout:
            # an empty object has nothing between its braces
            filled, empty = graph
            whole = seq(Bytes(b"{"), opening, filled, closing, Bytes(b"}"))
            return alt(whole, Bytes(b"{}")) if empty else whole
        filled, empty = graph
        return seq(
            Bytes(b"{"), opening, alt(seq(filled, closing), EMPTY) if empty else seq(filled, closing), Bytes(b"}")
        )

    def in_order(
        self,
        entries: list[tuple[str, Any]],
        required: set[str],
        extra: Any,
        between: Any,
        low: int,
        high: int | None,
        counted: bool,
    ) -> tuple[Any, bool] | None:
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
        edges: list[tuple[int, Any, int]] = []
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
        self, entries: list[tuple[str, Any]], required: set[str], extra: Any, between: Any, low: int, high: int | None,
        counted: bool, pointer: str,
    ) -> tuple[Any, bool] | None:  # fmt: skip
        if len(entries) > MAX_ANY_ORDER:
            self.fail(
                pointer,
                f"property_order='any' with {len(entries)} properties.",
                f"At most {MAX_ANY_ORDER} are possible.",
            )
        need = sum(1 << place for place, (name, _) in enumerate(entries) if name in required)
        top = 0 if not counted else high if high is not None else low
        pairs = []
        for place, (_, entry) in enumerate(entries):
            name = f"entry_{len(self.rules)}_{place}"
            self.rules[name] = entry
            pairs.append(Ref(name))
        states: dict[tuple[int, bool, int], int] = {(0, False, 0): 0}
        order = [(0, False, 0)]
        edges: list[tuple[int, Any, int]] = []
        finals, empty = set(), False
        for used, any_yet, count in order:
            here = states[used, any_yet, count]
            moves = [(used | 1 << place, pair) for place, pair in enumerate(pairs) if not used >> place & 1]
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

    def further(
        self,
        parts: Sequence[tuple[dict[str, Any], str]],
        names: list[str],
        naming: list[tuple[Any, str]],
        depth: int,
        colon: Any,
    ) -> Any | None:
        """A key and value beyond the declared ones, or None where there can be none."""
        patterns = list(dict.fromkeys(p for schema, _ in parts for p in schema.get("patternProperties", ())))
        if len(patterns) > MAX_PATTERNS:
            self.fail(
                parts[0][1],
                f"more than {MAX_PATTERNS} patternProperties together.",
                "Join patterns whose schemas are equal.",
            )
        options = []
        allowed = self.names_automaton(naming)
        for size in range(len(patterns) + 1):
            for chosen in combinations(patterns, size):
                schemas: list[tuple[Any, str]] = []
                for schema, pointer in parts:
                    mine = [p for p in schema.get("patternProperties", {}) if p in chosen]
                    schemas += [
                        (schema["patternProperties"][p], at(pointer, f"patternProperties/{escaped(p)}")) for p in mine
                    ]
                    if not mine and "additionalProperties" in schema:
                        schemas.append((schema["additionalProperties"], at(pointer, "additionalProperties")))
                if not chosen and not any("additionalProperties" in schema for schema, _ in parts):
                    schemas += self.otherwise(parts, "unevaluatedProperties", ("properties", "patternProperties"))
                value = self.members(schemas)
                if value is None:
                    continue
                if not patterns and not names and allowed is None:
                    options.append(seq(Ref("string"), colon, self.rule(value, depth + 1)))
                    continue
                key = allowed if allowed is not None else build(star(CANONICAL))
                for pattern in patterns:
                    other = self.key_automaton(pattern, parts[0][1])
                    key = intersection(key, other) if pattern in chosen else difference(key, other)
                if names:
                    key = difference(key, trie([inner(name) for name in names]))
                if not key.empty:
                    options.append(seq(QUOTE, key, QUOTE, colon, self.rule(value, depth + 1)))
        if not options:
            return None
        name = f"further_{len(self.rules)}"
        self.rules[name] = alt(*options)
        return Ref(name)

    def names_automaton(self, naming: list[tuple[Any, str]]) -> Automaton | None:
        if not naming:
            return None
        parts = self.expand(naming)
        if parts is None or "string" not in self.kinds(parts):
            return Automaton([[]], [[]], [False])
        for schema, pointer in parts:
            if "anyOf" in schema or "oneOf" in schema or "not" in schema:
                self.unsupported(pointer, "a combination inside propertyNames", "Use one pattern.")
        values = next(
            (s["enum"] if "enum" in s else [s["const"]] for s, _ in parts if "enum" in s or "const" in s), None
        )
        if values is not None:
            return trie([inner(v) for v in values if isinstance(v, str) and satisfies(self, v, parts)])
        found = self.string_automaton(parts)
        if found is None:
            low, high = self.lengths(parts, "minLength", "maxLength")
            found = build(Repeat(CANONICAL, low, high))
        return found

    # -- arrays ----------------------------------------------------------------------------------------------------------
    def array(self, parts: Sequence[tuple[dict[str, Any], str]], depth: int) -> Any:
        opening, between, closing, _ = self.separators(depth)
        low, high = self.lengths(parts, "minItems", "maxItems")
        if any(schema.get("uniqueItems") is True for schema, _ in parts) and (high is None or high > 1):
            self.unsupported(
                next(p for s, p in parts if s.get("uniqueItems")), "uniqueItems", "List the combinations with enum."
            )
        prefixes = [(self._prefix(schema), self._rest(schema), pointer) for schema, pointer in parts]
        size = max((len(prefix) for prefix, _, _ in prefixes), default=0)

        def item(place: int) -> Any:
            found: list[tuple[Any, str]] = []
            mentioned = False
            for prefix, rest, pointer in prefixes:
                if place < len(prefix):
                    found.append((prefix[place], at(pointer, f"prefixItems/{place}")))
                    mentioned = True
                elif rest is not None:
                    found.append((rest, at(pointer, "items")))
                    mentioned = True
            if not mentioned:
                found += self.otherwise(parts, "unevaluatedItems", ("prefixItems",))
            return self.sub(found, depth + 1)

        fixed = [item(place) for place in range(size)]
        tail = item(size)
        open_ended = tail != NOTHING
        if high is None and not open_ended:
            high = size
        if high is not None and (high < low or (high > size and not open_ended)):
            high = min(high, size) if not open_ended else high
        if (high is not None and high < low) or (low > size and not open_ended):
            return NOTHING
        options: list[Any] = []
        following: Any = None  # items from `place` on, each with its separator
        if open_ended and (high is None or high > size):
            least = max(low - size, 0)
            most = None if high is None else high - size
            if size == 0:
                more = Repeat(seq(between, tail), max(least - 1, 0), None if most is None else most - 1)
                options.append(seq(opening, tail, more, closing))
            else:
                following = Repeat(seq(between, tail), least, most)
        if size and (high is None or high > 0):
            chain: Any = following if following is not None else EMPTY
            for place in reversed(range(1, min(size, high if high is not None else size))):
                here = seq(between, fixed[place], chain)
                chain = optional(here) if place >= low else here
            options.append(seq(opening, fixed[0], chain, closing))
        if low == 0:
            options.append(self.blank() if self.free_layout else EMPTY)
        return seq(Bytes(b"["), alt(*options), Bytes(b"]"))

    @staticmethod
    def _prefix(schema: dict[str, Any]) -> list[Any]:
        if "prefixItems" in schema:
            return schema["prefixItems"]
        return schema["items"] if isinstance(schema.get("items"), list) else []  # drafts before 2020-12

    @staticmethod
    def _rest(schema: dict[str, Any]) -> Any:
        if isinstance(schema.get("items"), list):
            return schema.get("additionalItems")
        return schema.get("items")
