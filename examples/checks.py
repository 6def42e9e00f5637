"""Functions that commands can name as ``examples.checks:NAME``."""

from __future__ import annotations

import re

ALLOWED = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_*,()'<>=.; ")


def is_sql(text: str) -> bool:
    """Whether the text begins a query: ``SELECT``, then names, numbers, commas and operators, one space between."""
    start = "SELECT "
    if len(text) <= len(start):
        return start.startswith(text)
    body = text[len(start) :]
    return text.startswith(start) and "  " not in body and all(letter in ALLOWED for letter in body)


def final_number(text: str) -> str | None:
    """The last number of an answer: what a verifier compares."""
    found = re.findall(r"-?\d+(?:\.\d+)?", text)
    return found[-1] if found else None
