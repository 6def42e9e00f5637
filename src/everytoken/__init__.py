"""everytoken: methods that treat each token of a language model as a decision, behind a few small contracts.

Importing this package loads neither torch nor transformers. Public names are imported on first use. The cards of the
methods and the files of the house say which names there are (``everytoken.catalog.exports``).
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name.startswith("_") and name != "__all__":  # what Python itself asks for
        raise AttributeError(f"module 'everytoken' has no attribute {name!r}")
    from .catalog.exports import public_names

    names = public_names()
    if name == "__all__":
        return ["__version__", *names]
    if name not in names:
        raise AttributeError(f"module 'everytoken' has no attribute {name!r}")
    return getattr(importlib.import_module(names[name]), name)


def __dir__() -> list[str]:
    return __getattr__("__all__")
