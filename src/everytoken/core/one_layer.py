"""A model of one layer and the output head, to time a way of running the weights before the weights are loaded.

A forward reads every layer once, so its time is that of one layer times their number, the head, and what transformers
does once a call. All three are timed apart. The layer is made from the configuration alone; its weights are constants,
because a matrix product takes as long for these as for any others. A head of many rows is cut and its time scaled.

Weights that are in the processor's cache are faster than a real model's, which come from memory. So other memory is
read before each run, as much as the rest of the model has, but not more than ``PUSH``.

The text is empty: what attention costs grows with the text, in the same way for all ways of running the weights.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from .grouped.weights import GroupedWeight

Parts = tuple[float, float, float]
"""Seconds of what is done once a forward, of one layer, and of the timed part of the head; where the forward is
compiled, of one layer, of three, and of one with the head, each with what is done once."""
HEAD = 1 << 26
"""Weights of a head that are timed, at most."""
PUSH = 48 << 20
"""Bytes that are read to push a layer out of the processor's cache, at most."""
AGAIN, BRIEF = 4, 0.02
"""A layer is run so often where that takes no more seconds: its time is multiplied by the number of layers."""
BITS = {"int4": 4.5}
"""Of a weight, where the dtype does not say it."""


def timed_rows(config: PreTrainedConfig) -> int:
    """Rows of the head that are timed: all, or as many as ``HEAD`` allows, with the same remainder by 8."""
    most = max(HEAD // config.hidden_size, 1024)
    return config.vocab_size - 8 * math.ceil(max(config.vocab_size - most, 0) / 8)


def one_layer(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model of one layer and a cut head, of constants.

    Raises:
        Exception: whatever transformers raises for a configuration that it cannot build so.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    small = copy.deepcopy(config)
    for name, value in small.to_dict().items():  # one entry a layer
        if isinstance(value, list) and len(value) == config.num_hidden_layers and name.startswith(("layer", "mlp")):
            setattr(small, name, value[:1])
    small.num_hidden_layers, small.vocab_size = 1, timed_rows(config)
    small.tie_word_embeddings, small.pad_token_id, small.use_cache = True, None, False
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(small, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    return model


def constant_groups(layer: nn.Linear, bits: int) -> GroupedWeight:
    """A packed weight of a layer's shape: one small one, again and again."""
    from .grouped.vectors import GROUP, TILE
    from .grouped.weights import GroupedWeight, group_weight

    rows, columns = layer.weight.shape
    small = group_weight(torch.full((TILE, GROUP), 0.01), bits)
    times = -(-rows // TILE) * (columns // GROUP)
    weights, scales = (np.resize(item, item.size * times) for item in (small.weights, small.scales))
    return GroupedWeight(bits, (rows, columns), weights, scales, 1.0)


class OneLayer:
    """The parts of a whole model's forward, timed in one way of running the weights.

    Args:
        config: of the text model.
        dtype: in which the weights come.
        way: see ``core.loading.WEIGHTS``.
        clock: seconds.

    Raises:
        Exception: see ``one_layer``; such a model is not timed.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        way: str,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.config, self.clock = config, clock
        self.layers, self.scale = config.num_hidden_layers, config.vocab_size / timed_rows(config)
        dtype = {"bfloat16": torch.bfloat16, "int4": torch.float32}.get(way, dtype)
        self.model = one_layer(config, dtype)
        self.compiled: tuple[Any, Any] | None = None
        numbers = sum(item.numel() for item in self.model.parameters())
        bits = BITS.get(way, 8 * self.model.dtype.itemsize)
        rest = int((self.layers - 1) * (numbers - self._head.weight.numel()) * bits / 8)
        self.other = torch.zeros(min(rest, PUSH) // 4)
        if way == "packed":
            from .packing import pack_linears

            pack_linears(self.model)
        elif way == "int4":
            self._group()
        self.began = self.spent = 0.0
        layer = next(item for item in self.model.modules() if isinstance(item, nn.ModuleList))[0]
        layer.register_forward_pre_hook(self._before)
        layer.register_forward_hook(self._after)
        self(1)  # packs, compiles and warms up

    @property
    def _head(self) -> Any:
        return self.model.get_output_embeddings()

    def _group(self) -> None:
        """Layers of 4 bits and a head of 8, and the compiled forward where the model has one."""
        from .grouped.linear import run_grouped
        from .grouped.llama import LlamaForward, lacks

        linears = {name: item for name, item in self.model.named_modules() if type(item) is nn.Linear}
        weights = {name: constant_groups(item, 8 if item is self._head else 4) for name, item in linears.items()}
        for name, module in linears.items():
            run_grouped(module, weights[name])
        if lacks(self.model) is not None:
            return
        deep, inner = copy.copy(self.model), copy.copy(self.model.model)  # three times the same layer
        deep._modules, inner._modules = dict(deep._modules), dict(inner._modules)
        deep.config = copy.deepcopy(self.model.config)
        deep.config.num_hidden_layers = 3
        deep.model, inner.layers = inner, nn.ModuleList([self.model.model.layers[0]] * 3)
        more = {name.replace("layers.0.", f"layers.{k}."): item for name, item in weights.items() for k in range(3)}
        self.compiled = LlamaForward(self.model, weights), LlamaForward(deep, more)

    def _before(self, *_arguments: Any) -> None:
        self.began = self.clock()

    def _after(self, *_arguments: Any) -> None:
        self.spent += self.clock() - self.began

    def seconds(self, parts: Parts) -> float:
        """Of a whole forward, from the smallest of each part over several runs."""
        once, layer, head = parts
        if self.compiled is not None:
            one, three, whole = parts
            layer = max(three - one, 0.0) / 2
            once, head = max(one - layer, 0.0), max(whole - one, 0.0)
        return once + self.layers * layer + self.scale * head

    @torch.no_grad()
    def __call__(self, tokens: int) -> Parts:
        """One run over so many tokens."""
        if self.compiled is not None:
            return self._compiled(tokens)
        states = torch.full((1, tokens, self.config.hidden_size), 0.5, dtype=self.model.dtype)
        once = layer = math.inf
        until = self.clock() + BRIEF
        for _ in range(AGAIN):
            self.other.sum()
            self.spent = 0.0
            began = self.clock()
            output = self.model.base_model(inputs_embeds=states, use_cache=False)[0]
            once, layer = min(once, self.clock() - began - self.spent), min(layer, self.spent)
            if self.clock() > until:
                break
        began = self.clock()
        self._head(output)
        return once, layer, self.clock() - began

    def _compiled(self, tokens: int) -> Parts:
        """The same for the compiled forward, which cannot be watched inside: with one layer, with three, and with and
        without the head."""
        assert self.compiled is not None
        ids, positions = torch.zeros(tokens, dtype=torch.long), torch.arange(tokens)

        def seconds(forward: Any, wanted: int) -> float:
            shape = (forward.layers, forward.kv_heads, tokens, forward.width)
            keys, values = torch.zeros(shape), torch.zeros(shape)
            best = math.inf
            for _ in range(2):
                self.other.sum()
                began = self.clock()
                forward(ids, positions, keys, values, 0, None, wanted)
                best = min(best, self.clock() - began)
            return best

        return seconds(self.compiled[0], 0), seconds(self.compiled[1], 0), seconds(self.compiled[0], tokens)
