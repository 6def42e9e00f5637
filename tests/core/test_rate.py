"""Rates: calls within a window, and not one more."""

from __future__ import annotations

import pytest

from everytoken.core.errors import BadInputError
from everytoken.core.rate import RateLimit


def test_rates():
    now = [0.0]
    rate = RateLimit(2, 10.0, lambda: now[0])
    assert [rate.allow() for _ in range(3)] == [True, True, False]
    now[0] = 10.0
    assert rate.allow()
    with pytest.raises(BadInputError):
        RateLimit(0, 1.0)
