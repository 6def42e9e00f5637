"""Callable constraints, and the errors of a dead end."""

from __future__ import annotations

import pytest

from everytoken.constraints.base import CallableConstraint, Constraint, DeadEndError, decode_prefix
from everytoken.core.errors import BadInputError


def test_functions_on_text_never_see_half_a_character():
    seen = []
    constraint = CallableConstraint(lambda text: seen.append(text) or True, lambda text: text == "é")
    assert isinstance(constraint, Constraint)
    assert constraint.prefix("aé".encode()[:-1]) and seen == ["a"]
    assert not constraint.prefix(b"a\xff") and not constraint.prefix(b"\xc3a")
    assert constraint.complete("é".encode()) and not constraint.complete(b"\xc3")


def test_functions_on_bytes():
    constraint = CallableConstraint(lambda data: data.count(b"\xff") < 2, on="bytes")
    assert constraint.prefix(b"\xff") and not constraint.complete(b"\xff\xff")


def test_decode_prefix():
    assert decode_prefix(b"") == "" and decode_prefix("a😀".encode()[:3]) == "a" and decode_prefix(b"\x80") is None


@pytest.mark.parametrize(
    ("arguments", "message"), [((3,), "callable"), ((len, 3), "callable"), ((len, None, "words"), "on is")]
)
def test_bad_constraints(arguments, message):
    with pytest.raises(BadInputError, match=message):
        CallableConstraint(*arguments)


def test_a_dead_end_tells_the_longest_valid_prefix():
    error = DeadEndError("Nothing fits.", b"SELECT \xff", "Look further ahead.")
    assert "'SELECT \\\\xff'" in str(error) and error.prefix == b"SELECT \xff" and error.hint
