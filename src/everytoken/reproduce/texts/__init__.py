"""Texts that experiments share: the Universal Declaration of Human Rights in 24 languages (see scripts/fetch_declarations.py)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path


def declarations() -> dict[str, str]:
    """Language -> text, one heading or paragraph a line, all of about the same meaning."""
    return json.loads(gzip.decompress((Path(__file__).parent / "declarations.json.gz").read_bytes()))
