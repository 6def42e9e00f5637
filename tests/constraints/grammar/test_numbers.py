"""Number automata against decimal arithmetic."""

from __future__ import annotations

import re
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.constraints.grammar.automata import build
from everytoken.constraints.grammar.expressions import GrammarError
from everytoken.constraints.grammar.numbers import number_automaton

BOUNDS = st.one_of(
    st.none(),
    st.tuples(
        st.sampled_from([Decimal(n) / 100 for n in range(-2500, 2501, 7)] + [Decimal(n) for n in range(-120, 121)]),
        st.booleans(),
    ),
)
SPELLING = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")


@given(BOUNDS, BOUNDS, st.booleans(), st.lists(st.integers(-13000, 13000), min_size=5, max_size=30), st.integers(0, 3))
@settings(max_examples=250, deadline=None)
def test_bounds(low, high, integer, values, zeros):
    automaton = build(number_automaton(integer, low, high, []))
    for value in values:
        for number in (Decimal(value) / 100, Decimal(value // 100)):
            text = format(number, "f")
            if "." in text:
                text = text.rstrip("0").rstrip(".")
            if not integer and zeros:
                text += ("" if "." in text else ".") + "0" * zeros
            if text.lstrip("-0.") == "" and text.startswith("-"):
                continue
            bounded = low is not None or high is not None
            inside = (low is None or number > low[0] or (number == low[0] and not low[1])) and (
                high is None or number < high[0] or (number == high[0] and not high[1])
            )
            inside = inside and (not integer or "." not in text)
            assert automaton.matches(text.encode()) == inside, (text, low, high, bounded)


@pytest.mark.parametrize("text", ["01", "1.", ".5", "+1", "", "-", "1e", "--1", "1.5.2", "0x1", "00"])
@pytest.mark.parametrize("bounds", [(None, None), ((Decimal(-5), False), (Decimal(500), False))])
def test_what_is_no_number(text, bounds):
    assert not build(number_automaton(False, *bounds, [])).matches(text.encode())


@given(st.integers(2, 60), st.integers(-2000, 2000))
@settings(max_examples=100, deadline=None)
def test_multiples(divisor, value):
    automaton = build(number_automaton(True, None, None, [Decimal(divisor)]))
    assert automaton.matches(str(value).encode()) == (value % divisor == 0)


def test_multiples_with_bounds_and_decimal_places():
    both = build(number_automaton(True, (Decimal(10), True), (Decimal(30), False), [Decimal(5)]))
    assert [n for n in range(50) if both.matches(str(n).encode())] == [15, 20, 25, 30]
    cents = build(number_automaton(False, (Decimal(0), False), None, [Decimal("0.01")]))
    assert cents.matches(b"1.25") and cents.matches(b"3") and not cents.matches(b"1.255") and not cents.matches(b"-1")
    two = build(number_automaton(True, None, None, [Decimal(4), Decimal(6)]))
    assert [n for n in range(40) if two.matches(str(n).encode())] == [0, 12, 24, 36]


def test_unbounded_numbers_have_exponents():
    free = build(number_automaton(False, None, None, []))
    assert free.matches(b"-1.5e+10") and free.matches(b"0E1") and free.matches(b"-0")
    assert not build(number_automaton(True, None, None, [])).matches(b"1.0")


def test_what_is_refused():
    for divisor in ("5000", "50000"):
        with pytest.raises(GrammarError, match="multipleOf"):
            number_automaton(False, None, None, [Decimal(divisor)])
    with pytest.raises(GrammarError, match="positive"):
        number_automaton(False, None, None, [Decimal(0)])
    assert build(number_automaton(False, (Decimal(3), False), (Decimal(2), False), [])).empty
