"""Progress: every long piece of work takes one callback, ``report(stage, done, total)``."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[str, int, int], None]
"""``report(stage, done, total)``: what is being done, how much of it is done, and of how much; total 0 where it is not
known.
"""


def silent(stage: str, done: int, total: int) -> None:
    """The report of work that nobody watches."""


def within(report: Report, stage: str, start: int = 0, total: int | None = None) -> Report:
    """A report for a part of a larger stage.

    Args:
        stage: the name under which the part is reported, whatever it calls itself.
        start: how much of the stage was done before this part.
        total: of the whole stage; None takes the part's own total.
    """
    return lambda _stage, done, own: report(stage, start + done, own if total is None else total)
