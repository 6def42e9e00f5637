"""Texts that experiments share: the Universal Declaration of Human Rights in 24 languages (see
scripts/fetch_declarations.py).
"""

from __future__ import annotations

import gzip
import json
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def declarations() -> dict[str, str]:
    """Language -> text, one heading or paragraph a line, all of about the same meaning."""
    return json.loads(gzip.decompress((Path(__file__).parent / "declarations.json.gz").read_bytes()))
