"""The rules made for a schema's sets, and the layout of the documents that they describe."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from ..automaton import Automaton, arrays
from ..counting import counted
from ..expressions import EMPTY, NOTHING, Bytes, Expression, GrammarError, Ref, Rules, seq, text
from ..json_text import Json, quoted
from ..products import combine, difference
from .negation import rewritten
from .options import SchemaOptions
from .sets import Member, Place, Schema, SchemaObject, SchemaSets

MAX_INDENT_DEPTH = 12
MAX_PRODUCTS = 250_000
"""States of all products of patterns that one document may need; so many take about a second."""
HOW: dict[str, Callable[[bool, bool], bool]] = {
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
}


class SchemaRules(SchemaSets):
    """The sets that have been met, each with the rule that is, or will be, made for it.

    Attributes:
        names: the rule of a set at an indentation depth (0 unless documents are indented).
        pending: rules that are mentioned and not made yet.
        rules: the finished ones.
        walked: sub-schemas that have been searched for cycles, and whether the search is over.
        cases: how many cases anyOf and oneOf that hold together have made.
        strings: the strings of sub-schemas, by number; None while they are looked for.
        products: what ``joined`` has made, by the identities of its arguments (which are kept).
        states: how many states these have.
        exclusive: the branches of each oneOf, each without what the others allow.
        hopeless: whether a set evidently allows nothing.
    """

    def __init__(self, document: Schema, options: SchemaOptions):
        super().__init__(document, options)
        self.names: dict[tuple[frozenset[Member], int], str] = {}
        self.pending: list[tuple[str, frozenset[Member], int]] = []
        self.rules: Rules = {}
        self.walked: dict[int, bool] = {}
        self.cases = 0
        self.strings: dict[int, Automaton | None] = {}
        self.products: dict[tuple[str, int, int], tuple[Automaton, Automaton, Automaton]] = {}
        self.states = 0
        self.exclusive: dict[int, list[Place]] = {}
        self.hopeless: dict[frozenset[int], bool] = {}

    def rewritten(self, schema: SchemaObject, pointer: str) -> Iterator[Place]:
        return rewritten(self, schema, pointer)

    def rule(self, members: frozenset[Member] | None, depth: int) -> Expression:
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

    def joined(self, how: Literal["and", "or", "minus"], first: Automaton, second: Automaton) -> Automaton:
        """The product of two automata, made once."""
        key = how, id(first), id(second)
        if key not in self.products:
            if not arrays(first).opens:  # nothing
                result = second if how == "or" else first
            elif not arrays(second).opens:
                result = second if how == "and" else first
            else:
                result = difference(first, second) if how == "minus" else combine(first, second, HOW[how])
                self.states += len(result)
                if self.states > MAX_PRODUCTS:
                    raise GrammarError(
                        f"Patterns that must hold at once need more than {MAX_PRODUCTS:,} states in all.",
                        "Simplify some of the patterns, or say less about one string.",
                    )
            self.products[key] = result, first, second
        return self.products[key][0]

    def counted(self, automaton: Automaton, schema: SchemaObject) -> Automaton:
        """Those of an automaton's strings that have the length which a schema asks for."""
        high = schema.get("maxLength")
        return counted(automaton, int(schema.get("minLength", 0)), None if high is None else int(high))

    def sub(self, schemas: Iterable[Place], depth: int) -> Expression:
        return self.rule(self.members(schemas), depth)

    def blank(self) -> Expression:
        return Ref("ws") if self.free_layout else EMPTY

    @property
    def free_layout(self) -> bool:
        return self.options.any_whitespace and self.options.indent is None and self.options.separators is None

    def separators(self, depth: int) -> tuple[Expression, Expression, Expression, Expression]:
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

    def literal(self, value: Json, depth: int) -> Expression:
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
        return Bytes(quoted(value)) if isinstance(value, str) else text(json.dumps(value))

    def key(self, name: str) -> Bytes:
        return Bytes(quoted(name))
