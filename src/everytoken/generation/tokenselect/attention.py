"""TokenSelect's attention: votes of all heads choose cached tokens, and exact attention runs over what is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask, sdpa_mask

from ...core.errors import UnsupportedModelError
from ...decoding.call import DecodingStats
from ...decoding.row_cache import rope_switch
from .cache import TokenSelectLayer
from .kernels import attend_rotated, top_indices

if TYPE_CHECKING:
    from .decoder import TokenSelect

IMPLEMENTATION = "token_select"
Angles = tuple[torch.Tensor, ...]
"""What a rotary embedding returns, by parts."""
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
        rotation: how the layer rotates queries and keys, or ``still`` where it does not.
        layer: the layer's cache, or None outside of one.
        alone: whether the layer is left alone: it attends to a window, and its queries and keys come rotated.
    """

    settings: TokenSelect
    stats: TokenSelectStats
    rotation: Turn
    layer: TokenSelectLayer | None
    alone: bool


class Asked(Exception):  # no error: it ends a layer's forward where it has shown enough
    """Takes the place of a ``LayerState`` while a layer is asked how it rotates: ends its forward with what is seen.

    Attributes:
        query, key: as they reached the attention function.
        told: names of what else it was told.
    """

    query: torch.Tensor
    key: torch.Tensor
    told: set[str]

    def tell(self, query: torch.Tensor, key: torch.Tensor, told: set[str]) -> NoReturn:
        self.query, self.key, self.told = query, key, told
        raise self


def angles_of(given: object) -> Angles:
    """What a rotary embedding returned, by parts: cosines and sines ``[B, T, d]``, or one complex tensor of them.

    Raises:
        UnsupportedModelError: it is neither.
    """
    if isinstance(given, torch.Tensor) and given.is_complex() and given.dim() == 3:
        return (given,)
    if isinstance(given, tuple) and len(given) == 2 and all(part.dim() == 3 for part in given):
        return given
    raise UnsupportedModelError(
        "TokenSelect reads a rotary embedding as cosines and sines [B, T, d]; this model has another form.",
        "It works with models that rotate as Llama does.",
    )


class Rotation:
    """The model's own rotary embedding, at positions of our choice.

    Args:
        rotary: the embedding.
        apply: ``(queries, keys, *angles) -> both rotated``.
        compute: the embedding's forward, ``(states, positions [1, T]) -> angles``; its own by default.
        last: whether the last dimensions of a vector are rotated, and not the first.
        halved: whether cosines and sines are given once for both halves of what is rotated.
    """

    def __init__(
        self,
        rotary: nn.Module,
        apply: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        compute: Callable[..., object] | None = None,
        last: bool = False,
        halved: bool = False,
    ):
        self.rotary, self.apply, self.last = rotary, apply, last
        self.compute = rotary.forward if compute is None else compute
        probe = torch.zeros(1, 1, device=next(iter(rotary.buffers())).device)
        first = angles_of(self.compute(probe, torch.zeros(1, 1, dtype=torch.long, device=probe.device)))
        self.width = first[0].shape[-1] * (2 if halved or first[0].is_complex() else 1)
        self.table: Angles | None = None
        self.dtype: torch.dtype | None = None
        self.compiled = False
        switch = rope_switch(rotary.config) if hasattr(rotary, "config") else None
        self.limit = min(int(getattr(rotary, "original_max_seq_len", 1024)), 1 << 30 if switch is None else switch[0])
        if (
            probe.device.type == "cpu" and not halved and len(first) == 2
        ):  # the kernel rotates one half of a vector against the other, as most models do
            x = torch.linspace(-1, 1, 4 * self.width).view(1, 1, 4, self.width)
            turned, half = self(x, 3), torch.cat([-x[..., self.width // 2 :], x[..., : self.width // 2]], -1)
            assert self.table is not None
            cos, sin = (part[:, 3:7] for part in self.table)
            self.compiled = torch.allclose(turned, x * cos + half * sin, atol=1e-5)

    def __call__(self, x: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Rotates ``[B, H, T, d]`` to positions ``start .. start + T - 1``."""
        end = start + x.shape[-2]
        if self.table is None or self.table[0].shape[1] < end or self.dtype != x.dtype:
            # up to the trained length with room to spare; beyond, some embeddings depend on how far they are asked for
            room = end if end >= self.limit else min(self.limit, max(1024, 2 * end))
            self.table = angles_of(self.compute(x, torch.arange(room, device=x.device)[None]))
            self.dtype = x.dtype
        angles = [part[:, start:end] for part in self.table]
        if self.width == x.shape[-1]:
            return self.apply(x, x[:, :1], *angles)[0]
        turned = x[..., -self.width :] if self.last else x[..., : self.width]
        turned = self.apply(turned, turned[:, :1], *angles)[0]
        rest = x[..., : -self.width] if self.last else x[..., self.width :]
        return torch.cat([rest, turned] if self.last else [turned, rest], -1)


def still(x: torch.Tensor, start: int = 0) -> torch.Tensor:
    """The rotation of layers that have none."""
    return x


def rotate_halves(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One half of a vector against the other, as in most models: ``[B, H, T, d]`` with ``cos`` and ``sin`` ``[B, T,
    d]``."""

    def turn(x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]

    return turn(query), turn(key)


def rotate_pairs(query: torch.Tensor, key: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbours as the parts of a complex number: ``[B, H, T, d]`` with complex ``angles`` ``[B, T, d / 2]``."""

    def turn(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * angles[:, None]).flatten(-2).type_as(x)

    return turn(query), turn(key)


def find_rotary(model: PreTrainedModel) -> nn.Module:
    """The one rotary embedding module of a model.

    Raises:
        UnsupportedModelError: none, or several.
    """
    found = find_rotaries(model)
    if len(found) != 1:
        raise UnsupportedModelError(f"{type(model).__name__} has {len(found)} rotary embeddings, and not one.")
    return found[0]


def find_rotaries(model: PreTrainedModel) -> list[nn.Module]:
    """The rotary embedding modules of a model.

    Raises:
        UnsupportedModelError: none.
    """
    found = {
        id(item): item
        for name, item in model.named_modules()
        if ("rotary_emb" in name.rpartition(".")[2] or "rotary_emb" in name.rpartition(".")[0].rpartition(".")[2])
        and not isinstance(item, (nn.ModuleDict, nn.ModuleList))
        and any(True for _ in item.buffers())
    }
    if not found:
        raise UnsupportedModelError(
            f"TokenSelect gives rotary positions within the selection; {type(model).__name__} has 0 rotary embeddings.",
            "It works with models that rotate queries and keys, as Llama does.",
        )
    return list(found.values())


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


def asking(settings: TokenSelect, query: torch.Tensor, rotation: Turn) -> torch.Tensor:
    """What asks for a selection: the mean of a chunk's queries, each rotated to its own position behind ``n_local``.

    Args:
        query: ``[H, T, d]``, un-rotated.

    Returns:
        ``[H, d]``.
    """
    return rotation(query[None], settings.n_local)[0].mean(1)


def select(settings: TokenSelect, query: torch.Tensor, keys: torch.Tensor, rotation: Turn) -> torch.Tensor:
    """The top-k of the candidates, sorted: positions in ``keys`` ``[H_kv, N, d]`` for un-rotated queries ``[H, d]`` or,
    of a chunk, ``[H, T, d]``."""
    return top_candidates(settings, asking(settings, query if query.dim() == 3 else query[:, None], rotation), keys)


def top_candidates(settings: TokenSelect, turned: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """``select`` for what ``asking`` returned."""
    candidates = keys[:, settings.n_init : keys.shape[1] - settings.n_local]
    total = votes(turned, candidates, settings.pool_size)
    if total.device.type == "cpu":
        chosen = torch.from_numpy(top_indices(total.numpy(), settings.top_k))
    else:
        chosen = total.topk(settings.top_k, sorted=False).indices.sort().values
    return chosen + settings.n_init


def token_select_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: ``query`` ``[B, H, T, d]``, ``key`` and ``value`` ``[B, H_kv, N, d]``,
    un-rotated.

    ``attention_mask`` is the ``[B, N]`` padding mask, or None without padding; in layers that are left alone the
    boolean ``[B, 1, T, N]`` mask of their window. ``softcap`` bounds scores, ``s_aux`` ``[H]`` are attention sinks.
    """
    state: LayerState | Asked = module._token_select  # type: ignore[assignment]
    if isinstance(state, Asked):
        state.tell(query, key, {name for name, item in kwargs.items() if item is not None})
    settings, rotation, layer = state.settings, state.rotation, state.layer
    extras = Extras(scaling, softcap, s_aux)
    if state.alone:
        return _exact(query, key, value, attention_mask, extras).transpose(1, 2).contiguous(), None
    length, new = key.shape[2], query.shape[2]
    if new > settings.chunk_size:  # a whole prompt in one forward: what a chunk asks and sees is the same
        before, parts = length - new, []
        for start in range(0, new, settings.chunk_size):
            end = min(start + settings.chunk_size, new)
            mask = None if attention_mask is None else attention_mask[:, : before + end]
            mine, keys, values = query[:, :, start:end], key[:, :, : before + end], value[:, :, : before + end]
            parts.append(token_select_attention(module, mine, keys, values, mask, scaling, dropout, softcap, s_aux)[0])
        return torch.cat(parts, 1), None
    if attention_mask is None and length <= settings.budget:
        outputs = _attend(rotation, query, key, value, extras)
        _count(state.stats, layer, range(query.shape[0]), None, None, query, length)
        return outputs.transpose(1, 2).contiguous(), None
    outputs = query.new_zeros((*query.shape[:3], value.shape[-1]))
    for row in range(query.shape[0]):
        part = slice(row, row + 1)
        mine, keys, values, scored = query[part], key[part], value[part], None if layer is None else layer.score_keys
        scored = key if scored is None or scored.shape[-1] != key.shape[-1] else scored  # a latent cache holds no keys
        candidates, text = scored[row, :, :length], None
        asked: slice | torch.Tensor = slice(None)
        if attention_mask is not None:  # dropping padding leaves text only, in order
            text = attention_mask[row].nonzero()[:, 0]
            start = length - len(text)
            suffix = len(text) > 0 and int(text[0]) == start
            places: slice | torch.Tensor = slice(start, None) if suffix else text
            keys, values, candidates = keys[:, :, places], values[:, :, places], candidates[:, places]
            asked = slice(max(start - (length - new), 0), None) if suffix else attention_mask[row, length - new :]
            mine = mine[:, :, asked]
        if mine.shape[2] == 0:
            continue
        kept = _kept(state, row, mine, keys, candidates)
        if (
            kept is not None
            and mine.shape[2] == 1
            and isinstance(rotation, Rotation)
            and rotation.compiled
            and keys.dtype == torch.float32
            and rotation.width == keys.shape[-1] == values.shape[-1]
            and softcap is None
            and s_aux is None
        ):
            out = _attend_compiled(rotation, mine, keys, values, kept, scaling)
        else:
            if kept is not None:
                keys, values = keys.index_select(2, kept), values.index_select(2, kept)
            out = _attend(rotation, mine, keys, values, extras)
        outputs[row, :, asked] = out[0]
        _count(state.stats, layer, [row], text, kept, mine, length)
    return outputs.transpose(1, 2).contiguous(), None


def _kept(
    state: LayerState, row: int, query: torch.Tensor, keys: torch.Tensor, candidates: torch.Tensor
) -> torch.Tensor | None:
    """Positions to attend to in ``keys`` ``[1, H_kv, N, d]``, in order; None for all. Scores read ``candidates``
    ``[H_kv, N, d]``."""
    settings, layer = state.settings, state.layer
    length = keys.shape[2]
    if length <= settings.budget:
        return None
    asked = asking(settings, query[0], state.rotation)
    state.stats.proposed += 1
    chosen = None
    if settings.tau is not None and layer is not None and row in layer.selected:
        alike = F.cosine_similarity(asked.flatten().float(), layer.asked[row].flatten().float(), dim=0)
        chosen = layer.selected[row] if alike >= settings.tau else None
        state.stats.accepted += chosen is not None
    if chosen is None:
        chosen = top_candidates(settings, asked, candidates)
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


@dataclass(frozen=True)
class Extras:
    """What a model adds to dot products: their scale (None: by the root of d), a soft cap, and sinks ``[H]``."""

    scaling: float | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


def _attend(
    rotation: Turn, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, extras: Extras
) -> torch.Tensor:
    """Exact causal attention with positions 0 .. M-1; the queries are the last ones."""
    new, length = query.shape[2], key.shape[2]
    mask = None
    if new > 1:
        here = torch.arange(length - new, length, device=query.device)[:, None]
        mask = torch.arange(length, device=query.device)[None] <= here
    return _exact(rotation(query, length - new), rotation(key, 0), value, mask, extras)


def _exact(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, extras: Extras
) -> torch.Tensor:
    """Attention over all keys that a boolean mask allows."""
    groups = query.shape[1] // key.shape[1]
    if extras.softcap is None and extras.sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=extras.scaling, enable_gqa=groups > 1
        )
    scale = query.shape[-1] ** -0.5 if extras.scaling is None else extras.scaling
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if extras.softcap is not None:
        scores = torch.tanh(scores / extras.softcap) * extras.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if extras.sinks is not None:  # a sink takes its share of the weight and gives nothing
        sinks = extras.sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    return weights.to(value.dtype) @ value


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
    text: torch.Tensor | None,
    kept: torch.Tensor | None,
    query: torch.Tensor,
    length: int,
) -> None:
    """Counts what a decoding step attended to: of ``text``, the places that are no padding (None: all)."""
    if query.shape[2] != 1 or layer is None:
        return
    available = length if text is None else len(text)
    for row in rows:
        stats.available += available
        stats.attended += available if kept is None else len(kept)
        if not layer.counting:
            continue
        if layer.reads is None or layer.reads.shape[1] < length:
            fresh = torch.zeros(layer.keys.shape[0], 2 * length, device=query.device)
            if layer.reads is not None:
                fresh[:, : layer.reads.shape[1]] = layer.reads
            layer.reads = fresh
        if kept is not None:
            layer.reads[row, kept if text is None else text[kept]] += 1
        elif text is not None:
            layer.reads[row, text] += 1
        else:
            layer.reads[row, :length] += 1


def token_select_mask(*args: object, **kwargs: object) -> torch.Tensor | None:
    """The mask function of transformers that belongs to it: padding alone, and for windows the whole mask."""
    if kwargs.get("local_size") is None:
        return flash_attention_mask(*args, **kwargs)  # type: ignore[arg-type]
    kwargs |= {"allow_is_causal_skip": False}
    return sdpa_mask(*args, **kwargs)  # type: ignore[arg-type]


AttentionInterface.register(IMPLEMENTATION, token_select_attention)
AttentionMaskInterface.register(IMPLEMENTATION, token_select_mask)
