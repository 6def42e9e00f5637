"""How the kernels are compiled: by numba, once, and kept on disk between processes.

numba keeps compiled code in ``__pycache__`` beside the module; where that is not writable in the user's cache
folder; and with
``NUMBA_CACHE_DIR`` in that folder. Where none of them can be written each process compiles for itself.

numba notices a change of the file in which a function stands, but not of the functions that it calls in other files:
it would go on
running the old machine code. Here every kernel's stamp covers the sources of all kernels.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar, cast

from numba import njit

Function = TypeVar("Function", bound=Callable[..., object])
ENGINE = ("engine/analysis", "engine/layout", "engine/run", "engine/tables", "engine/trie")
SOURCES = ("jit", *ENGINE, "grammar/kernels", "grammar/subset_construction", "grammar/tries")


def _stamp() -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()


STAMP = _stamp()


_dispatchers: list[object] = []
_announced = threading.Event()
_log = logging.getLogger(__name__)


def kernels_kept() -> bool:
    """Whether an earlier process (or this one) has compiled the kernels, so that their first use takes no time."""
    return all(_known(dispatcher) for dispatcher in _dispatchers)


def announce() -> None:
    """Before the first kernel of a process is called: says in the log that they are compiled, where they are missing on
    disk.
    """
    if not _announced.is_set():
        _announced.set()
        if not kernels_kept():
            _log.warning(
                "Compiling the grammar engine's kernels: a minute or two, once on this machine (they are kept on "
                "disk). warm_kernels(background=True) does it ahead."
            )


def _known(dispatcher: object) -> bool:
    if getattr(dispatcher, "signatures", ()):
        return True
    cache = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)  # numba has no public way
    try:
        return cache is not None and bool(cache._load_index())
    except (OSError, ValueError, EOFError):
        return False


def _compiled(function: Function, inline: Literal["never", "always"]) -> Function:
    try:
        dispatcher = njit(cache=True, nogil=True, inline=inline)(function)
    except RuntimeError:  # no folder for the cache
        return cast("Function", njit(nogil=True, inline=inline)(function))
    file = dispatcher._cache._cache_file  # type: ignore[attr-defined]  # numba has no public way
    file._source_stamp = (file._source_stamp, STAMP)
    return cast("Function", dispatcher)


def kernel(function: Function) -> Function:
    """Compiles a function; its callers see the types that it declares."""
    dispatcher = _compiled(function, "never")
    _dispatchers.append(dispatcher)
    return dispatcher


def inlined(function: Function) -> Function:
    """The same for small helpers that are copied into the kernels that call them."""
    return _compiled(function, "always")
