"""JSON numbers within bounds, as automata that compare digits."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from .automata import Automaton, build, intersection, is_deterministic, minimise, trim
from .expressions import EMPTY, NOTHING, Bytes, ByteSet, GrammarError, alt, optional, seq, star

MAX_DIVISOR = 2_000
DIGITS = ByteSet(((0x30, 0x39),))
POSITIVE = ByteSet(((0x31, 0x39),))
WHOLE = alt(Bytes(b"0"), seq(POSITIVE, star(DIGITS)))
FRACTION = seq(Bytes(b"."), DIGITS, star(DIGITS))
EXPONENT = seq(ByteSet(((0x45, 0x45), (0x65, 0x65))), optional(ByteSet(((0x2B, 0x2B), (0x2D, 0x2D)))), DIGITS, star(DIGITS))
INTEGER = seq(optional(Bytes(b"-")), WHOLE)
NUMBER = seq(optional(Bytes(b"-")), WHOLE, optional(FRACTION), optional(EXPONENT))


def _span(low: int, high: int) -> Any:
    return ByteSet(((0x30 + low, 0x30 + high),)) if low <= high else NOTHING


def _split(bound: Decimal) -> tuple[str, str]:
    """Whole and fractional digits of a non-negative number, without trailing zeros."""
    whole, _, fraction = format(bound, "f").partition(".")
    return whole.lstrip("0") or "0", fraction.rstrip("0")


def _repeat(item: Any, times: int) -> Any:
    return seq(*[item] * times)


def at_least(bound: Decimal, exclusive: bool, fractions: bool) -> Any:
    """Non-negative decimals (no exponent) of at least ``bound`` >= 0."""
    whole, fraction = _split(bound)
    tail = optional(FRACTION) if fractions else EMPTY
    size = len(whole)
    options = [seq(POSITIVE, _repeat(DIGITS, size), star(DIGITS), tail)]  # more digits
    for place, digit in enumerate(map(int, whole)):  # as many digits, the first difference is upwards
        options.append(seq(Bytes(whole[:place].encode()), _span(digit + 1, 9), _repeat(DIGITS, size - place - 1), tail))
    head = Bytes(whole.encode())
    zeros = star(Bytes(b"0"))
    if not fraction:
        if not exclusive:
            options.append(seq(head, tail))
        elif fractions:
            options.append(seq(head, Bytes(b"."), zeros, POSITIVE, star(DIGITS)))
    elif fractions:
        for place, digit in enumerate(map(int, fraction)):
            options.append(seq(head, Bytes(b"." + fraction[:place].encode()), _span(digit + 1, 9), star(DIGITS)))
        exact = seq(head, Bytes(b"." + fraction.encode()))
        options.append(seq(exact, zeros, POSITIVE, star(DIGITS)) if exclusive else seq(exact, star(DIGITS)))
    return alt(*options)


def at_most(bound: Decimal, exclusive: bool, fractions: bool) -> Any:
    """Non-negative decimals (no exponent) of at most ``bound`` >= 0."""
    whole, fraction = _split(bound)
    tail = optional(FRACTION) if fractions else EMPTY
    size = len(whole)
    options = []
    for digits in range(1, size):  # fewer digits
        options.append(seq(WHOLE if digits == 1 else seq(POSITIVE, _repeat(DIGITS, digits - 1)), tail))
        if digits == 1:
            options[-1] = seq(DIGITS, tail)
    for place, digit in enumerate(map(int, whole)):
        least = 1 if place == 0 and size > 1 else 0
        options.append(
            seq(Bytes(whole[:place].encode()), _span(least, digit - 1), _repeat(DIGITS, size - place - 1), tail)
        )
    head = Bytes(whole.encode())
    zeros = star(Bytes(b"0"))
    if fractions and fraction:
        options.append(head)
        for place, digit in enumerate(map(int, fraction)):
            before = Bytes(b"." + fraction[:place].encode())
            options.append(seq(head, before, _span(0, digit - 1), star(DIGITS)))
            if place:
                options.append(seq(head, before))  # a shorter fraction is smaller
        if not exclusive:
            options.append(seq(head, Bytes(b"." + fraction.encode()), zeros))
    elif not exclusive or fraction:
        options.append(seq(head, optional(seq(Bytes(b"."), Bytes(b"0"), zeros))) if fractions else head)
    return alt(*options)


def multiples(divisor: int) -> Automaton:
    """Whole numbers (perhaps negative) divisible by ``divisor``: states are remainders."""
    output = Automaton()
    start, sign, zero = output.state(), output.state(), output.state(True)
    remainders = [output.state(value == 0) for value in range(divisor)]
    for first in (start, sign):
        output.edges[first] = [(0x30, 0x30, zero)]
        output.edges[first] += [(0x30 + d, 0x30 + d, remainders[d % divisor]) for d in range(1, 10)]
    output.edges[start].append((0x2D, 0x2D, sign))
    for value, state in enumerate(remainders):
        output.edges[state] = [(0x30 + d, 0x30 + d, remainders[(10 * value + d) % divisor]) for d in range(10)]
    return trim(output)


def number_automaton(
    integer: bool,
    low: tuple[Decimal, bool] | None,
    high: tuple[Decimal, bool] | None,
    divisors: list[Decimal],
) -> Any:
    """A JSON number as an expression.

    Args:
        low, high: ``(bound, exclusive)``. Bounded numbers are written without exponents.
        divisors: ``multipleOf`` values: whole numbers up to 2,000, or powers of ten such as 0.01.

    Raises:
        GrammarError: a divisor that is not supported.
    """
    if low is None and high is None and not divisors:
        return INTEGER if integer else NUMBER
    if low is not None and high is not None and low[0] > high[0]:
        return NOTHING
    places: int | None = 0 if integer else None
    wholes = []
    for divisor in divisors:
        if divisor <= 0:
            raise GrammarError(f"multipleOf must be positive; got {divisor}.", "Give a positive number.")
        if divisor == divisor.to_integral_value():
            if divisor > MAX_DIVISOR:
                raise GrammarError(f"multipleOf {divisor} is not supported.", f"Whole numbers up to {MAX_DIVISOR} are.")
            places = 0
            wholes.append(int(divisor))
        elif divisor.normalize().as_tuple().digits == (1,):
            digits = -int(divisor.normalize().as_tuple().exponent)
            places = digits if places is None else min(places, digits)
        else:
            raise GrammarError(
                f"multipleOf {divisor} is not supported.", "Whole numbers and powers of ten such as 0.01 are."
            )
    fractions = places != 0
    tail = optional(FRACTION) if fractions else EMPTY
    if low is None and high is None:
        result = build(seq(optional(Bytes(b"-")), WHOLE, tail))
    else:
        zero = Decimal(0)
        positive: list[Any] = [seq(WHOLE, tail)]
        negative: list[Any] = [seq(WHOLE, tail)]
        if low is not None:
            if low[0] >= 0:
                positive.append(at_least(*low, fractions))
                negative.append(at_most(zero, low[1], fractions) if low[0] == 0 else NOTHING)
            else:
                negative.append(at_most(-low[0], low[1], fractions))
        if high is not None:
            if high[0] >= 0:
                positive.append(at_most(*high, fractions))
                negative.append(at_least(zero, high[1], fractions) if high[0] == 0 else seq(WHOLE, tail))
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
    if places:  # at most so many digits behind the point
        result = intersection(
            result, build(seq(optional(Bytes(b"-")), WHOLE, optional(seq(Bytes(b"."), DIGITS, *[optional(DIGITS)] * (places - 1)))))
        )
    for divisor_whole in wholes:
        result = intersection(result, multiples(divisor_whole))
    return result


def _determinised(item: Any) -> Automaton:
    automaton = build(item)
    assert is_deterministic(automaton)
    return minimise(automaton)
