"""What a grammar is made of: a small algebra of expressions over bytes, characters and rules.

Parsers (EBNF, regular expressions, JSON Schema, structural tags) produce these; ``automata`` turns them into
automata over bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, cast

from ...core.errors import BadInputError

Range = tuple[int, int]
LAST_CHAR = 0x10FFFF
TEXT_START, TEXT_END = 256, 257
"""Virtual symbols around the text, by which anchors (``^``, ``$``) are expressed; ``automata.strip_marks`` removes
them."""


class GrammarError(BadInputError):
    """A grammar, expression or schema that cannot be used; says where and what to do."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """A literal."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of sorted, disjoint code point ranges (surrogates never match: UTF-8 has none)."""

    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class ByteSet:
    """One symbol out of sorted, disjoint ranges (bytes, or the two marks)."""

    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Seq:
    """One after the other; without parts the empty text."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Alt:
    """One of them; without parts no text at all."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """``low`` to ``high`` (None: any number) times ``item``."""

    item: Expression
    low: int
    high: int | None


@dataclass(frozen=True, slots=True)
class Ref:
    """Another rule, by name."""

    name: str


@dataclass(frozen=True, slots=True)
class Graph:
    """A transition graph whose edges are expressions: ``edges`` are ``(source, expression, target)``; state 0
    starts. ``reads`` are further edges that read one byte each: sources, bytes, targets."""

    size: int
    edges: tuple[tuple[int, Expression, int], ...]
    finals: frozenset[int]
    reads: tuple[tuple[int, ...], bytes, tuple[int, ...]] = ((), b"", ())


class CompiledPart(Protocol):
    """An automaton as part of an expression (``automata.Automaton``, which imports this module)."""

    edges: list[list[tuple[int, int, int]]]
    calls: list[list[tuple[str, int]]]
    finals: list[bool]

    def __len__(self) -> int: ...


Expression = Bytes | Chars | ByteSet | Seq | Alt | Repeat | Ref | Graph | CompiledPart
Rules = dict[str, Expression]
"""Expressions by the names of rules."""

EMPTY = Seq(())
NOTHING = Alt(())
ANY_CHAR = Chars(((0, LAST_CHAR),))


def seq(*parts: Expression) -> Expression:
    """One after the other."""
    return parts[0] if len(parts) == 1 else Seq(tuple(parts))


def alt(*parts: Expression) -> Expression:
    """One of them."""
    return parts[0] if len(parts) == 1 else Alt(tuple(parts))


def text(string: str) -> Bytes:
    """A literal in UTF-8."""
    return Bytes(string.encode("utf-8"))


def optional(item: Expression) -> Repeat:
    """The item or nothing."""
    return Repeat(item, 0, 1)


def star(item: Expression) -> Repeat:
    """The item any number of times."""
    return Repeat(item, 0, None)


def merge_ranges(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Sorted and joined where they touch."""
    merged: list[Range] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return tuple(merged)


def invert_ranges(ranges: Iterable[Range], last: int = LAST_CHAR) -> tuple[Range, ...]:
    """What the ranges leave out of ``0 .. last``."""
    output, start = [], 0
    for low, high in merge_ranges(ranges):
        if low > start:
            output.append((start, low - 1))
        start = high + 1
    if start <= last:
        output.append((start, last))
    return tuple(output)


def intersect_ranges(first: Iterable[Range], second: Iterable[Range]) -> tuple[Range, ...]:
    """What both contain."""
    return invert_ranges([*invert_ranges(first), *invert_ranges(second)])


def chars(spec: str) -> Chars:
    """A character class from pairs: ``chars("azAZ__")`` is ``[a-zA-Z_]``."""
    return Chars(merge_ranges((ord(a), ord(b)) for a, b in zip(spec[::2], spec[1::2], strict=True)))


@lru_cache(maxsize=4096)
def utf8_sequences(ranges: tuple[Range, ...]) -> tuple[tuple[Range, ...], ...]:
    """Code point ranges as sequences of byte ranges, which together match their UTF-8 encodings and nothing else."""
    return tuple(sequence for low, high in ranges for sequence in _split(low, high))


def _split(low: int, high: int) -> Iterator[tuple[Range, ...]]:
    if low > high:
        return
    for border in (0x7F, 0x7FF, 0xD7FF, 0xDFFF, 0xFFFF):  # encodings change length here; surrogates have none
        if low <= border < high:
            yield from _split(low, border)
            yield from _split(border + 1, high)
            return
    if low >= 0xD800 and high <= 0xDFFF:
        return
    if high <= 0x7F:
        yield ((low, high),)
        return
    for continuation in range(1, 4):  # the trailing bytes must be free, or fixed by an equal lead
        mask = (1 << (6 * continuation)) - 1
        if (low & ~mask) != (high & ~mask):
            if low & mask:
                yield from _split(low, low | mask)
                yield from _split((low | mask) + 1, high)
                return
            if (high & mask) != mask:
                yield from _split(low, (high & ~mask) - 1)
                yield from _split(high & ~mask, high)
                return
    yield tuple(zip(chr(low).encode("utf-8"), chr(high).encode("utf-8"), strict=True))


def expression_size(item: Expression, rules: dict[str, int], limit: int) -> int:
    """About how many automaton states an expression takes; ``limit`` as soon as it is reached."""
    total = 0
    pending: list[tuple[Expression, int]] = [(item, 1)]
    while pending and total < limit:
        node, times = pending.pop()
        # looking the type up takes half the time of isinstance, and the kinds have no subclasses
        if type(node) is Bytes:
            total += times * len(node.data)
        elif type(node) is Chars:
            total += times * (1 if node.ranges and node.ranges[-1][1] < 0x80 else 8)
        elif type(node) is Seq or type(node) is Alt:
            if len(node.parts) * times > limit:
                return limit
            total += times
            pending += [(part, times) for part in node.parts]
        elif type(node) is Repeat:
            count = node.low + 1 if node.high is None else node.high
            pending.append((node.item, min(times * max(count, 1), limit)))
            total += times
        elif type(node) is Ref:
            total += times * rules.get(node.name, 1)
        elif type(node) is Graph:
            total += times * node.size
            pending += [(label, times) for _, label, _ in node.edges]
        elif type(node) is ByteSet:
            total += times
        else:
            total += times * len(cast("CompiledPart", node))
    return min(total, limit)


def references(item: Expression) -> list[str]:
    """The names of all rules that an expression mentions, with repetitions."""
    found: list[str] = []
    pending: list[Expression] = [item]
    while pending:
        node = pending.pop()
        if type(node) is Ref:
            found.append(node.name)
        elif type(node) is Seq or type(node) is Alt:
            pending += node.parts
        elif type(node) is Repeat:
            pending.append(node.item)
        elif type(node) is Graph:
            pending += [label for _, label, _ in node.edges]
    return found
