"""Which cases of a test run in the commit tier."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def commit_tier(values: Iterable[Any], chosen: Collection[Any]) -> list[Any]:
    """The values as parameters of a test: those that are chosen run in the commit tier, the others are slow."""
    values = list(values)
    assert all(value in values for value in chosen), f"{[c for c in chosen if c not in values]} are no cases"
    params = [pytest.param(*value) if isinstance(value, tuple) else pytest.param(value) for value in values]
    return [
        param if value in chosen else pytest.param(*param.values, marks=pytest.mark.slow)
        for value, param in zip(values, params, strict=True)
    ]
