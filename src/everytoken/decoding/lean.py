"""The cache of a row for models with a compiled forward (``core.grouped.llama``): one call reads tokens or a tree.

Keys and values lie in arrays with room for more, so a token is written once and nothing is copied when the text grows.
``close`` hands them to transformers' own cache object, as a plain ``generate`` would have left it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, DynamicCache, DynamicLayer, PreTrainedModel

from ..core.grouped.llama import LlamaForward
from .row_cache import RowCache

SPARE = 256
"""Room for so many more tokens than are known of."""


def lean_forward(model: PreTrainedModel, cache: Cache | None = None) -> LlamaForward | None:
    """The compiled forward of a model, where it gives what transformers' forward would; else None.

    It does not where someone watches the forward by hooks, has changed the weights or put adapters in, or wants
    attentions; or where the cache is of another kind than plain keys and values in float32.
    """
    lean: LlamaForward | None = getattr(model, "_lean", None)
    if lean is None or not lean.stands_for(model):
        return None
    if cache is not None and (type(cache) is not DynamicCache or not all(map(_plain, cache.layers))):
        return None
    return lean


def _plain(layer: Any) -> bool:
    if type(layer) is not DynamicLayer:
        return False
    return not layer.is_initialized or (layer.keys.dtype == torch.float32 and layer.keys.shape[0] == 1)


def row_cache(model: PreTrainedModel, cache: Cache | None = None, prompt: int | None = None) -> RowCache:
    """The fastest cache of one text that a model has."""
    lean = lean_forward(model, cache)
    return RowCache(model, cache, prompt) if lean is None else LeanRowCache(model, cache, prompt, lean)


class LeanRowCache(RowCache):
    """See ``RowCache``. The arrays are the truth until ``close``.

    Attributes:
        watchers: called with the states ``[L + 1, R, D]`` of every forward.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache | None, prompt: int | None, lean: LlamaForward):
        super().__init__(model, cache, prompt)
        self.lean, self.watchers = lean, list[Callable[[torch.Tensor], None]]()
        shape = (lean.layers, lean.kv_heads, self.length + SPARE, lean.width)
        self.keys, self.values = torch.empty(shape), torch.empty(shape)
        for index, layer in enumerate(self.cache.layers):
            if layer.is_initialized:
                self.keys[index, :, : self.length] = layer.keys[0]
                self.values[index, :, : self.length] = layer.values[0]

    @property
    def reads_on(self) -> bool:
        return True

    def _read(self, text: list[int]) -> Any:
        return self._forward(text[self.length :], torch.arange(self.length, len(text)), None, 1)

    def read_tree(self, tokens: list[int], depths: list[int], allowed: torch.Tensor | None) -> Any:
        fresh = None if allowed is None else allowed[:, self.length :]
        return self._forward(tokens, torch.tensor(depths) + self._mark, fresh, len(tokens))

    def _forward(self, tokens: list[int], positions: torch.Tensor, allowed: torch.Tensor | None, wanted: int) -> Any:
        after = self.length + len(tokens)
        if after > self.keys.shape[2]:
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = old.new_empty((*old.shape[:2], after + max(after // 2, SPARE), old.shape[3]))
                new[:, :, : self.length] = old[:, :, : self.length]
                setattr(self, name, new)
        logits, states = self.lean(
            torch.tensor(tokens), positions, self.keys, self.values, self.length, allowed, wanted
        )
        self.length = after
        for watcher in self.watchers:
            watcher(states)
        return {"logits": logits[None]}

    def mark(self) -> None:
        self._mark = self.length

    def back(self, kept: int = 0) -> bool:
        self.length = self._mark + kept
        return True

    def keep(self, path: list[int]) -> None:
        if path != list(range(len(path))):
            index = torch.tensor(path) + self._mark
            for states in (self.keys, self.values):
                states[:, :, self._mark : self._mark + len(path)] = states[:, :, index]
        self.back(len(path))

    def close(self) -> None:
        """Hands keys and values to transformers' cache."""
        for index in range(self.lean.layers):
            keys, values = (states[index, None, :, : self.length] for states in (self.keys, self.values))
            if index < len(self.cache.layers) and self.cache.layers[index].is_initialized:
                self.cache.layers[index].keys, self.cache.layers[index].values = keys, values
            elif self.length:
                self.cache.update(keys, values, index)
