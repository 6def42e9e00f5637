"""TokenSelect: each step attends to the few cached tokens that matter for it (arXiv 2411.02886).

Attention over a long cache is sparse, and what matters is scattered. For the current query q (of a prefill chunk: its mean),
every head h scores the *un-rotated* cached keys, a softmax turns its scores into votes, and the votes of all heads are added::

    s_h(i) = R(n_local) q_h . k_kv(h),i                      R(p): rotary embedding of position p; no scaling
    S(i)   = sum_h softmax_i s_h(i)                          over candidates n_init <= i < N - n_local
    kept   = first n_init  +  top-k of S, in text order  +  last n_local

Exact attention runs over what is kept, with rotary positions 0 .. M-1 given *within the selection*. So positions never exceed
``n_init + top_k + n_local``, and a model reads far beyond the length it was trained for, without tuning. Up to that many tokens
everything is kept and the result is ordinary attention. Prompts are read in chunks, with one selection a chunk and layer.

::

    model.generate(**inputs, custom_generate=TokenSelect(top_k=2048))

Keys are cached before rotation, in buffers that grow by half (transformers' dynamic cache copies itself at every token), with
a low-precision copy for scoring: at 64k tokens reading the keys is what a step costs. All tokens stay in memory; time is saved,
not memory. Choices of ours: scores in bfloat16 (``score_dtype="float32"`` is exact); a reused selection keeps its top-k and
moves its local window along; the query that later ones are compared with is the one that made the selection.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import flash_attention_mask

from ..core.errors import BadInputError, UnsupportedModelError
from ..core.trace import TokenTrace
from ..decoding.loop import LoopDecoder
from .kernels import attend_rotated, top_indices

IMPLEMENTATION = "token_select"


class TokenSelectLayer(DynamicLayer):
    """Un-rotated keys, and values, of one layer; ``keys`` and ``values`` are views of buffers that grow by half when full.

    ``selected`` holds each row's last top-k (positions in the cache), ``asked`` the queries that chose them, ``reads`` how often
    each cached token was attended by a decoding step (kept while ``counting``).
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

    def _rows(self, change: Any) -> None:
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
    """A cache of ``TokenSelectLayer``, one a layer of full attention; layers with a sliding window keep their usual kind."""

    def __init__(self, config: Any, score_dtype: torch.dtype | None = torch.bfloat16, counting: bool = False):
        text = config.get_text_config(decoder=True)
        self.windows = [
            text.sliding_window if kind == "sliding_attention" else None
            for kind in (getattr(text, "layer_types", None) or _kinds(text))
        ]
        super().__init__(
            layers=[
                TokenSelectLayer(score_dtype, counting)
                if window is None
                else DynamicSlidingWindowLayer(sliding_window=window)
                for window in self.windows
            ]
        )


def _kinds(config: Any) -> list[str]:
    """Kinds of layers where a configuration does not list them."""
    kind = "sliding_attention" if getattr(config, "sliding_window", None) is not None else "full_attention"
    return [kind] * config.num_hidden_layers


@dataclass
class TokenSelect(LoopDecoder):
    """Attention over a selection of cached tokens.

    Args:
        top_k: tokens chosen by votes.
        n_init: first tokens, always kept (attention sinks).
        n_local: last tokens, always kept; the current one is among them.
        chunk_size: prompt tokens read at a time; at most ``n_local``.
        tau: reuse a layer's last top-k while the cosine of its query and the current one (all heads as one vector) is at least
            this; None never does. 0.9 is the paper's value.
        pool_size: odd number of neighbours over which votes are max-pooled, or None.
        score_dtype: precision of the scores: ``"bfloat16"``, ``"float32"``, or None for the model's own.

    Works on any batch, padded on the left. The trace has a row for every token of prompt and answer: ``reads`` is the share of
    decoding steps (all layers together) that attended to it, of those that could have.

    ``stats`` counts ``proposed`` selections due and ``accepted`` selections reused.
    """

    lossless: ClassVar[bool] = False
    colour: ClassVar[str] = "reads"
    extrapolates: ClassVar[bool] = True
    top_k: int = 2048
    n_init: int = 128
    n_local: int = 512
    chunk_size: int = 512
    tau: float | None = None
    pool_size: int | None = None
    score_dtype: str | None = "bfloat16"
    attended: int = field(default=0, init=False, repr=False)
    """Tokens attended by decoding steps, summed over layers and rows of the last call."""
    available: int = field(default=0, init=False, repr=False)
    """Tokens that full attention would have read in those steps."""

    def __post_init__(self) -> None:
        if self.top_k < 0 or self.n_init < 0 or self.n_local < 1 or self.chunk_size < 1:
            raise BadInputError(
                f"TokenSelect needs top_k >= 0, n_init >= 0, n_local >= 1 and chunk_size >= 1; got {self.top_k}, "
                f"{self.n_init}, {self.n_local}, {self.chunk_size}."
            )
        if self.chunk_size > self.n_local:
            raise BadInputError(
                f"A chunk of {self.chunk_size} tokens does not fit the local window of {self.n_local}.",
                "Use chunk_size <= n_local.",
            )
        if self.pool_size is not None and (self.pool_size < 1 or self.pool_size % 2 == 0):
            raise BadInputError(f"pool_size must be odd and positive; got {self.pool_size}.")
        if self.score_dtype not in (None, "float32", "bfloat16", "float16"):
            raise BadInputError(f"Unknown score_dtype {self.score_dtype!r}.", "Use float32, bfloat16, float16 or None.")

    @property
    def budget(self) -> int:
        """Tokens that a step attends to, at most."""
        return self.n_init + self.top_k + self.n_local

    def new_cache(self, model: Any) -> TokenSelectCache:
        """An empty cache for ``model``, to pass as ``past_key_values`` where it should outlive a call."""
        dtype = getattr(torch, self.score_dtype) if self.score_dtype else None
        return TokenSelectCache(model.config, dtype, self.trace_enabled)

    def figures(self) -> dict[str, float]:
        share = self.attended / self.available if self.available else 1.0
        reused = self.stats.accepted / self.stats.proposed if self.stats.proposed else 0.0
        return {"share of tokens attended": share, "selections reused": reused}

    # -- around a call ---------------------------------------------------------------------------------------------------
    @contextmanager
    def applied(
        self, model: Any, input_ids: torch.Tensor, config: Any, model_kwargs: dict[str, Any]
    ) -> Iterator[TokenSelectCache]:
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, TokenSelectCache):
            if cache is not None and cache.get_seq_length() > 0:
                raise BadInputError(
                    "TokenSelect caches keys before rotation and cannot go on from another cache.",
                    "Fill one of its own: past_key_values=decoder.new_cache(model).",
                )
            cache = self.new_cache(model)
            model_kwargs["past_key_values"] = cache
        config.prefill_chunk_size = self.chunk_size
        self.attended = self.available = 0
        with self.attention(model):
            yield cache

    @contextmanager
    def attention(self, model: Any) -> Iterator[Rotation]:
        """Switches a model's attention to this selection, and back; for use outside ``generate``. Yields the model's rotation.

        Raises:
            UnsupportedModelError: no rotary embedding of the usual form.
        """
        rotary = find_rotary(model)
        modules = [item for item in model.modules() if hasattr(item, "layer_idx") and hasattr(item, "q_proj")]
        modules = modules or [
            item for item in model.modules() if hasattr(item, "layer_idx") and hasattr(item, "scaling")
        ]
        if not modules:
            raise UnsupportedModelError(f"TokenSelect finds no attention layers in {type(model).__name__}.")
        apply = getattr(sys.modules[type(modules[0]).__module__], "apply_rotary_pos_emb", None)
        if apply is None:
            raise UnsupportedModelError(
                f"TokenSelect does not know how {type(model).__name__} rotates its queries and keys.",
                "It works with models that apply rotary embeddings as Llama does.",
            )
        text = model.config.get_text_config(decoder=True)
        before, hooks = text._attn_implementation, []
        rotation = Rotation(rotary, apply)

        def see_cache(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            cache = kwargs.get("past_key_values")
            window = cache.windows[module.layer_idx] if isinstance(cache, TokenSelectCache) else None
            module._token_select = (
                self,
                rotation,
                cache.layers[module.layer_idx] if isinstance(cache, TokenSelectCache) else None,
                window,
            )

        def stand_still(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            shape = (*position_ids.shape, rotation.width)
            return x.new_ones(shape), x.new_zeros(shape)

        try:
            hooks = [item.register_forward_pre_hook(see_cache, with_kwargs=True) for item in modules]
            rotary.forward = stand_still
            text._attn_implementation = IMPLEMENTATION
            yield rotation
        finally:
            text._attn_implementation = before
            del rotary.forward
            for hook in hooks:
                hook.remove()
            for item in modules:
                item.__dict__.pop("_token_select", None)

    def finished(
        self,
        model: Any,
        input_ids: torch.Tensor,
        model_kwargs: dict[str, Any],
        sequences: torch.Tensor,
        new: list[list[int]],
    ) -> None:
        if not self.trace_enabled or len(new) != input_ids.shape[0]:
            return
        cache, mask = model_kwargs["past_key_values"], model_kwargs.get("attention_mask")
        start = input_ids.shape[1]
        layers = [layer for layer in cache.layers if isinstance(layer, TokenSelectLayer)]
        for row, tokens in enumerate(new):
            ids = sequences[row].tolist()
            pads = 0 if mask is None else int((mask[row] == 0).sum())
            text = ids[pads:start] + tokens
            seen = cache.get_seq_length()
            reads = torch.zeros(seen)
            for layer in layers:
                if layer.reads is not None:
                    counted = layer.reads[row, :seen].cpu()
                    reads[: len(counted)] += counted
            steps = torch.full((seen,), float(max(len(tokens) - 1, 0)))  # the prompt could be read by all of them
            steps[start:] = torch.arange(seen - start, 0, -1).float()
            share = (reads / (steps * max(len(layers), 1)).clamp(min=1)).clamp(max=1)[pads:].tolist()
            share = (share + [None] * len(text))[: len(text)]
            source: list[Any] = ["prompt"] * (len(text) - len(tokens)) + ["answer"] * len(tokens)
            self.trace.append(TokenTrace(text, columns={"reads": share, "source": source}, station="generation"))


class Rotation:
    """The model's own rotary embedding, at positions of our choice."""

    def __init__(self, rotary: Any, apply: Any):
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


def find_rotary(model: Any) -> Any:
    """The one rotary embedding module of a model.

    Raises:
        UnsupportedModelError: none, or several.
    """
    found = {id(item): item for name, item in model.named_modules() if name.endswith("rotary_emb")}
    if len(found) != 1:
        raise UnsupportedModelError(
            f"TokenSelect gives rotary positions within the selection; {type(model).__name__} has {len(found)} rotary embeddings.",
            "It works with models that rotate queries and keys once for all layers, as Llama does.",
        )
    return next(iter(found.values()))


# -- the definition ------------------------------------------------------------------------------------------------------
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


def select(settings: TokenSelect, query: torch.Tensor, keys: torch.Tensor, rotation: Any) -> torch.Tensor:
    """The top-k of the candidates, sorted: positions in ``keys`` ``[H_kv, N, d]`` for an un-rotated query ``[H, d]``."""
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
    """An attention function of transformers: ``query`` ``[B, H, T, d]``, ``key`` and ``value`` ``[B, H_kv, N, d]``, un-rotated.

    ``attention_mask`` is the ``[B, N]`` padding mask, or None without padding.
    """
    settings, rotation, layer, window = module._token_select
    # padding comes first in a row: dropping it leaves text only
    pads = [0] * query.shape[0] if attention_mask is None else (~attention_mask).sum(1).tolist()
    arguments = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    if window is not None or (max(pads) == 0 and key.shape[2] <= settings.budget):
        outputs = _attend(rotation, query, key, value, window, arguments)
        _count(settings, layer if window is None else None, range(len(pads)), pads, None, query, key.shape[2])
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
            kept = _kept(settings, rotation, layer, row, pad, mine, keys)
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
            _count(settings, layer, [row], pads, kept, mine, key.shape[2])
        outputs = torch.cat(rows)
    return outputs.transpose(1, 2).contiguous(), None


def _kept(
    settings: TokenSelect, rotation: Any, layer: Any, row: int, pad: int, query: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor | None:
    """Positions to attend to in ``keys`` ``[1, H_kv, N, d]``, in order; None for all."""
    length = keys.shape[2]
    if length <= settings.budget:
        return None
    asked = query[0].mean(1)  # a chunk is asked for by its mean query
    settings.stats.proposed += 1
    chosen = None
    if settings.tau is not None and layer is not None and row in layer.selected:
        alike = F.cosine_similarity(asked.flatten().float(), layer.asked[row].flatten().float(), dim=0)
        chosen = layer.selected[row] if alike >= settings.tau else None
        settings.stats.accepted += chosen is not None
    if chosen is None:
        scored = keys[0] if layer is None else layer.score_keys[row, :, pad:]
        chosen = select(settings, asked, scored, rotation)
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
    rotation: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, arguments: dict
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
    rotation: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """``_attend`` over the rows ``kept`` of ``[1, H_kv, N, d]``, for one query on a CPU: rotated keys are never written down."""
    turned = rotation(query, len(kept) - 1)[0, :, 0].unflatten(0, (key.shape[1], -1)).numpy()
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
    settings: TokenSelect,
    layer: Any,
    rows: Any,
    pads: list[int],
    kept: torch.Tensor | None,
    query: torch.Tensor,
    length: int,
) -> None:
    """Counts what a decoding step attended to."""
    if query.shape[2] != 1 or layer is None:
        return
    for row in rows:
        settings.available += length - pads[row]
        settings.attended += length - pads[row] if kept is None else len(kept)
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
