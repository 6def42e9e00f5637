"""EBNF as xgrammar and llama.cpp (GBNF) users write it.

    root  ::= "{" pair ("," pair)* "}"      # comments run to the end of the line
    pair  ::= [a-z]+ ":" [^,}\\n]{1,20}

Literals (``"..."``, with the usual escapes), character classes, rule names, groups, ``|``, ``* + ?`` and repetition
ranges
``{n} {n,} {n,m}``, ``.`` for any character. A rule ends where the next ``name ::=`` begins; line breaks do not matter.
"""

from __future__ import annotations

import re
from typing import NoReturn

from .expressions import (
    ANY_CHAR,
    EMPTY,
    LAST_CHAR,
    Alt,
    Bytes,
    Chars,
    Expression,
    GrammarError,
    Range,
    Ref,
    Repeat,
    Rules,
    Seq,
    alt,
    invert_ranges,
    merge_ranges,
    references,
    seq,
)

MAX_NESTING = 100
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")
_HEAD = re.compile(r"([A-Za-z_][A-Za-z0-9_.\-]*)\s*::=")
_BLANK = re.compile(r"(?:\s+|#[^\n]*)*")
_RANGE = re.compile(r"\{\s*(\d+)\s*(?:(,)\s*(\d*)\s*)?\}")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "b": "\b", "a": "\a", "0": "\0", "e": "\x1b"}
_HEX = {"x": 2, "u": 4, "U": 8}


class _Parser:
    def __init__(self, source: str):
        self.source, self.place, self.depth = source, 0, 0

    def fail(self, message: str, hint: str, place: int | None = None) -> NoReturn:
        at = self.place if place is None else place
        line = self.source.count("\n", 0, at) + 1
        column = at - (self.source.rfind("\n", 0, at) + 1) + 1
        excerpt = (
            self.source.splitlines()[line - 1][:100]
            if self.source.strip() and line <= self.source.count("\n") + 1
            else ""
        )
        raise GrammarError(f"Grammar, line {line}, column {column}: {message}.\n    {excerpt}", hint)

    def skip(self) -> None:
        self.place = _BLANK.match(self.source, self.place).end()  # type: ignore[union-attr]

    def peek(self) -> str:
        return self.source[self.place] if self.place < len(self.source) else ""

    def parse(self) -> Rules:
        rules: Rules = {}
        self.uses: dict[str, int] = {}
        self.skip()
        while self.peek():
            head = _HEAD.match(self.source, self.place)
            if head is None:
                self.fail("a rule was expected", 'Rules look like: name ::= "text" other_rule')
            assert head is not None
            name = head[1]
            if name in rules:
                self.fail(f"the rule {name!r} is defined twice", "Join both with '|'.")
            self.place = head.end()
            rules[name] = self.alternatives()
            self.skip()
            if self.peek() == ")":
                self.fail("unbalanced ')'", 'Quote it: ")".')
        for name, place in self.uses.items():
            if name not in rules:
                import difflib

                close = difflib.get_close_matches(name, rules, n=1)
                hint = f"Did you mean {close[0]!r}?" if close else f"Define it: {name} ::= ..."
                self.fail(f"the rule {name!r} is not defined", hint, place)
        return rules

    def alternatives(self) -> Expression:
        self.depth += 1
        if self.depth > MAX_NESTING:
            self.fail(f"groups nested deeper than {MAX_NESTING}", "Give the inner groups rules of their own.")
        options = [self.sequence()]
        while self.peek() == "|":
            self.place += 1
            options.append(self.sequence())
        self.depth -= 1
        return alt(*options)

    def sequence(self) -> Expression:
        parts = []
        while True:
            self.skip()
            char = self.peek()
            if not char or char in "|)" or _HEAD.match(self.source, self.place):
                break
            parts.append(self.quantified())
        return seq(*parts) if parts else EMPTY

    def quantified(self) -> Expression:
        atom = self.atom()
        while True:
            self.skip()
            start, char = self.place, self.peek()
            if char and char in "*+?":
                self.place += 1
                low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
            elif char == "{":
                found = _RANGE.match(self.source, self.place)
                if found is None:
                    self.fail(
                        "a repetition range was expected after '{'", 'Write {2}, {2,} or {2,5}; quote a brace: "{".'
                    )
                assert found is not None
                self.place = found.end()
                low = int(found[1])
                high = (int(found[3]) if found[3] else None) if found[2] else low
                if high is not None and high < low:
                    self.fail("a repetition range with its bounds swapped", "Write the smaller bound first.", start)
            else:
                return atom
            if isinstance(atom, Repeat) and (atom.low, atom.high) == (0, None) and low <= 1:
                continue  # (a*)* is a*
            atom = Repeat(atom, low, high)

    def atom(self) -> Expression:
        start, char = self.place, self.peek()
        if char in "\"'":
            return Bytes(self.literal(char))
        if char == "[":
            return self.char_class()
        if char == "(":
            self.place += 1
            inner = self.alternatives()
            if self.peek() != ")":
                self.fail("a group is not closed", "Add ')'.", start)
            self.place += 1
            return inner
        if char == ".":
            self.place += 1
            return ANY_CHAR
        if name := _NAME.match(self.source, self.place):
            self.place = name.end()
            self.uses.setdefault(name[0], start)
            return Ref(name[0])
        if char in "*+?":
            self.fail(f"{char!r} has nothing to repeat", f'Quote it: "{char}".')
        return self.fail(f"unexpected {char!r}", f'Quote it if it is text: "{char}".')

    def literal(self, quote: str) -> bytes:
        start = self.place
        self.place += 1
        output: list[str] = []
        while self.peek() != quote:
            if not self.peek() or self.peek() == "\n":
                self.fail("a literal is not closed", f"Add {quote} (a line break inside is written \\n).", start)
            output.append(self.character())
        self.place += 1
        return "".join(output).encode("utf-8", "surrogatepass")

    def character(self) -> str:
        start, char = self.place, self.peek()
        self.place += 1
        if char != "\\":
            return char
        escape = self.peek()
        self.place += 1
        if escape in _HEX:
            digits = self.source[self.place : self.place + _HEX[escape]]
            try:
                code = int(digits, 16)
            except ValueError:
                code = -1
            if len(digits) < _HEX[escape] or not 0 <= code <= LAST_CHAR or 0xD800 <= code <= 0xDFFF:
                self.fail(f"a bad \\{escape} escape", f"\\{escape} takes {_HEX[escape]} hexadecimal digits.", start)
            self.place += _HEX[escape]
            return chr(code)
        if escape in _ESCAPES:
            return _ESCAPES[escape]
        if not escape or (escape.isalnum() and escape.isascii()):
            self.fail(
                f"unknown escape \\{escape}", 'Known: \\n \\t \\r \\" \\\\ \\] \\- \\xNN \\uNNNN \\UNNNNNNNN.', start
            )
        return escape

    def char_class(self) -> Chars:
        start = self.place
        self.place += 1
        negated = self.peek() == "^"
        if negated:
            self.place += 1
        ranges: list[Range] = []
        while self.peek() != "]":
            if not self.peek() or self.peek() == "\n":
                self.fail("a character class is not closed", "Add ']'.", start)
            place = self.place
            low = ord(self.character())
            high = low
            if self.peek() == "-" and self.source[self.place + 1 : self.place + 2] not in ("]", ""):
                self.place += 1
                high = ord(self.character())
                if high < low:
                    self.fail("a range with its ends swapped", "Write the lower end first.", place)
            ranges.append((low, high))
        self.place += 1
        merged = merge_ranges(ranges)
        if not merged and not negated:
            self.fail("an empty character class matches nothing", "List characters, or write [^] for any.", start)
        return Chars(invert_ranges(merged) if negated else merged)


def parse_ebnf(source: str, root: str = "root") -> Rules:
    """The rules of a grammar by name.

    Raises:
        GrammarError: a syntax error with line and column, an undefined or doubly defined rule, no root.
    """
    rules = _Parser(source).parse()
    if not rules:
        raise GrammarError("The grammar is empty.", 'For example: root ::= "yes" | "no"')
    if root not in rules:
        raise GrammarError(
            f"The grammar has no rule {root!r} to start from.", f"It defines: {', '.join(list(rules)[:12])}."
        )
    return eliminate_left_recursion(rules)


def eliminate_left_recursion(rules: Rules) -> Rules:
    """Rewrites directly left-recursive rules, ``a ::= a x | y``, as ``a ::= y x*``: the same language.

    Longer cycles are found when the automata are built, and refused there.
    """
    output = {}
    for name, body in rules.items():
        options = body.parts if isinstance(body, Alt) else (body,)
        tails, others = [], []
        for option in options:
            parts = option.parts if isinstance(option, Seq) else (option,)
            if parts and parts[0] == Ref(name):
                if parts[1:]:  # a ::= a adds nothing
                    tails.append(seq(*parts[1:]))
            else:
                others.append(option)
        if (
            len(others) < len(options)
            and others
            and not any(name in set(references(tail)) and _starts_with(tail, name) for tail in tails)
        ):
            body = seq(alt(*others), Repeat(alt(*tails), 0, None)) if tails else alt(*others)
        output[name] = body
    return output


def _starts_with(item: Expression, name: str) -> bool:
    return item == Ref(name) or (isinstance(item, Seq) and bool(item.parts) and item.parts[0] == Ref(name))
