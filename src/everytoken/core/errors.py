"""The exceptions that users meet. Each says what was wrong and what to do about it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from functools import lru_cache


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
    """A method, setting or card that does not exist; suggests the nearest that does, or names all there are.

    Args:
        kind: what was looked for, for example ``"setting of dyspec"``.
        name: what was given.
        known: the names that exist.
        listed_by: what lists them, where they are too many for a line, for example ``"`everytoken papers`"``.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], listed_by: str = ""):
        known = sorted(known)
        spelt = {item.lower(): item for item in known}
        close = [spelt[item] for item in difflib.get_close_matches(name.lower(), spelt, n=2, cutoff=0.55)]
        if close:
            hint = f"Did you mean {' or '.join(close)}?"
        elif listed_by:
            hint = f"{listed_by} lists all {len(known)}."
        else:
            hint = f"Known: {', '.join(known)}." if known else "There are none."
        super().__init__(f"No {kind} is called {name!r}.", hint)
        self.suggestions = close

    def __str__(self) -> str:  # KeyError would print the repr
        return f"{self.message}\n{self.hint}"


def check_choices(settings: object, **known: tuple[str, ...]) -> None:
    """Raises BadInputError for an attribute that is none of the words it may be.

    Args:
        known: attribute -> its words.
    """
    for name, words in known.items():
        if getattr(settings, name) not in words:
            raise BadInputError(f"{name} is {' or '.join(words)}; got {getattr(settings, name)!r}.")


class MissingExtraError(EverytokenError, ImportError):
    """An optional library is not installed."""

    exit_code = 3

    def __init__(self, library: str, extra: str | None, purpose: str):
        wanted = f"'everytoken[{extra}]'" if extra else PACKAGES.get(library, library)
        super().__init__(
            f"{purpose} needs {library}, which is not installed.", f"Install it with: pip install {wanted}"
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


_FOR_DEVELOPERS = ("dev", "docs", "bench", "all")
_REQUIREMENT = re.compile(r"""^([\w.-]+)[^;]*;.*\bextra\s*==\s*["']([\w-]+)["']""")


@lru_cache(maxsize=1)
def extras() -> dict[str, list[str]]:
    """The package's extras for users, as its installed metadata state them: extra -> names of its packages."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        stated = requires("everytoken") or []
    except PackageNotFoundError:  # run from a folder that was never installed
        return {}
    found: dict[str, list[str]] = {}
    for line in stated:
        match = _REQUIREMENT.match(line)
        if match and match[1] != "everytoken" and match[2] not in _FOR_DEVELOPERS:
            found.setdefault(match[2], []).append(match[1])
    return found


PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}
"""Libraries whose package has another name: import name -> package."""


def extra_of(library: str) -> str | None:
    """The smallest extra that brings a library, by its import name or its package's name; None where no extra does."""
    top = library.split(".")[0]
    wanted = re.sub(r"[-_.]+", "-", PACKAGES.get(top, top)).lower()
    for extra, packages in sorted(extras().items(), key=lambda item: len(item[1])):
        if wanted in (re.sub(r"[-_.]+", "-", name).lower() for name in packages):
            return extra
    return None


def require(library: str, extra: str | None, purpose: str) -> None:
    """Raises MissingExtraError unless ``library`` can be imported; does not import it.

    Args:
        extra: the extra that brings it (``extra_of`` tells); None where it is a package of its own.
    """
    from importlib.util import find_spec

    if find_spec(library.split(".")[0]) is None:
        raise MissingExtraError(library, extra, purpose)
