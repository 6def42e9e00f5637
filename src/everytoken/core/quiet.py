"""No bars and warnings of other libraries while everytoken shows its own."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of transformers inside."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    reader: Any = modeling_gguf_pytorch_utils  # its bar does not ask whether bars are wanted
    level, bars, bar = logging.get_verbosity(), logging.is_progress_bar_enabled(), getattr(reader, "tqdm", None)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    reader.tqdm = _no_bar
    try:
        yield
    finally:
        reader.tqdm = bar
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _no_bar(items: Iterable[T], **_: object) -> Iterable[T]:
    return items


@contextmanager
def quiet_training() -> Iterator[None]:
    """As ``quiet_transformers``, for training: also no bars of datasets, and no warnings of future changes."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    with quiet_transformers(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl)\.")
        warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            if not bars:
                datasets.enable_progress_bars()
