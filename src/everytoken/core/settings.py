"""Settings given as text: ``key=value`` pairs typed by a dataclass, functions named by ``module:function``, files of
the user's.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from .errors import BadInputError, UnknownNameError


def settable(factory: Any) -> dict[str, Any]:
    """The settings of a dataclass that can be given as text: name -> types.

    A field that takes objects as well names its simple types in ``metadata={"text": (str, NoneType)}``.
    """
    if not dataclasses.is_dataclass(factory):
        return {}
    hints = typing.get_type_hints(factory)
    simple = {}
    for item in dataclasses.fields(factory):
        kinds = item.metadata.get("text") or _kinds(hints[item.name])
        if item.init and kinds and item.name != "trace_enabled":
            simple[item.name] = kinds
    return simple


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The simple types of a hint; empty if it has another."""
    parts = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    return tuple(parts) if all(part in (int, float, bool, str, type(None)) for part in parts) else ()


def parse_settings(name: str, factory: Any, pairs: list[str]) -> dict[str, Any]:
    """``key=value`` pairs as typed arguments of ``factory``.

    Raises:
        UnknownNameError: the method has no such setting; suggests the nearest.
        BadInputError: not a pair, or a value of the wrong type.
    """
    known = settable(factory)
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals:
            raise BadInputError(
                f"--set takes key=value; got {pair!r}.", f"For example: --set {next(iter(known), 'key')}=..."
            )
        if key not in known:
            raise UnknownNameError(f"setting of {name}", key, known)
        settings[key] = _typed(key, text.strip(), known[key])
    return settings


def _typed(key: str, text: str, kinds: tuple[Any, ...]) -> Any:
    if type(None) in kinds and text.lower() in ("none", "null", ""):
        return None
    if bool in kinds and text.lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        return text.lower() in ("true", "yes", "on", "1")
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in kinds:
        return text
    wanted = " or ".join("none" if kind is type(None) else kind.__name__ for kind in kinds)
    raise BadInputError(f"{key} takes {wanted}; got {text!r}.")


def load_function(path: str, what: str = "A function", example: str = "checks:is_json") -> Any:
    """``"module:function"`` as the object it names.

    Args:
        what, example: for the error.

    Raises:
        BadInputError: no such module or attribute, or not callable (an object with a ``prefix`` method is a
            constraint).
    """
    module_name, colon, name = path.partition(":")
    if not colon or not name:
        raise BadInputError(f"{what} is named module:function; got {path!r}.", f"For example: {example}")
    import importlib
    import sys

    if "" not in sys.path:
        sys.path.insert(0, "")  # a file beside the user, as with python -m
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        raise BadInputError(
            f"There is no module {module_name!r} ({error}).", "Run from its folder, or install it."
        ) from error
    except AttributeError as error:
        raise BadInputError(
            f"The module {module_name!r} has no {name!r}.", "Check the name behind the colon."
        ) from error
    if not callable(found) and not hasattr(found, "prefix"):
        raise BadInputError(f"{path} is not callable.", "Name a function.")
    return found


def check_file(path: Path) -> None:
    """Raises BadInputError where there is no such file."""
    if path.is_dir():
        raise BadInputError(f"{path} is a folder, not a file.")
    if not path.is_file():
        raise BadInputError(f"There is no file {path}.")


def read_text(path: Path) -> str:
    """A file of the user's.

    Raises:
        BadInputError: no such file, one that may not be read, or one that is no UTF-8.
    """
    check_file(path)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise BadInputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
