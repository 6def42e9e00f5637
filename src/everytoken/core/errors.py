"""The exceptions that users meet. Each says what was wrong and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EverytokenError(Exception):
    """Base of all errors of this library.

    Args:
        message: what was wrong.
        hint: what to do, shown on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message if hint is None else f"{message}\n{hint}")
        self.message, self.hint = message, hint


class BadInputError(EverytokenError, ValueError):
    """A value that no method could work with (empty prompt, setting out of range, impossible combination)."""

    exit_code = 2


class UnknownNameError(BadInputError, KeyError):
    """A method, setting or card that does not exist; suggests the nearest that does."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known = sorted(known)
        spelt = {item.lower(): item for item in known}
        close = [spelt[item] for item in difflib.get_close_matches(name.lower(), spelt, n=2, cutoff=0.55)]
        if close:
            hint = f"Did you mean {' or '.join(close)}?"
        else:
            hint = f"Known: {', '.join(known)}." if len(known) <= 12 else f"There are {len(known)} of them."
        super().__init__(f"No {kind} is called {name!r}.", hint)
        self.suggestions = close

    def __str__(self) -> str:  # KeyError would print the repr
        return f"{self.message}\n{self.hint}"


class MissingExtraError(EverytokenError, ImportError):
    """An optional library is not installed."""

    exit_code = 3

    def __init__(self, library: str, extra: str, purpose: str):
        super().__init__(
            f"{purpose} needs {library}, which is not installed.", f"Install it with: pip install 'everytoken[{extra}]'"
        )


class UnsupportedModelError(EverytokenError, ValueError):
    """The model lacks what a method hooks into."""

    exit_code = 2


class TokenizerMismatchError(EverytokenError, ValueError):
    """Two models that must share a vocabulary do not."""

    exit_code = 2


class CacheError(EverytokenError, OSError):
    """The cache folder cannot be used (read-only, full, or not a folder)."""

    exit_code = 4


def require(library: str, extra: str, purpose: str) -> None:
    """Raises MissingExtraError unless ``library`` can be imported; does not import it."""
    from importlib.util import find_spec

    if find_spec(library.split(".")[0]) is None:
        raise MissingExtraError(library, extra, purpose)
