"""TokenSelect: each step attends to the few cached tokens that matter for it (arXiv 2411.02886).

Attention over a long cache is sparse, and what matters is scattered. For the current query q, every head h scores the
*un-rotated* cached keys, a softmax turns its scores into votes, and the votes of all heads are added::

    s_h(i) = R(n_local) q_h . k_kv(h),i                      R(p): rotary embedding of position p; no scaling
    S(i)   = sum_h softmax_i s_h(i)                          over candidates n_init <= i < N - n_local
    kept   = first n_init  +  top-k of S, in text order  +  last n_local

Exact attention runs over what is kept, with rotary positions 0 .. M-1 given *within the selection*. So positions never
exceed ``n_init + top_k + n_local``, and a model reads far beyond the length it was trained for, without tuning. Up to
that many tokens everything is kept and the result is ordinary attention. Prompts are read in chunks, with one selection
a chunk and layer: each query of a chunk is rotated to its own position from ``n_local`` on, and their mean asks, as in
the official code.

Layers that rotate nothing take the selection as it is. Layers with a sliding window or a recurrent state are left
alone. How each layer rotates is found by asking it (``rotations.py``); a model with another way is refused.

::

    model.generate(**inputs, custom_generate=TokenSelect(top_k=2048))

Keys are cached before rotation, in buffers that grow by half (transformers' dynamic cache copies itself at every
token), with a low-precision copy for scoring: at 64k tokens reading the keys is what a step costs. All tokens stay in
memory; time is saved, not memory. Choices of ours: scores in bfloat16 (``score_dtype="float32"`` is exact); a reused
selection keeps its top-k and moves its local window along; the query that later ones are compared with is the one that
made the selection.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from ...core.errors import BadInputError, UnsupportedModelError
from ...core.trace import TokenTrace
from ...decoding.base import Example
from ...decoding.call import DecodingCall, DecodingStats
from ...decoding.checks import is_filled
from ...decoding.loop import LoopDecoder, model_lock
from ...decoding.row_cache import check_cached
from .attention import IMPLEMENTATION, LayerState, Rotation, TokenSelectStats, Turn, still
from .cache import TokenSelectCache, TokenSelectLayer
from .rotations import CACHES, Plan, at_rest, plan_layers, rotaries_of, same


@dataclass
class _Handed:
    """What a rotary embedding handed to the layers of a forward: its own output ``real``, and ``rest`` in its place."""

    rotary: nn.Module
    compute: Callable[..., object]
    real: object
    rest: object


@dataclass
class TokenSelect(LoopDecoder):
    """Attention over a selection of cached tokens.

    Args:
        top_k: tokens chosen by votes.
        n_init: first tokens, always kept (attention sinks).
        n_local: last tokens, always kept; the current one is among them.
        chunk_size: prompt tokens read at a time; at most ``n_local``.
        tau: reuse a layer's last top-k while the cosine of its query and the current one (all heads as one vector) is
            at least this; None never does. 0.9 is the paper's value.
        pool_size: odd number of neighbours over which votes are max-pooled, or None.
        score_dtype: precision of the scores: ``"bfloat16"``, ``"float32"``, or None for the model's own.

    Works on any batch, padded on the left. The trace has a row for every token of prompt and answer: ``reads`` is the
    share of decoding steps (all layers together) that attended to it, of those that could have.

    ``stats`` counts ``proposed`` selections due and ``accepted`` selections reused.
    """

    stats_type: ClassVar[type[DecodingStats]] = TokenSelectStats
    trace_columns: ClassVar[tuple[str, ...]] = ("reads", "source")
    lossless: ClassVar[bool] = False
    colour: ClassVar[str] = "reads"
    extrapolates: ClassVar[bool] = True
    counts_text: ClassVar[bool] = True
    top_k: int = 2048
    n_init: int = 128
    n_local: int = 512
    chunk_size: int = 512
    tau: float | None = None
    pool_size: int | None = None
    score_dtype: str | None = "bfloat16"

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
    def stats(self) -> TokenSelectStats:
        return cast(TokenSelectStats, super().stats)

    @property
    def attended(self) -> int:
        """Tokens attended by the last call's decoding steps, summed over layers and rows."""
        return self.stats.attended

    @property
    def available(self) -> int:
        """Tokens that full attention would have read in those steps."""
        return self.stats.available

    @property
    def budget(self) -> int:
        """Tokens that a step attends to, at most."""
        return self.n_init + self.top_k + self.n_local

    def new_cache(self, model: PreTrainedModel) -> TokenSelectCache:
        """An empty cache for ``model``, to pass as ``past_key_values`` where it should outlive a call."""
        dtype = getattr(torch, self.score_dtype) if self.score_dtype else None
        return TokenSelectCache(model.config, dtype, self.trace_enabled)

    def figures(self) -> dict[str, float]:
        share = self.attended / self.available if self.available else 1.0
        reused = self.stats.accepted / self.stats.proposed if self.stats.proposed else 0.0
        return {"share of tokens attended": share, "selections reused": reused}

    # -- around a call -------------------------------------------------------------------------------------------------
    def check_call(self, call: DecodingCall[TokenSelectStats]) -> None:
        """Raises BadInputError for a cache of another kind that holds something, positions that do not count tokens, or
        another size of chunks."""
        cache, chunk = call.model_kwargs.get("past_key_values"), call.config.prefill_chunk_size
        own = isinstance(cache, TokenSelectCache)
        if cache is not None and not own and (is_filled(cache) or getattr(cache, "_is_user_defined", False)):
            raise BadInputError(
                "TokenSelect caches keys before rotation and cannot go on from another cache.",
                "Fill one of its own: past_key_values=decoder.new_cache(model).",
            )
        check_cached("TokenSelect", call.model)
        mask = call.attention_mask
        if mask is not None and not bool(mask[:, -1].all()):
            raise BadInputError("Padding must be on the left.", "Set padding_side='left' on the tokenizer.")
        check_positions(call)
        self._plans(call.model)
        kind = call.config.cache_implementation
        if kind not in (None, "dynamic"):
            raise BadInputError(
                f"TokenSelect has a cache of its own; cache_implementation={kind!r} was asked for.",
                "Leave it out.",
            )
        if chunk not in (None, self.chunk_size):
            raise BadInputError(
                f"TokenSelect reads prompts in chunks of {self.chunk_size}; prefill_chunk_size={chunk} was asked for.",
                "Leave prefill_chunk_size out, or build TokenSelect(chunk_size=...).",
            )

    @contextmanager
    def applied(self, call: DecodingCall[TokenSelectStats]) -> Iterator[TokenSelectCache]:
        cache = call.model_kwargs.get("past_key_values")
        if not isinstance(cache, TokenSelectCache):
            cache = self.new_cache(call.model)
            call.model_kwargs["past_key_values"] = cache
        # not every recurrent layer reads several tokens behind its state: there each layer takes the chunks by itself
        recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
        call.config.prefill_chunk_size = None if recurrent else self.chunk_size
        with self._attention(call.model, call.stats):
            yield cache

    @contextmanager
    def attention(self, model: PreTrainedModel) -> Iterator[None]:
        """Switches a model's attention to this selection, and back; for use outside ``generate``.

        ``stats`` counts what happens inside.

        Raises:
            UnsupportedModelError: a layer rotates, or attends, in a way that a selection cannot follow.
        """
        stats = TokenSelectStats()
        self._remember(stats, [])
        with model_lock(model), self._attention(model, stats):
            yield

    @staticmethod
    def _plans(model: PreTrainedModel) -> list[Plan]:
        """How each attention layer is served; layers are asked through the attention function that they will call."""
        text = model.config.get_text_config(decoder=True)
        with model_lock(model):
            before = text._attn_implementation
            try:
                text._attn_implementation = IMPLEMENTATION
                return plan_layers(model)
            finally:
                text._attn_implementation = before

    @contextmanager
    def _attention(self, model: PreTrainedModel, stats: TokenSelectStats) -> Iterator[None]:
        text = model.config.get_text_config(decoder=True)
        before, hooks = text._attn_implementation, []
        rotaries, plans = rotaries_of(model), self._plans(model)
        alone = any(plan.alone for plan in plans)
        handed: dict[tuple[object, ...], _Handed] = {}
        rotations: dict[tuple[object, ...], Rotation] = {}

        def standing_still(rotary: nn.Module) -> Callable[..., object]:
            forward = rotary.forward

            def stand_still(x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> object:
                key = (id(rotary), *args, *kwargs.items())
                # layers that are left alone get the model's own; otherwise only its width is asked for, at position 0
                real = forward(x, position_ids if alone else position_ids[..., :1] * 0, *args, **kwargs)
                rest = at_rest(real, position_ids.shape[-2:])
                handed[key] = _Handed(rotary, lambda x, places: forward(x, places, *args, **kwargs), real, rest)
                return rest

            return stand_still

        def see(plan: Plan, kwargs: dict[str, Any]) -> dict[str, Any]:
            cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
            given = kwargs.get("position_embeddings")
            layer: TokenSelectLayer | None = None
            rotation: Turn = still
            if not plan.alone and isinstance(cache, TokenSelectCache):
                layer = cast(TokenSelectLayer, cache.layers[cast(int, plan.module.layer_idx)])
            key = next((key for key, item in handed.items() if same(item.rest, given)), None)
            if key is not None and plan.alone:
                kwargs = kwargs | {"position_embeddings": handed[key].real}
            elif key is not None and plan.apply is not None:
                place, item = (*key, plan.apply, plan.last, plan.halved), handed[key]
                if place not in rotations:
                    rotations[place] = Rotation(item.rotary, plan.apply, item.compute, plan.last, plan.halved)
                rotation = rotations[place]
            elif plan.apply is not None and given is not None:  # a layer that is handed nothing rotates nothing
                raise UnsupportedModelError(
                    f"A layer of {type(model).__name__} is handed another rotary embedding than its model computes."
                )
            plan.module._token_select = LayerState(self, stats, rotation, layer, plan.alone)  # type: ignore[assignment]
            return kwargs

        try:
            for plan in plans:
                told = functools.partial(lambda plan, _module, args, kwargs: (args, see(plan, kwargs)), plan)
                hooks.append(plan.module.register_forward_pre_hook(told, with_kwargs=True))
            for rotary in rotaries:
                rotary.forward = standing_still(rotary)
            text._attn_implementation = IMPLEMENTATION
            yield
        finally:
            text._attn_implementation = before
            for rotary in rotaries:
                rotary.__dict__.pop("forward", None)
            for hook in hooks:
                hook.remove()
            for plan in plans:
                plan.module.__dict__.pop("_token_select", None)

    def finished(self, call: DecodingCall[TokenSelectStats], sequences: torch.Tensor, new: list[list[int]]) -> None:
        if not self.trace_enabled or len(new) != call.input_ids.shape[0]:
            return
        cache, mask = call.model_kwargs["past_key_values"], call.attention_mask
        start = call.input_ids.shape[1]
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
            call.trace.append(TokenTrace(text, columns={"reads": share, "source": source}, station=self.station))

    @classmethod
    def examples(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Example]:
        few: dict[str, Any] = {"top_k": 2, "n_init": 1, "n_local": 4, "score_dtype": "float32"}
        return {
            "all tokens": Example(lambda **settings: cls(score_dtype="float32", **settings), exact=True),
            # chunks of a padded prompt begin elsewhere, and with them its selections
            "chunks": Example(lambda **settings: cls(**few, chunk_size=2, **settings), padding_exact=False),
            "token by token": Example(lambda **settings: cls(**few, chunk_size=1, **settings), padding_exact=False),
        }


def check_positions(call: DecodingCall[TokenSelectStats]) -> None:
    """Raises BadInputError unless positions, on each of their axes, go up by one with every token that is no padding.

    A selection gives positions of its own, by the order of the tokens. Images in Qwen2-VL and its like have places on
    several axes instead, and positions that a user gives may leap.
    """
    positions, mask = call.model_kwargs.get("position_ids"), call.attention_mask
    if positions is None:
        return
    given = torch.ones_like(positions) if mask is None else mask[:, -positions.shape[-1] :].to(positions)
    ahead = positions - given.cumsum(-1)
    if bool(((ahead != ahead[..., -1:]) & (given != 0)).any()):
        raise BadInputError(
            f"TokenSelect gives tokens positions by their order; these positions of {type(call.model).__name__} do not "
            "go up by one with every token, as around images.",
            "Leave images and position_ids out, or decode without TokenSelect.",
        )
