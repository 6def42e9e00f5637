"""Regular expressions in the flavour of ECMAScript and JSON Schema, as expressions over characters.

Everything regular is supported: classes, escapes, ``\\d \\w \\s`` and their negations, Unicode properties by category
(``\\p{L}``), groups, alternation, greedy and lazy quantifiers (the language is the same), anchors anywhere. Back
references,
look-around and word boundaries are not regular, or not worth their size: they are refused by name and position.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import NoReturn

from .automata import Builder, build, strip_marks
from .automaton import Automaton
from .expressions import (
    ANY_CHAR,
    EMPTY,
    LAST_CHAR,
    TEXT_END,
    TEXT_START,
    Alt,
    ByteSet,
    Chars,
    Expression,
    GrammarError,
    Range,
    Repeat,
    Seq,
    alt,
    expression_size,
    invert_ranges,
    merge_ranges,
    seq,
    star,
)

MAX_NESTING = 100
MAX_SIZE = 200_000
DIGIT: tuple[Range, ...] = ((0x30, 0x39),)
WORD: tuple[Range, ...] = merge_ranges([(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)])
SPACE: tuple[Range, ...] = merge_ranges(
    [
        (0x2000, 0x200A),
        *((ord(char), ord(char)) for char in "\t\n\v\f\r \u00a0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff"),
    ]
)
NEWLINES: tuple[Range, ...] = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))
CLASSES = {"d": DIGIT, "w": WORD, "s": SPACE}
CONTROL = {"t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r", "0": "\0"}
STARTS, ENDS = ByteSet(((TEXT_START, TEXT_START),)), ByteSet(((TEXT_END, TEXT_END),))


@lru_cache(maxsize=64)
def category(name: str) -> tuple[Range, ...]:
    """Code points of a Unicode general category (``L``, ``Lu``, ...)."""
    found: list[Range] = []
    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code)).startswith(name):
            if found and found[-1][1] == code - 1:
                found[-1] = (found[-1][0], code)
            else:
                found.append((code, code))
    return tuple(found)


LONG_CATEGORIES = {
    "Letter": "L", "Lowercase_Letter": "Ll", "Uppercase_Letter": "Lu", "Mark": "M", "Number": "N",
    "Decimal_Number": "Nd",
    "digit": "Nd", "Punctuation": "P", "punct": "P", "Symbol": "S", "Separator": "Z", "Space_Separator": "Zs",
    "Other": "C",
    "Control": "Cc", "cntrl": "Cc", "Alphabetic": "L",
}  # fmt: skip


class _Parser:
    def __init__(self, pattern: str, dot_newline: bool):
        self.text, self.place, self.depth = pattern, 0, 0
        self.dot = ANY_CHAR if dot_newline else Chars(invert_ranges(NEWLINES))

    def fail(
        self, message: str, hint: str = "See docs: supported regular expressions.", place: int | None = None
    ) -> NoReturn:
        at = self.place if place is None else place
        shown = self.text if len(self.text) <= 60 else self.text[max(0, at - 25) : at + 25]
        raise GrammarError(f"Regular expression {shown!r}: {message} at position {at}.", hint)

    def peek(self) -> str:
        return self.text[self.place] if self.place < len(self.text) else ""

    def take(self) -> str:
        char = self.peek()
        self.place += 1
        return char

    def parse(self) -> Expression:
        result = self.alternatives()
        if self.place < len(self.text):
            self.fail("unbalanced ')'", "Escape it: \\).")
        if expression_size(result, {}, MAX_SIZE) >= MAX_SIZE:
            self.fail(f"it unrolls to more than {MAX_SIZE:,} states", "Lower the repetition counts.", 0)
        return result

    def alternatives(self) -> Expression:
        self.depth += 1
        if self.depth > MAX_NESTING:
            self.fail(f"groups nested deeper than {MAX_NESTING}", "Flatten the expression.")
        options = [self.sequence()]
        while self.peek() == "|":
            self.place += 1
            options.append(self.sequence())
        self.depth -= 1
        return alt(*options)

    def sequence(self) -> Expression:
        parts = []
        while self.peek() and self.peek() not in "|)":
            parts.append(self.quantified())
        return seq(*parts) if parts else EMPTY

    def quantified(self) -> Expression:
        start = self.place
        atom = self.atom()
        while self.peek() and self.peek() in "*+?{":
            bounds = self.quantifier()
            if bounds is None:
                break
            low, high = bounds
            if isinstance(atom, ByteSet) and atom in (STARTS, ENDS):
                self.fail("an anchor cannot be repeated", "Remove the quantifier.", start)
            if isinstance(atom, Repeat) and (atom.low, atom.high) == (0, None) and low <= 1:
                continue  # (a*)* is a*
            atom = Repeat(atom, low, high)
        return atom

    def quantifier(self) -> tuple[int, int | None] | None:
        start, char = self.place, self.take()
        bounds: tuple[int, int | None]
        if char == "{":
            close = self.text.find("}", self.place)
            body = self.text[self.place : close] if close >= 0 else ""
            low_text, comma, high_text = body.partition(",")
            if not low_text.isascii() or not low_text.isdigit() or (high_text and not high_text.isdigit()):
                self.fail("'{' that is no quantifier", "Escape it: \\{.", start)
            self.place = close + 1
            low = int(low_text)
            bounds = (low, (int(high_text) if high_text else None) if comma else low)
            if bounds[1] is not None and bounds[1] < low:
                self.fail(f"quantifier {{{body}}} with its bounds swapped", "Write the smaller bound first.", start)
        else:
            bounds = {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]  # type: ignore[assignment]
        if self.peek() == "?":
            self.place += 1
        elif self.peek() == "+":
            self.fail("possessive quantifiers are not supported", "Remove the second '+'.")
        return bounds

    def atom(self) -> Expression:
        start, char = self.place, self.take()
        if char == "(":
            return self.group(start)
        if char == "[":
            return self.char_class(start)
        if char == ".":
            return self.dot
        if char == "^":
            return STARTS
        if char == "$":
            return ENDS
        if char == "\\":
            return Chars(self.escape(in_class=False))
        if char in "*+?":
            self.fail(f"{char!r} has nothing to repeat", f"Escape it: \\{char}.", start)
        if char == "{":
            self.fail("'{' has nothing to repeat", "Escape it: \\{.", start)
        return Chars(((ord(char), ord(char)),))

    def group(self, start: int) -> Expression:
        if self.peek() == "?":
            rest = self.text[self.place :]
            if rest.startswith("?:"):
                self.place += 2
            elif rest.startswith(("?=", "?!", "?<=", "?<!")):
                self.fail(
                    "look-around is not supported", "Say it without look-around, or as two patterns under allOf.", start
                )
            elif rest.startswith(("?<", "?P<")):
                close = self.text.find(">", self.place)
                if close < 0:
                    self.fail("a group's name is not closed", "Write (?<name>...).", start)
                self.place = close + 1
            else:
                self.fail("this kind of group is not supported", "Use (...) or (?:...).", start)
        inner = self.alternatives()
        if self.take() != ")":
            self.fail("a group is not closed", "Add ')'.", start)
        return inner

    def char_class(self, start: int) -> Chars:
        negated = self.peek() == "^"
        if negated:
            self.place += 1
        ranges: list[Range] = []
        while self.peek() != "]":
            if not self.peek():
                self.fail("a character class is not closed", "Add ']'.", start)
            place = self.place
            low = self.class_member()
            after = self.text[self.place + 1 : self.place + 2]
            if self.peek() == "-" and after not in ("]", ""):
                self.place += 1
                high = self.class_member()
                if len(low) == len(high) == 1 and low[0][0] == low[0][1] and high[0][0] == high[0][1]:
                    if low[0][0] > high[0][0]:
                        self.fail("a range with its ends swapped", "Write the lower end first.", place)
                    ranges.append((low[0][0], high[0][0]))
                else:
                    self.fail("a range between classes", "Put '-' last, or escape it.", place)
            else:
                ranges += low
        self.place += 1
        merged = merge_ranges(ranges)
        return Chars(invert_ranges(merged) if negated else merged)

    def class_member(self) -> tuple[Range, ...]:
        char = self.take()
        if char == "\\":
            return self.escape(in_class=True)
        return ((ord(char), ord(char)),)

    def hexadecimal(self, digits: int, start: int) -> int:
        body = self.text[self.place : self.place + digits]
        try:
            value = int(body, 16) if len(body) == digits else -1
        except ValueError:
            value = -1
        if value < 0:
            self.fail(f"an escape that needs {digits} hexadecimal digits", "For example \\u00e9.", start)
        self.place += digits
        return value

    def escape(self, in_class: bool) -> tuple[Range, ...]:
        start, char = self.place - 1, self.take()
        if not char:
            self.fail("a backslash at the end", "Escape it: \\\\.", start)
        if char in CLASSES:
            return CLASSES[char]
        if char in "DWS":
            return invert_ranges(CLASSES[char.lower()])
        if char in "pP":
            close = self.text.find("}", self.place)
            if self.peek() != "{" or close < 0:
                self.fail("a property without its name in braces", "Write \\p{L}.", start)
            name = self.text[self.place + 1 : close].split("=")[-1]
            self.place = close + 1
            ranges = category(LONG_CATEGORIES.get(name, name))
            if not ranges:
                self.fail(f"unknown Unicode property {name!r}", "Categories are supported: L, Lu, Nd, P, ...", start)
            return invert_ranges(ranges) if char == "P" else ranges
        if char == "b" and in_class:
            return ((8, 8),)
        if char in "bB":
            self.fail("word boundaries are not supported", "Spell out what may stand beside the word.", start)
        if char in "123456789" or char == "k":
            self.fail("back references are not supported", "Repeat the group.", start)
        if char == "x":
            code = self.hexadecimal(2, start)
        elif char == "u":
            if self.peek() == "{":
                close = self.text.find("}", self.place)
                try:
                    code = int(self.text[self.place + 1 : close], 16)
                except ValueError:
                    code = LAST_CHAR + 1
                if close < 0 or code > LAST_CHAR:
                    self.fail("a bad \\u{...} escape", "For example \\u{1F600}.", start)
                self.place = close + 1
            else:
                code = self.hexadecimal(4, start)
                if 0xD800 <= code <= 0xDBFF and self.text[self.place : self.place + 2] == "\\u":
                    self.place += 2
                    low = self.hexadecimal(4, start)
                    code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)
        elif char == "c" and self.peek().isalpha() and self.peek().isascii():
            code = ord(self.take()) % 32
        elif char in CONTROL:
            code = ord(CONTROL[char])
        elif char.isalnum() and char.isascii():
            self.fail(f"unknown escape \\{char}", f"Write {char} without the backslash.", start)
        else:
            code = ord(char)
        return ((code, code),)


def parse_regex(pattern: str, dot_newline: bool = False) -> Expression:
    """A pattern as an expression over characters, with anchors as marks.

    Raises:
        GrammarError: a syntax error or something unsupported, with its position.
    """
    return _Parser(pattern, dot_newline).parse()


def has_anchor(item: Expression) -> bool:
    if isinstance(item, ByteSet):
        return item in (STARTS, ENDS)
    if isinstance(item, (Seq, Alt)):
        return any(map(has_anchor, item.parts))
    return isinstance(item, Repeat) and has_anchor(item.item)


def map_chars(item: Expression, change: Callable[[Chars], Expression]) -> Expression:
    """The expression with every character class replaced."""
    if isinstance(item, Chars):
        return change(item)
    if isinstance(item, (Seq, Alt)):
        return type(item)(tuple(map_chars(part, change) for part in item.parts))
    if isinstance(item, Repeat):
        return Repeat(map_chars(item.item, change), item.low, item.high)
    return item


def regex_automaton(
    pattern: str,
    search: bool = False,
    any_char: Expression = ANY_CHAR,
    change: Callable[[Chars], Expression] = lambda item: item,
) -> Automaton:
    """A pattern's language over bytes.

    Args:
        search: the pattern may match anywhere in the text unless anchored (JSON Schema), instead of the whole text.
        any_char: one character of the text, around a match.
        change: how a character class is spelled in the text (for example with JSON's escapes).
    """
    item = map_chars(parse_regex(pattern), change)
    around = star(any_char)
    parts = item.parts if isinstance(item, Seq) else (item,)
    first, last = parts[:1] == (STARTS,), parts[-1:] == (ENDS,)
    inner = seq(*parts[first : len(parts) - last])
    if not has_anchor(inner):  # anchors at the ends only, as most are
        return build(seq(EMPTY if first else around, inner, EMPTY if last else around) if search else inner)
    before = alt(EMPTY, seq(STARTS, around) if search else STARTS)
    after = alt(EMPTY, seq(around, ENDS) if search else ENDS)
    builder = Builder()
    return strip_marks(builder, builder.add(seq(before, item, after), 0))
