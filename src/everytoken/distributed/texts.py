"""Whose tokens a step reads: rows of one batch with one cache, or requests with a cache each.

The step's tokens are one list, request after request. A part of it is a stretch of that list. So it holds the end of
one request, whole requests, and the beginning of another; each such piece attends to its own request's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..core.errors import BadInputError, UnsupportedModelError

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""``(queries [B, H, q, d], keys and values [B, H', k, d], allowed [B or 1, 1, q, k] or None) -> [B, q, H, d]``."""


def check_cache(cache: Any, heads: int) -> None:
    """Checks that a cache grows by concatenation and holds this rank's heads.

    Args:
        heads: key and value heads of this rank.

    Raises:
        UnsupportedModelError: a cache of another kind.
        BadInputError: one that holds other heads.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    others = {type(layer).__name__ for layer in getattr(cache, "layers", []) if type(layer) is not DynamicLayer}
    if type(cache) is not DynamicCache or others or getattr(cache, "offloading", False):
        offloaded = " with offloading" if getattr(cache, "offloading", False) else ""
        inside = f" of {', '.join(sorted(others))}" if others else ""
        raise UnsupportedModelError(
            f"Woven attention reads a DynamicCache, and not {type(cache).__name__}{inside}{offloaded}.",
            "Leave past_key_values and cache_implementation out.",
        )
    for layer in cache.layers:
        if layer.is_initialized and layer.keys.numel() and layer.keys.shape[1] != heads:
            raise BadInputError(
                f"The cache holds {layer.keys.shape[1]} key heads, a rank has {heads}.",
                "A cache belongs to the number of ranks that filled it: begin with an empty one.",
            )


def lower_right(queries: int, keys: int, device: torch.device) -> torch.Tensor | None:
    """``[1, 1, queries, keys]``: the last query sees all keys, the one before all but one. None where attention needs
    no mask: for a whole text (by its own causality), and for one query.
    """
    if queries in (1, keys):
        return None
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]


class BatchTexts:
    """A batch ``[B, n]``, with one cache for all rows or none.

    Args:
        rows, width: B and n.
        cache: what was read before; None keeps nothing.
        padding: ``[B, past + n]``, 0 where a key is padding; None where there is none.
    """

    def __init__(self, rows: int, width: int, cache: Any, padding: torch.Tensor | None, device: torch.device):
        self.rows, self.width, self.cache, self.device = rows, width, cache, device
        self.past = cache.get_seq_length() if cache is not None else 0
        self.allowed: torch.Tensor | None = None
        if padding is not None and not bool((padding != 0).all()):
            keys = self.past + width
            if padding.shape != (rows, keys):
                raise BadInputError(
                    f"An attention mask for {rows} rows of {self.past} cached and {width} new tokens has the shape "
                    f"{(rows, keys)}; got {tuple(padding.shape)}."
                )
            causal = torch.ones(width, keys, dtype=torch.bool, device=device).tril(self.past)
            self.allowed = causal[None] & (padding != 0).to(device)[:, None]
        self._new: tuple[torch.Tensor, torch.Tensor] | None = None
        self._masks: dict[tuple[int, int], torch.Tensor | None] = {}

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int, attend: Attend
    ) -> torch.Tensor:
        """Attention of a stretch of the step's tokens; stretches come in order.

        Args:
            q, k, v: ``[m, H, d]``, ``[m, H', d]``, ``[m, H', d]``.
            first: the stretch's first token.

        Returns:
            ``[m, H, d]``.
        """
        count, last = self.rows * self.width, first + len(q)
        if len(q) == count:
            new = (k, v)
        else:
            if first == 0:
                self._new = k.new_empty(count, *k.shape[1:]), v.new_empty(count, *v.shape[1:])
            assert self._new is not None
            new = self._new
            new[0][first:last], new[1][first:last] = k, v
        keys, values = (item.view(self.rows, self.width, *item.shape[1:]).transpose(1, 2) for item in new)
        before = self.past
        if last == count:
            self._new = None
            if self.cache is not None:
                keys, values = self.cache.update(keys, values, layer)
                before = 0
        pieces = []
        for row, end, begin, stop in pieces_of(first, last, self.width):
            own_k, own_v = keys[row:end], values[row:end]
            if before:  # part 1: the cache gets the new keys once all are there
                held = self.cache.layers[layer]
                own_k = torch.cat([held.keys[row:end], own_k[:, :, :stop]], 2)
                own_v = torch.cat([held.values[row:end], own_v[:, :, :stop]], 2)
            else:
                own_k, own_v = own_k[:, :, : self.past + stop], own_v[:, :, : self.past + stop]
            offset = (row * self.width + begin) - first
            own_q = q[offset : offset + (end - row) * (stop - begin)]
            own_q = own_q.view(end - row, stop - begin, *q.shape[1:]).transpose(1, 2)
            found = attend(own_q, own_k, own_v, self._mask(row, end, begin, stop))
            pieces.append(found.reshape(-1, *q.shape[1:]))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _mask(self, row: int, end: int, begin: int, stop: int) -> torch.Tensor | None:
        if self.allowed is not None:
            return self.allowed[row:end, None, begin:stop, : self.past + stop]
        if (begin, stop) not in self._masks:
            self._masks[begin, stop] = lower_right(stop - begin, self.past + stop, self.device)
        return self._masks[begin, stop]


def pieces_of(first: int, last: int, width: int) -> list[tuple[int, int, int, int]]:
    """A stretch of a batch's tokens as rectangles ``(row, end row, column, end column)``, in order."""
    pieces = []
    row, column = divmod(first, width)
    if column:
        stop = min(width, column + last - first)
        pieces.append((row, row + 1, column, stop))
        row, first = row + 1, first + stop - column
    whole = (last - first) // width
    if whole > 0:
        pieces.append((row, row + whole, 0, width))
        row, first = row + whole, first + whole * width
    if last > first:
        pieces.append((row, row + 1, 0, last - first))
    return pieces


class RequestTexts:
    """Requests of any lengths, each with a cache of its own: long prompts and single tokens in one step.

    Args:
        counts: new tokens of each.
        caches: a cache each.
    """

    def __init__(self, counts: Sequence[int], caches: Sequence[Any], device: torch.device):
        self.counts, self.caches, self.device = counts, caches, device
        self._masks: dict[tuple[int, int], torch.Tensor | None] = {}

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int, attend: Attend
    ) -> torch.Tensor:
        """As ``BatchTexts.attend``."""
        pieces, begin, last = [], 0, first + len(q)
        for count, cache in zip(self.counts, self.caches, strict=True):
            low, high = max(begin, first) - first, min(begin + count, last) - first
            begin += count
            if low >= high:
                continue
            own_q, own_k, own_v = (item[low:high].transpose(0, 1)[None] for item in (q, k, v))
            own_k, own_v = cache.update(own_k, own_v, layer)
            shape = (high - low, own_k.shape[2])
            if shape not in self._masks:
                self._masks[shape] = lower_right(*shape, self.device)
            pieces.append(attend(own_q, own_k, own_v, self._masks[shape])[0])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
