"""The station's contract: a Constraint says whether a text can still be completed.

``Constraint`` is anything that judges text; ``CallableConstraint`` makes one of a Python function. Grammars are
followed token by token by a ``Matcher`` (``decoding.matcher``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ..core.errors import BadInputError, EverytokenError


class DeadEndError(EverytokenError):
    """No token keeps the text completable; ``prefix`` is the longest text that was valid."""

    def __init__(self, message: str, prefix: bytes, hint: str | None = None):
        super().__init__(f"{message} Longest valid prefix: {prefix.decode('utf-8', 'backslashreplace')!r}.", hint)
        self.prefix = prefix


@runtime_checkable
class Constraint(Protocol):
    """Judges texts: can ``prefix`` still be completed, and is ``text`` complete?"""

    def prefix(self, text: bytes) -> bool: ...

    def complete(self, text: bytes) -> bool: ...


@dataclass
class CallableConstraint:
    """A Python function as a constraint.

    Args:
        check: ``text -> bool``, whether the text can be completed to a valid one.
        finished: ``text -> bool``, whether it is valid as it stands; default ``check`` itself.
        on: ``"text"`` hands over str (an unfinished character at the end is left out), ``"bytes"`` raw bytes.
    """

    check: Callable[[Any], bool]
    finished: Callable[[Any], bool] | None = None
    on: str = "text"

    def __post_init__(self) -> None:
        if self.on not in ("text", "bytes"):
            raise BadInputError(f"on is 'text' or 'bytes'; got {self.on!r}.")
        for name in ("check", "finished"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise BadInputError(f"{name} must be callable; got {type(getattr(self, name)).__name__}.")

    def prefix(self, text: bytes) -> bool:
        if self.on == "bytes":
            return bool(self.check(text))
        shown = decode_prefix(text)
        return shown is not None and bool(self.check(shown))

    def complete(self, text: bytes) -> bool:
        function = self.finished or self.check
        if self.on == "bytes":
            return bool(function(text))
        try:
            return bool(function(text.decode("utf-8")))
        except UnicodeDecodeError:
            return False


def decode_prefix(text: bytes) -> str | None:
    """The text without a character that is not finished yet; None if it is no UTF-8 and can never become it."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        return text[: error.start].decode("utf-8") if error.reason == "unexpected end of data" else None
