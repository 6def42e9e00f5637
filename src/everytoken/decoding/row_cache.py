"""The cache of one text: reading on as plain ``generate`` would, reading a tree of drafts, and taking tokens back.

Families differ in what a cache can do. Keys of full attention are cut off at the end. A sliding window drops its oldest
keys, so it must keep more of them while tokens may still be taken back. A recurrent state cannot be cut: it is copied
before drafts are read and put back after them. A tree of drafts needs a mask of its own, which only attention over
plain keys takes; elsewhere drafts are read as one path, which needs none.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    QuantizedLayer,
    StaticLayer,
)

from ..core.errors import BadInputError, UnsupportedModelError
from .inputs import TREE_ATTENTION, cache_argument, device_of, keeps_state_in_layers, takes
from .masks import attention_mask_for

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

KEYED = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers that hold one key a token: a tree of drafts can be masked in them."""
KNOWN = (
    *KEYED,
    DynamicIndexedLayer,
    DummyLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
)
"""Layers that are cut, or copied by their states; others are copied whole."""


# -- what a model is like ----------------------------------------------------------------------------------------------
def new_cache(model: PreTrainedModel) -> Cache:
    """An empty cache with the layers that the model's configuration asks for."""
    return DynamicCache(config=model.config)


def check_cached(reader: str, model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError for a model that keeps what it has read elsewhere than in ``past_key_values``."""
    if cache_argument(model) is None:
        raise UnsupportedModelError(
            f"{reader} reads on from past_key_values; {type(model).__name__} takes none.",
            "Models that keep their state elsewhere cannot be decoded by it.",
        )
    if keeps_state_in_layers(model):
        raise UnsupportedModelError(
            f"{reader} takes tokens back in past_key_values; {type(model).__name__} keeps its state in its layers.",
            "Models that keep their state elsewhere cannot be decoded by it.",
        )
    if not model._supports_default_dynamic_cache():
        raise UnsupportedModelError(
            f"{reader} reads on from a cache of transformers; {type(model).__name__} takes none but its own.",
            "Models that keep their state elsewhere cannot be decoded by it.",
        )


def check_rewindable(decoder: str, cache: Cache) -> None:
    """Raises UnsupportedModelError for caches whose tokens cannot be taken back: of a fixed size, quantised or
    offloaded."""
    odd = sorted({type(layer).__name__ for layer in cache.layers if isinstance(layer, (StaticLayer, QuantizedLayer))})
    odd += ["offloaded"] if getattr(cache, "offloading", False) else []
    if odd:
        raise UnsupportedModelError(
            f"{decoder} must drop rejected tokens from the cache; this one has {', '.join(odd)} layers.",
            "Leave cache_implementation out, or pass a DynamicCache(config=model.config).",
        )


def takes_trees(model: PreTrainedModel, cache: Cache) -> bool:
    """Whether one forward can read a tree: attention takes a mask of ours, and positions count from it."""
    text = model.config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    return (
        bool(model._supports_attention_backend)
        and takes(model, "position_ids")
        and not getattr(text, "alibi", False)
        and text._attn_implementation in TREE_ATTENTION
        and kinds <= {"full_attention", "sliding_attention", "chunked_attention"}
        and all(type(layer) in KEYED for layer in (cache.layers or [DynamicLayer()]))
    )


def rope_switch(config: PreTrainedConfig) -> tuple[int, bool] | None:
    """Where a rotary embedding changes with the text's length: the last position before, and whether it goes on
    changing with every token (dynamic NTK) or changes once (longrope). None: it never does."""
    text = config.get_text_config(decoder=True)
    given = getattr(text, "rope_parameters", None) or {}
    parts = [part for part in given.values() if isinstance(part, dict)] or [given]
    for part in parts:
        if part.get("rope_type") in ("dynamic", "longrope"):
            last = part.get("original_max_position_embeddings")
            last = getattr(text, "original_max_position_embeddings", None) if last is None else last
            last = text.max_position_embeddings if last is None else last
            return int(last), part["rope_type"] == "dynamic"
    return None


_measured: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


@torch.no_grad()
def _continues(model: PreTrainedModel) -> bool:
    """Whether a model reads three tokens behind three others as if one by one; tried once, on the model itself.

    Of the recurrent layers in transformers some take up their state for several tokens and some only for one, some
    models refuse several, and no attribute says which.
    """
    if model not in _measured:
        vocab = model.config.get_text_config(decoder=True).vocab_size
        text = [place % vocab for place in range(1, 7)]
        logits = []
        for steps in ((3, 6), (3, 4, 5, 6)):
            cache = RowCache(model, prompt=3)
            try:
                for end in steps:
                    output = cache._read(text[:end])
            except (AssertionError, IndexError, RuntimeError, ValueError):  # it says that it takes one
                _measured[model] = False
                return False
            logits.append(output["logits"][0, -1].float())
        scale = float(logits[1].abs().max())
        tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
        _measured[model] = bool((logits[0] - logits[1]).abs().max() <= tolerance * max(scale, 1.0))
    return _measured[model]


# -- padding -----------------------------------------------------------------------------------------------------------
def check_strippable(decoder: str, model: PreTrainedModel, cache: Cache) -> None:
    """Raises BadInputError unless the padding that a filled cache begins with can be taken out of it."""
    embedded = any("position" in name.rpartition(".")[2] for name, _ in model.named_modules())
    if cached_length(cache) > 0 and embedded and not takes(model, "position_ids"):
        raise BadInputError(
            f"{decoder} cannot take the padding out of this cache: {type(model).__name__} counted it as positions.",
            "Pass the row without its padding.",
        )
    odd = sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in KNOWN})
    if odd:
        raise BadInputError(
            f"{decoder} cannot take the padding out of a cache with {', '.join(odd)} layers.",
            "Pass the row without its padding.",
        )


def strip_padding(cache: Cache, padding: int) -> None:
    """Takes the first ``padding`` tokens out of a cache of one row."""
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or not layer.is_initialized or padding == 0:
            continue
        length, kept = layer.get_seq_length(), layer.keys.shape[-2]
        gone = max(0, padding - (length - kept))  # a window may have passed some already
        for name in ("keys", "values", "indexer_keys"):
            if isinstance(getattr(layer, name, None), torch.Tensor):
                setattr(layer, name, getattr(layer, name)[..., gone:, :])
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length -= padding


def restore_padding(cache: Cache, padding: int) -> None:
    """Puts ``padding`` tokens before what a cache of one row holds, as plain ``generate`` leaves it."""
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or not layer.is_initialized or padding == 0:
            continue
        room = padding
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length += padding
            room = max(0, min(padding, layer.sliding_window - 1 - layer.keys.shape[-2]))
        for name in ("keys", "values", "indexer_keys"):
            states = getattr(layer, name, None)
            if isinstance(states, torch.Tensor):
                blank = states.new_zeros((*states.shape[:-2], room, states.shape[-1]))
                setattr(layer, name, torch.cat([blank, states], -2))


# -- the cache of a row ------------------------------------------------------------------------------------------------
class RowCache:
    """A model's cache of one text without padding.

    Args:
        model: reads the text.
        cache: empty, or filled with the text's beginning.
        prompt: tokens of the prompt, which are read together; None: as many as are read first.

    Attributes:
        cache: transformers' own object; it stays the same one.
        length: tokens that it holds.
        trees: whether a tree of drafts can be read in one forward.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache | None = None, prompt: int | None = None):
        self.model, self.prompt = model, prompt
        self.cache = new_cache(model) if cache is None else cache
        self.length = cached_length(self.cache)
        self.trees = takes_trees(model, self.cache)
        self.device = device_of(model)
        self.positions = takes(model, "position_ids")
        self.name = cache_argument(model) or "past_key_values"
        self.keeps = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
        self.plain = type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
        self.switch = rope_switch(model.config)
        # read once: a configuration's attributes are slow
        text = model.config.get_text_config(decoder=True)
        self._kinds = getattr(text, "layer_types", None)
        self._window = getattr(text, "sliding_window", None)
        self._chunk = getattr(text, "attention_chunk_size", None)
        self.started = False
        self._mark = self.length
        self._placed = torch.empty(0, dtype=torch.long, device=self.device)
        self._states: list[dict[str, Any] | None] = []
        self._whole: Cache | None = None

    def read(self, text: list[int]) -> ModelOutput:
        """Reads what the cache does not hold of ``text``: the model's output for it, of which the last logits count.

        A prompt is read in one forward, as ``generate`` reads it. Where later tokens cross a change of the rotary
        embedding they are read one at a time, because plain decoding turns each by its own length.
        """
        self.prompt = len(text) if self.prompt is None else self.prompt
        steps, later = [len(text)], len(text) - max(self.length, self.prompt)
        crosses = self.switch is not None and len(text) > self.switch[0]
        if later > 0 and len(text) - self.length > 1 and (crosses or not self.reads_on):
            steps = [self.prompt] if self.length < self.prompt else []
            steps += range(len(text) - later + 1, len(text) + 1)
        output = None
        for end in steps:
            output = self._read(text[:end])
        assert output is not None
        return output

    @property
    def reads_on(self) -> bool:
        """Whether several tokens can be read behind others in one forward; some models take one at a time."""
        return self.trees or _continues(self.model)

    def _read(self, text: list[int]) -> ModelOutput:
        device = self.device
        if self.plain:
            inputs: dict[str, Any] = {"input_ids": torch.tensor([text[self.length :]], device=device)}
            inputs |= {self.name: self.cache, "use_cache": True, **self.keeps}
            if self.positions:
                inputs["position_ids"] = torch.arange(self.length, len(text), device=device)[None]
        else:  # some models prepare their inputs in a way of their own
            given: dict[str, Any] = {"position_ids": torch.arange(len(text), device=device)[None]}
            inputs = self.model.prepare_inputs_for_generation(
                torch.tensor([text], device=device),
                next_sequence_length=len(text) - self.length,
                attention_mask=torch.ones(1, len(text), dtype=torch.long, device=device),
                use_cache=True,
                is_first_iteration=not self.started,
                **{self.name: self.cache},
                **self.keeps,
                **(given if self.positions else {}),
            )
        output: ModelOutput = self.model(**inputs, return_dict=True)
        fresh = output.get(self.name)
        if fresh is not None and fresh is not self.cache:  # the model read the text anew: the caller's object goes on
            self.cache.__dict__.update(fresh.__dict__)
        self.length = len(text)
        self.started = True
        return output

    def read_tree(self, tokens: list[int], depths: list[int], allowed: torch.Tensor | None) -> ModelOutput:
        """Reads nodes of a tree in one forward.

        Args:
            tokens: of the nodes.
            depths: of the nodes; 0 stands where the next token after the mark does.
            allowed: ``[n, length + n]`` boolean: which keys each node may see; None where each sees all before it.
        """
        device = self.device
        positions = torch.tensor(depths, device=device) + self._mark
        mask = None
        if allowed is not None:
            mask = self._masks(allowed.to(device), positions)
        output: ModelOutput = self.model(
            input_ids=torch.tensor([tokens], device=device),
            use_cache=True,
            **{self.name: self.cache},
            **({"attention_mask": mask} if mask is not None else {}),
            **({"position_ids": positions[None]} if self.positions else {}),
        )
        self._placed = torch.cat([self._placed, positions])
        self.length += len(tokens)
        return output

    def _masks(self, allowed: torch.Tensor, positions: torch.Tensor) -> Any:
        """``allowed`` for every kind of layer, in the form that the model takes."""
        before = torch.arange(self._mark, device=positions.device)
        keys = torch.cat([before, self._placed, positions])
        kinds, window, chunk = self._kinds, self._window, self._chunk
        only = "sliding_attention" if window is not None else "full_attention"
        masks = {}
        for kind in set(kinds) if kinds else {only}:
            layer = kinds.index(kind) if kinds else 0
            part = allowed
            if kind == "sliding_attention" and window is not None:
                part = part & (positions[:, None] - keys < window)
            elif kind == "chunked_attention" and chunk is not None:
                part = part & (positions[:, None] // chunk == keys // chunk)
            length, offset = self.cache.get_mask_sizes(len(positions), layer)
            masks[kind] = attention_mask_for(self.model, part[None, None, :, offset : offset + length])
        return masks if kinds else masks[only]

    def room(self, length: int) -> float:
        """How many tokens behind a text of ``length`` can be read together with its last one, as if one by one.

        A rotary embedding that changes with the text's length turns all tokens of a forward alike.
        """
        if not self.reads_on:
            return 0
        if self.switch is None:
            return math.inf
        last, ever = self.switch
        return last - length if length <= last else 0 if ever or length == last + 1 else math.inf

    # -- taking tokens back --------------------------------------------------------------------------------------------
    def mark(self) -> None:
        """What is read from here on may be taken back."""
        self._mark = self.length
        self._placed = torch.empty(0, dtype=torch.long, device=self.device)
        if any(type(layer) not in KNOWN for layer in self.cache.layers):
            self._whole = copy.deepcopy(self.cache)
            return
        for layer in self.cache.layers:
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.record_past = True
                if layer.is_initialized:  # what the window has passed by now is not needed any more
                    layer.crop(0)
        self._states = [_copied(layer) for layer in self.cache.layers]

    def back(self, kept: int = 0) -> bool:
        """Takes back what was read since ``mark``, but for its first ``kept`` tokens where the cache can be cut there.

        Returns:
            whether those are still held; if not, the cache is where the mark was and they must be read again.
        """
        surplus = self.length - self._mark - kept
        if surplus == 0:
            return True
        if self._whole is not None:
            self.cache.__dict__.update(copy.deepcopy(self._whole).__dict__)
            self.length, self._placed = self._mark, self._placed[:0]
            return kept == 0
        recurrent = any(state is not None for state in self._states)
        drop = self.length - self._mark if recurrent else surplus
        for layer, state in zip(self.cache.layers, self._states or [None] * len(self.cache.layers), strict=False):
            if state is not None:
                layer.__dict__.update({name: dict(value) for name, value in state.items()})
            if isinstance(layer, LinearAttentionAndFullAttentionLayer):
                DynamicLayer.crop(layer, -drop)  # its own would cut the recurrent part, which cannot be
            elif isinstance(layer, DynamicLayer):
                layer.crop(-drop)
        self.length -= drop
        self._placed = self._placed[: self.length - self._mark]
        return not recurrent or kept == 0

    def keep(self, path: list[int]) -> None:
        """Of a tree read since ``mark``, keeps the nodes of ``path`` (places in it, in order) and drops the others."""
        size = self.length - self._mark
        if path != list(range(len(path))):
            for layer in self.cache.layers:
                start = layer.keys.shape[-2] - size
                index = torch.tensor(path, device=layer.keys.device) + start
                layer.keys[:, :, start : start + len(path)] = layer.keys[:, :, index]
                layer.values[:, :, start : start + len(path)] = layer.values[:, :, index]
        self.back(len(path))

    def close(self) -> None:
        """Windows forget what they have passed again, as in a cache of plain ``generate``."""
        for layer in self.cache.layers:
            if getattr(layer, "record_past", False):
                layer.record_past = False
                if isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized:
                    layer.keys = layer.keys[:, :, -layer.sliding_window + 1 :]
                    layer.values = layer.values[:, :, -layer.sliding_window + 1 :]


def cached_length(cache: Cache) -> int:
    """Tokens that a cache holds; 0 for one of recurrent layers alone, which does not count them, unless it is
    filled."""
    if any(not isinstance(layer, LinearAttentionLayer) or isinstance(layer, DynamicLayer) for layer in cache.layers):
        return int(cache.get_seq_length())
    if cache.layers and cache.has_previous_state():
        raise BadInputError(
            "A cache of recurrent layers alone does not say how many tokens it holds.", "Leave past_key_values out."
        )
    return 0


def _copied(layer: Any) -> dict[str, Any] | None:
    """The recurrent states of a layer, or None if it has none."""
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return None
    held: dict[str, Any] = {
        name: {place: None if item is None else item.clone() for place, item in getattr(layer, name).items()}
        for name in ("conv_states", "recurrent_states")
    }
    flags = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size")
    return held | {name: dict(getattr(layer, name)) for name in flags}


def room_before(model: PreTrainedModel, length: int) -> float:
    """How many tokens more fit a model's context: positions beyond it have no meaning, or no embedding."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return math.inf if context is None or context <= 0 else context - length
