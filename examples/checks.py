"""Functions that commands can name as ``examples.checks:NAME``."""

from __future__ import annotations

import re

WORDS = ["SELECT", "name", "age", "FROM", "people", "WHERE", "AND", "OR", "ORDER", "BY"]


def is_sql(text: str) -> bool:
    """Whether the text can still become a query of a small dialect: words of a list, numbers and operators."""
    *done, last = text.split(" ") if text else [""]
    complete = all(part.rstrip(",;") in WORDS or re.fullmatch(r"\d+[,;]?|[<>=*]", part) for part in done if part)
    begun = any(word.startswith(last.rstrip(",;")) for word in WORDS) or re.fullmatch(r"\d+[,;]?|[<>=*]", last)
    return bool(complete and begun)


def final_number(text: str) -> str | None:
    """The last number of an answer: what a verifier compares."""
    found = re.findall(r"-?\d+(?:\.\d+)?", text)
    return found[-1] if found else None
