"""JSON numbers within bounds, as automata that compare digits."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

from .automata import build, is_deterministic, minimise, trim
from .automaton import Automaton
from .expressions import (
    EMPTY,
    NOTHING,
    Bytes,
    ByteSet,
    Expression,
    GrammarError,
    Graph,
    Repeat,
    alt,
    optional,
    seq,
    star,
)
from .products import difference, intersection

MAX_DIVISOR, MAX_PLACES = 2_000, 40
DIGITS = ByteSet(((0x30, 0x39),))
POSITIVE = ByteSet(((0x31, 0x39),))
WHOLE = alt(Bytes(b"0"), seq(POSITIVE, star(DIGITS)))
FRACTION = seq(Bytes(b"."), DIGITS, star(DIGITS))
EXPONENT = seq(
    ByteSet(((0x45, 0x45), (0x65, 0x65))), optional(ByteSet(((0x2B, 0x2B), (0x2D, 0x2D)))), DIGITS, star(DIGITS)
)
INTEGER = seq(optional(Bytes(b"-")), WHOLE)
NUMBER = seq(optional(Bytes(b"-")), WHOLE, optional(FRACTION), optional(EXPONENT))


def _span(low: int, high: int) -> Expression:
    return ByteSet(((0x30 + low, 0x30 + high),)) if low <= high else NOTHING


def _split(bound: Decimal) -> tuple[str, str]:
    """Whole and fractional digits of a non-negative number, without trailing zeros."""
    whole, _, fraction = format(bound, "f").partition(".")
    return whole.lstrip("0") or "0", fraction.rstrip("0")


def _whole(digits: str, above: bool, tail: Expression, equal: Expression) -> Graph:
    """Numbers of as many digits: those that differ upwards (or downwards), then ``tail``; the same digits, then
    ``equal``.

    States: i digits equal so far; then, already different, so many digits to go; the end.
    """
    size = len(digits)
    end = 2 * size + 1
    edges: list[tuple[int, Expression, int]] = []
    for place, digit in enumerate(map(int, digits)):
        edges.append((place, Bytes(digits[place].encode()), place + 1))
        least = 1 if place == 0 and size > 1 else 0
        differing = _span(digit + 1, 9) if above else _span(least, digit - 1)
        edges.append((place, differing, size + 1 + (size - place - 1)))
    edges += [(size + 1 + left, DIGITS, size + left) for left in range(1, size)]
    edges += [(size + 1, tail, end), (size, equal, end)]
    return Graph(end + 1, tuple(edges), frozenset({end}))


def _digits_after(digits: str, above: bool, exclusive: bool) -> Graph:
    """Fractions (with their point) at least, or at most, 0.DIGITS; ``digits`` does not end in 0."""
    size = len(digits)
    free, end = size + 2, size + 3
    edges: list[tuple[int, Expression, int]] = [(0, Bytes(b"."), 1), (free, DIGITS, free), (free, EMPTY, end)]
    for place, digit in enumerate(map(int, digits), 1):
        edges.append((place, Bytes(digits[place - 1].encode()), place + 1))
        edges.append((place, _span(digit + 1, 9) if above else _span(0, digit - 1), free))
        if not above and place > 1:
            edges.append((place, EMPTY, end))  # a shorter fraction is smaller
    zeros = star(Bytes(b"0"))
    if above:
        edges.append((size + 1, seq(zeros, POSITIVE, star(DIGITS)) if exclusive else star(DIGITS), end))
    elif not exclusive:
        edges.append((size + 1, zeros, end))
    return Graph(end + 1, tuple(edges), frozenset({end}))


def at_least(bound: Decimal, exclusive: bool, fractions: bool) -> Expression:
    """Non-negative decimals (no exponent) of at least ``bound`` >= 0."""
    whole, fraction = _split(bound)
    tail = optional(FRACTION) if fractions else EMPTY
    equal: Expression = NOTHING
    if fraction:
        equal = _digits_after(fraction, True, exclusive) if fractions else NOTHING
    elif not exclusive:
        equal = tail
    elif fractions:
        equal = seq(Bytes(b"."), star(Bytes(b"0")), POSITIVE, star(DIGITS))
    longer = seq(POSITIVE, Repeat(DIGITS, len(whole), None), tail)
    return alt(longer, _whole(whole, True, tail, equal))


def at_most(bound: Decimal, exclusive: bool, fractions: bool) -> Expression:
    """Non-negative decimals (no exponent) of at most ``bound`` >= 0."""
    whole, fraction = _split(bound)
    tail = optional(FRACTION) if fractions else EMPTY
    equal: Expression = NOTHING
    if fraction:
        equal = alt(EMPTY, _digits_after(fraction, False, exclusive)) if fractions else EMPTY
    elif not exclusive:
        equal = optional(seq(Bytes(b".0"), star(Bytes(b"0")))) if fractions else EMPTY
    same = _whole(whole, False, tail, equal)
    if len(whole) == 1:
        return same
    return alt(
        seq(alt(DIGITS, seq(POSITIVE, Repeat(DIGITS, 1, len(whole) - 2)) if len(whole) > 2 else NOTHING), tail), same
    )


def multiples(divisor: int, places: int = 0, zeros: bool = False) -> Automaton:
    """Numbers without exponent that are multiples of ``divisor / 10**places``; states are remainders.

    Args:
        places: digits behind the point that matter.
        zeros: any number of zeros may follow them.
    """
    output = Automaton()
    scale = 10**places
    start, sign, zero = output.state(), output.state(), output.state(True)
    remainders = [output.state(value * scale % divisor == 0) for value in range(divisor)]
    for first in (start, sign):
        output.edges[first] = [(0x30, 0x30, zero)]
        output.edges[first] += [(0x30 + d, 0x30 + d, remainders[d % divisor]) for d in range(1, 10)]
    output.edges[start].append((0x2D, 0x2D, sign))
    for value, state in enumerate(remainders):
        output.edges[state] = [(0x30 + d, 0x30 + d, remainders[(10 * value + d) % divisor]) for d in range(10)]
    before = [*remainders, zero]
    values = [*range(divisor), 0]
    for place in range(1, places + 1):
        left = 10 ** (places - place)
        here = [output.state(value * left % divisor == 0) for value in range(divisor)]
        for state, value in zip(before, values, strict=True):
            source = state
            if place == 1:
                source = output.state()
                output.edges[state].append((0x2E, 0x2E, source))
            output.edges[source] += [(0x30 + d, 0x30 + d, here[(10 * value + d) % divisor]) for d in range(10)]
        before, values = here, list(range(divisor))
    if zeros:
        tail = output.state(True)
        output.edges[tail].append((0x30, 0x30, tail))
        if places:
            output.edges[before[0]].append((0x30, 0x30, tail))
        else:
            point = output.state()
            output.edges[point].append((0x30, 0x30, tail))
            for state, value in zip(before, values, strict=True):
                if value % divisor == 0:
                    output.edges[state].append((0x2E, 0x2E, point))
    return minimise(trim(output))


def spellings(value: Decimal) -> Automaton:
    """All ways to write a number without an exponent."""
    whole, fraction = _split(abs(value))
    zeros = star(Bytes(b"0"))
    sign = Bytes(b"-") if value < 0 else optional(Bytes(b"-")) if value == 0 else EMPTY
    tail = seq(Bytes(f".{fraction}".encode()), zeros) if fraction else optional(seq(Bytes(b".0"), zeros))
    return _determinised(seq(sign, Bytes(whole.encode()), tail))


def number_automaton(
    integer: bool,
    low: tuple[Decimal, bool] | None,
    high: tuple[Decimal, bool] | None,
    divisors: list[Decimal],
    apart: Sequence[Decimal] = (),
    unlike: Sequence[Decimal] = (),
) -> Expression:
    """A JSON number as an expression.

    Args:
        low, high: ``(bound, exclusive)``. Bounded numbers are written without exponents.
        divisors: ``multipleOf`` values: decimal numbers of which the digits make a number up to 2,000.
        apart: numbers of which it must not be a multiple.
        unlike: numbers that it must not be.

    Raises:
        GrammarError: a divisor that is not supported.
    """
    if low is None and high is None and not divisors and not apart and not unlike:
        return INTEGER if integer else NUMBER
    if low is not None and high is not None and low[0] > high[0]:
        return NOTHING
    scaled = [_scaled(divisor) for divisor in divisors]
    places: int | None = 0 if integer else None
    if any(digits == 0 for _, digits in scaled):
        places = 0  # whole multiples are written without a point
    fractions = places != 0
    tail = optional(FRACTION) if fractions else EMPTY
    if low is None and high is None:
        result = build(seq(optional(Bytes(b"-")), WHOLE, tail))
    else:
        positive: list[Expression] = [seq(WHOLE, tail)]
        negative: list[Expression] = [at_least(Decimal(0), True, fractions)]  # -0 is written 0
        if low is not None:
            if low[0] >= 0:
                positive.append(at_least(*low, fractions))
                negative.append(NOTHING)
            else:
                negative.append(at_most(-low[0], low[1], fractions))
        if high is not None:
            if high[0] >= 0:
                positive.append(at_most(*high, fractions))
            else:
                positive.append(NOTHING)
                negative.append(at_least(-high[0], high[1], fractions))
        sides = []
        for sign, conditions in ((b"", positive), (b"-", negative)):
            side = _determinised(conditions[0])
            for condition in conditions[1:]:
                side = intersection(side, _determinised(condition))
            if not side.empty:
                sides.append(seq(Bytes(sign), side))
        result = build(alt(*sides)) if sides else build(NOTHING)
    for divisor, digits in scaled:
        result = intersection(result, multiples(divisor, digits))
    for divisor, digits in map(_scaled, apart):
        result = difference(_determinised(result), multiples(divisor, digits, True))
    for value in unlike:
        result = difference(_determinised(result), spellings(value))
    return result


def _scaled(divisor: Decimal) -> tuple[int, int]:
    """``(whole, places)``: the divisor is ``whole / 10**places``.

    Raises:
        GrammarError: it is not positive, or needs too many states.
    """
    if divisor <= 0:
        raise GrammarError(f"multipleOf must be positive; got {divisor}.", "Give a positive number.")
    _, digits, exponent = divisor.normalize().as_tuple()
    assert isinstance(exponent, int)
    places = max(-exponent, 0)
    whole = int("".join(map(str, digits))) * 10 ** max(exponent, 0) if exponent < 10 else MAX_DIVISOR + 1
    if whole * (places + 1) > MAX_DIVISOR or places > MAX_PLACES:
        raise GrammarError(
            f"multipleOf {divisor} is not supported.",
            f"Up to {MAX_DIVISOR:,} are, and decimals of few digits such as 2.5 or 0.01.",
        )
    return whole, places


def _determinised(item: Expression) -> Automaton:
    automaton = build(item)
    assert is_deterministic(automaton)
    return minimise(automaton)
