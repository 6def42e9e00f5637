"""TokenSelect's cache: keys before rotation, in buffers that grow by half, with a low-precision copy for scoring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer


class TokenSelectLayer(DynamicLayer):
    """Un-rotated keys, and values, of one layer; ``keys`` and ``values`` are views of buffers that grow by half when
    full.

    ``selected`` holds each row's last top-k (positions in the cache), ``asked`` the queries that chose them, ``reads``
    how often each cached token was attended by a decoding step (kept while ``counting``).
    """

    def __init__(self, score_dtype: torch.dtype | None = None, counting: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        self.score_dtype, self.counting = score_dtype, counting
        self.forget()

    def forget(self) -> None:
        """Drops the selections; the next query makes new ones."""
        self.selected: dict[int, torch.Tensor] = {}
        self.asked: dict[int, torch.Tensor] = {}
        self.reads: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.buffers = [key_states[:, :, :0], value_states[:, :, :0]]
        low = self.score_dtype is not None and self.score_dtype != self.dtype
        self.buffers += [key_states[:, :, :0].to(self.score_dtype)] if low else []
        self.keys, self.values = self.buffers[0], self.buffers[1]
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if end > self.buffers[0].shape[-2]:
            room = max(end, self.buffers[0].shape[-2] * 3 // 2, 256)
            for place, old in enumerate(self.buffers):
                fresh = old.new_empty((*old.shape[:2], room, old.shape[-1]))
                fresh[:, :, :start] = old[:, :, :start]
                self.buffers[place] = fresh
        if self.buffers[0].is_inference() and not torch.is_inference_mode_enabled():  # filled in another mode
            self.buffers = [buffer.clone() for buffer in self.buffers]
        for buffer, states in zip(self.buffers, (key_states, value_states, key_states), strict=False):
            buffer[:, :, start:end] = states
        self.keys, self.values = self.buffers[0][:, :, :end], self.buffers[1][:, :, :end]
        return self.keys, self.values

    @property
    def score_keys(self) -> torch.Tensor:
        """The keys in the precision that scores are taken in: ``[B, H_kv, N, d]``."""
        return self.buffers[-1][:, :, : self.keys.shape[-2]] if len(self.buffers) == 3 else self.keys

    def _rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            self.buffers = [change(buffer) for buffer in self.buffers]
            length = self.keys.shape[-2]
            self.keys, self.values = self.buffers[0][:, :, :length], self.buffers[1][:, :, :length]
        self.forget()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._rows(lambda buffer: buffer.index_select(0, beam_idx.to(buffer.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._rows(lambda buffer: buffer[indices])

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.forget()

    def reset(self) -> None:
        super().reset()
        self.forget()


class TokenSelectCache(Cache):
    """A cache of ``TokenSelectLayer``, one a layer of full attention; layers with a sliding window or a recurrent state
    keep their usual kind."""

    def __init__(
        self, config: PreTrainedConfig, score_dtype: torch.dtype | None = torch.bfloat16, counting: bool = False
    ):
        layers = [
            TokenSelectLayer(score_dtype, counting) if type(layer) is DynamicLayer else layer
            for layer in DynamicCache(config=config).layers
        ]
        super().__init__(layers=layers)
