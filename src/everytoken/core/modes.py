"""The mode of a network: evaluation for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model without dropout inside the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
