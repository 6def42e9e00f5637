"""Vectors of new tokens: the ``Embedder`` protocol, a model's embedding matrices, pieces as tensors, and a cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from ..core.errors import BadInputError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Embedder(Protocol):
    """Gives vectors to tokens that are described by their pieces (ids of the model's own tokens)."""

    def base(self, ids: torch.Tensor) -> torch.Tensor:
        """The model's own input embeddings."""
        ...

    def embed(self, pieces: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Input and output embeddings, ``[N, d]`` each."""
        ...


def matrices(model: PreTrainedModel) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A model's input embeddings (as a module, since some scale them), their weight, and the output matrix.

    Raises:
        UnsupportedModelError: it has no token embeddings.
    """
    source = model.get_input_embeddings()
    if source is None or not hasattr(source, "weight"):
        raise UnsupportedModelError(f"{type(model).__name__} has no token embeddings.", "Use a language model.")
    head = model.get_output_embeddings()
    return source, source.weight, source.weight if head is None else head.weight


def padded(pieces: Sequence[tuple[int, ...]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids ``[N, P]`` (0 where unused) and which places are used."""
    width = max((len(item) for item in pieces), default=1)
    if any(not item for item in pieces):
        raise BadInputError("A token without pieces has no embedding.", "Give each at least one piece.")
    ids = torch.zeros(len(pieces), width, dtype=torch.long)
    mask = torch.zeros(len(pieces), width, dtype=torch.bool)
    for row, item in enumerate(pieces):
        ids[row, : len(item)] = torch.tensor(item)
        mask[row, : len(item)] = True
    return ids.to(device), mask.to(device)


class EmbeddingCache:
    """The most recently used vectors, by pieces.

    Args:
        size: how many are kept.

    Attributes:
        hits, misses: counted over all calls.
    """

    def __init__(self, size: int):
        if size < 1:
            raise BadInputError(f"A cache keeps at least one embedding; got {size}.")
        self.size, self.hits, self.misses = size, 0, 0
        self._rows: OrderedDict[tuple[int, ...], torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, pieces: tuple[int, ...]) -> bool:
        return pieces in self._rows

    def rows(self, keys: Sequence[tuple[int, ...]], embedder: Embedder) -> torch.Tensor:
        """Input embeddings ``[N, d]`` of distinct tokens; the missing ones are made in one call."""
        missing = [key for key in keys if key not in self._rows]
        self.misses += len(missing)
        self.hits += len(keys) - len(missing)
        made = dict(zip(missing, embedder.embed(missing)[0], strict=True)) if missing else {}
        found = []
        for key in keys:
            row = made.get(key)
            if row is None:
                row = self._rows[key]
                self._rows.move_to_end(key)
            found.append(row)
        for key, row in made.items():
            self._rows[key] = row.clone()  # a view would keep the whole block alive
            if len(self._rows) > self.size:
                self._rows.popitem(last=False)
        return torch.stack(found)
