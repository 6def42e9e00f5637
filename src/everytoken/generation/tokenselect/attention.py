"""TokenSelect's attention: votes of all heads choose cached tokens, and exact attention runs over what is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from ...core.errors import UnsupportedModelError
from ...decoding.call import DecodingStats
from .cache import TokenSelectLayer
from .kernels import attend_rotated, top_indices

if TYPE_CHECKING:
    from .decoder import TokenSelect

IMPLEMENTATION = "token_select"
Turn = Callable[[torch.Tensor, int], torch.Tensor]
"""``(states [B, H, T, d], first position) -> states``: rotates, as ``Rotation`` does."""


@dataclass
class TokenSelectStats(DecodingStats):
    """Counters of a call; ``proposed`` are selections due and ``accepted`` selections reused.

    Attributes:
        attended: tokens attended by decoding steps, summed over layers and rows.
        available: tokens that full attention would have read in those steps.
    """

    attended: int = 0
    available: int = 0


@dataclass
class LayerState:
    """What one attention layer is told before each of its forwards.

    Attributes:
        settings: of the selection.
        stats: the counters of the call.
        rotation: the model's rotary embedding.
        layer: the layer's cache, or None outside of one.
        window: its sliding window, or None for full attention.
    """

    settings: TokenSelect
    stats: TokenSelectStats
    rotation: Rotation
    layer: TokenSelectLayer | None
    window: int | None


class Rotation:
    """The model's own rotary embedding, at positions of our choice."""

    def __init__(self, rotary: nn.Module, apply: Callable[..., tuple[torch.Tensor, torch.Tensor]]):
        self.rotary, self.apply, self.compute = rotary, apply, rotary.forward
        probe = torch.zeros(1, 1, device=next(iter(rotary.buffers())).device)
        self.width = self.compute(probe, torch.zeros(1, 1, dtype=torch.long, device=probe.device))[0].shape[-1]
        self.table: tuple[torch.Tensor, torch.Tensor] | None = None
        self.compiled = False
        if probe.device.type == "cpu":  # the kernel rotates one half of a vector against the other, as most models do
            x = torch.linspace(-1, 1, 4 * self.width).view(1, 1, 4, self.width)
            turned, half = self(x, 3), torch.cat([-x[..., self.width // 2 :], x[..., : self.width // 2]], -1)
            cos, sin = (part[:, 3:7] for part in self.table)  # type: ignore[attr-defined]
            self.compiled = torch.allclose(turned, x * cos + half * sin, atol=1e-5)

    def __call__(self, x: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Rotates ``[B, H, T, d]`` to positions ``start .. start + T - 1``."""
        end = start + x.shape[-2]
        if self.table is None or self.table[0].shape[1] < end or self.table[0].dtype != x.dtype:
            # up to the trained length with room to spare; beyond, some embeddings depend on how far they are asked for
            limit = int(getattr(self.rotary, "original_max_seq_len", end))
            room = end if end >= limit else min(limit, max(1024, 2 * end))
            self.table = self.compute(x, torch.arange(room, device=x.device)[None])
        cos, sin = (part[:, start:end] for part in self.table)
        turned = x[..., : self.width]
        turned = self.apply(turned, turned[:, :1], cos, sin)[0]
        return turned if self.width == x.shape[-1] else torch.cat([turned, x[..., self.width :]], -1)


def find_rotary(model: PreTrainedModel) -> nn.Module:
    """The one rotary embedding module of a model.

    Raises:
        UnsupportedModelError: none, or several.
    """
    found = {id(item): item for name, item in model.named_modules() if name.endswith("rotary_emb")}
    if len(found) != 1:
        raise UnsupportedModelError(
            f"TokenSelect gives rotary positions within the selection; {type(model).__name__} has {len(found)} rotary "
            "embeddings.",
            "It works with models that rotate queries and keys once for all layers, as Llama does.",
        )
    return next(iter(found.values()))


# -- the definition ----------------------------------------------------------------------------------------------------
def votes(query: torch.Tensor, keys: torch.Tensor, pool_size: int | None = None) -> torch.Tensor:
    """``S(i)``: the heads' softmax votes for each candidate, added; ``[C]`` float32.

    Args:
        query: ``[H, d]``, rotated to position ``n_local``.
        keys: ``[H_kv, C, d]``, un-rotated; query head h belongs to key head ``h // (H / H_kv)``, as in transformers.
        pool_size: votes become the maximum over so many neighbours.
    """
    heads = query.view(keys.shape[0], -1, query.shape[-1])
    # one product a key head: rows of a head lie together, heads do not, and a batched product would copy them all
    scores = torch.cat([mine @ theirs.T for mine, theirs in zip(heads.to(keys.dtype), keys, strict=True)])
    total = torch.softmax(scores.float(), -1).sum(0)
    if pool_size is not None and pool_size > 1:
        total = F.max_pool1d(total[None, None], pool_size, stride=1, padding=pool_size // 2)[0, 0]
    return total


def select(settings: TokenSelect, query: torch.Tensor, keys: torch.Tensor, rotation: Turn) -> torch.Tensor:
    """The top-k of the candidates, sorted: positions in ``keys`` ``[H_kv, N, d]`` for an un-rotated query ``[H,
    d]``."""
    turned = rotation(query[None, :, None], settings.n_local)[0, :, 0]
    candidates = keys[:, settings.n_init : keys.shape[1] - settings.n_local]
    total = votes(turned, candidates, settings.pool_size)
    if total.device.type == "cpu":
        chosen = torch.from_numpy(top_indices(total.numpy(), settings.top_k))
    else:
        chosen = total.topk(settings.top_k, sorted=False).indices.sort().values
    return chosen + settings.n_init


def token_select_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: ``query`` ``[B, H, T, d]``, ``key`` and ``value`` ``[B, H_kv, N, d]``,
    un-rotated.

    ``attention_mask`` is the ``[B, N]`` padding mask, or None without padding.
    """
    state: LayerState = module._token_select
    settings, rotation, layer, window = state.settings, state.rotation, state.layer, state.window
    # padding comes first in a row: dropping it leaves text only
    pads = [0] * query.shape[0] if attention_mask is None else (~attention_mask).sum(1).tolist()
    arguments = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    if window is not None or (max(pads) == 0 and key.shape[2] <= settings.budget):
        outputs = _attend(rotation, query, key, value, window, arguments)
        _count(state.stats, layer if window is None else None, range(len(pads)), pads, None, query, key.shape[2])
    else:
        rows = []
        for row, pad in enumerate(pads):
            part = slice(row, row + 1)
            fresh = min(query.shape[2], key.shape[2] - pad)
            mine = query[part, :, query.shape[2] - fresh :]  # a chunk may begin with padding
            keys, values = key[part, :, pad:], value[part, :, pad:]
            if fresh <= 0:
                rows.append(torch.zeros_like(query[part]))
                continue
            kept = _kept(state, row, pad, mine, keys)
            if (
                kept is not None
                and fresh == 1
                and rotation.compiled
                and keys.dtype == torch.float32
                and rotation.width == keys.shape[-1]
            ):
                out = _attend_compiled(rotation, mine, keys, values, kept, scaling)
            else:
                if kept is not None:
                    keys, values = keys.index_select(2, kept), values.index_select(2, kept)
                out = _attend(rotation, mine, keys, values, None, arguments)
            rows.append(F.pad(out, (0, 0, query.shape[2] - fresh, 0)))
            _count(state.stats, layer, [row], pads, kept, mine, key.shape[2])
        outputs = torch.cat(rows)
    return outputs.transpose(1, 2).contiguous(), None


def _kept(state: LayerState, row: int, pad: int, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
    """Positions to attend to in ``keys`` ``[1, H_kv, N, d]``, in order; None for all."""
    settings, layer = state.settings, state.layer
    length = keys.shape[2]
    if length <= settings.budget:
        return None
    asked = query[0].mean(1)  # a chunk is asked for by its mean query
    state.stats.proposed += 1
    chosen = None
    if settings.tau is not None and layer is not None and row in layer.selected:
        alike = F.cosine_similarity(asked.flatten().float(), layer.asked[row].flatten().float(), dim=0)
        chosen = layer.selected[row] if alike >= settings.tau else None
        state.stats.accepted += chosen is not None
    if chosen is None:
        scored = keys[0] if layer is None else layer.score_keys[row, :, pad:]
        chosen = select(settings, asked, scored, state.rotation)
        if layer is not None:
            layer.selected[row], layer.asked[row] = chosen, asked
    device = keys.device
    return torch.cat(
        [
            torch.arange(settings.n_init, device=device),
            chosen,
            torch.arange(length - settings.n_local, length, device=device),
        ]
    )


def _attend(
    rotation: Rotation,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    arguments: dict[str, Any],
) -> torch.Tensor:
    """Exact causal attention with positions 0 .. M-1; the queries are the last ones."""
    new, length = query.shape[2], key.shape[2]
    mask = None
    if new > 1 or window is not None:
        here = torch.arange(length - new, length, device=query.device)[:, None]
        there = torch.arange(length, device=query.device)[None]
        mask = there <= here
        if window is not None:
            mask &= there > here - window
    return F.scaled_dot_product_attention(
        rotation(query, length - new), rotation(key), value, attn_mask=mask, **arguments
    )


def _attend_compiled(
    rotation: Rotation,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """``_attend`` over the rows ``kept`` of ``[1, H_kv, N, d]``, for one query on a CPU: rotated keys are never written
    down."""
    turned = rotation(query, len(kept) - 1)[0, :, 0].unflatten(0, (key.shape[1], -1)).numpy()
    assert rotation.table is not None
    cos, sin = (part[0].numpy() for part in rotation.table)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    heads = [
        attend_rotated(mine, keys.index_select(0, kept).numpy(), values.index_select(0, kept).numpy(), cos, sin, scale)
        for mine, keys, values in zip(
            turned, key[0], value[0], strict=True
        )  # a head's rows lie together: quick to gather
    ]
    return torch.from_numpy(np.concatenate(heads))[None, :, None]


def _count(
    stats: TokenSelectStats,
    layer: TokenSelectLayer | None,
    rows: Sequence[int],
    pads: list[int],
    kept: torch.Tensor | None,
    query: torch.Tensor,
    length: int,
) -> None:
    """Counts what a decoding step attended to."""
    if query.shape[2] != 1 or layer is None:
        return
    for row in rows:
        stats.available += length - pads[row]
        stats.attended += length - pads[row] if kept is None else len(kept)
        if not layer.counting:
            continue
        if layer.reads is None or layer.reads.shape[1] < length:
            fresh = torch.zeros(len(pads), 2 * length, device=query.device)
            if layer.reads is not None:
                fresh[:, : layer.reads.shape[1]] = layer.reads
            layer.reads = fresh
        if kept is None:
            layer.reads[row, pads[row] : length] += 1
        else:
            layer.reads[row, kept + pads[row]] += 1


AttentionInterface.register(IMPLEMENTATION, token_select_attention)
AttentionMaskInterface.register(IMPLEMENTATION, flash_attention_mask)
