"""Networks of the catalogue, for transformers' Auto classes: imported where a folder asks for a type that transformers
does not know.
"""

from __future__ import annotations

import importlib

from .cards import load_catalog
from .house import load_house


def register_networks() -> list[str]:
    """Imports every network that a card or a station exports, so that ``AutoConfig`` and ``AutoModel...`` load its
    folders.

    Returns:
        The modules. A network's classes register themselves where they are defined, in ``modeling_NAME.py``.
    """
    paths = [path for card in load_catalog().values() if card.implementation for path in card.exports]
    paths += [path for place in load_house().values() for path in place.exports]
    modules = sorted({path.partition(":")[0] for path in paths if ".modeling_" in path})
    for module in modules:
        importlib.import_module(module)
    return modules
