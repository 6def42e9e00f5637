"""A Llama's forward in one compiled call, with weights of 4 bits (a head of 8) in groups of 32.

A token of a small model costs transformers several hundred calls, and their overhead more than the arithmetic. Here all
layers, the attention and the head are one function that a few threads run together. It reads several tokens behind
others at the price of the arithmetic alone, and each token's result is the same, bit for bit, however many are read
with it: the sums of a token are taken in the same order.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from ..errors import UnsupportedModelError
from ..pace import Pace
from . import kernels
from .team import run_together
from .weights import GroupedWeight

CHUNK = 64
"""Tokens that are read together, at most; longer texts are read piece by piece."""


def lacks(model: Any) -> str | None:
    """Why this forward is not the one of a model, in words, or None if it is."""
    config = getattr(model, "config", None)
    if type(model) is not LlamaForCausalLM or config is None:
        return f"{type(model).__name__} is no plain LlamaForCausalLM"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        return f"its rotary embedding changes with the text ({rope.get('rope_type')})"
    if config.attention_bias or config.mlp_bias or model.lm_head.bias is not None:
        return "its layers have biases"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    sizes = (config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim)
    if any(size % 32 for size in sizes) or config.num_key_value_heads * config.head_dim % 8 or config.vocab_size % 8:
        return f"its sizes ({', '.join(map(str, sizes))}; vocabulary {config.vocab_size}) are no multiples of 32 and 8"
    return None


def some_threads() -> list[int]:
    """As many threads as torch may use, half of them, and so on to one: on a busy machine, fewer are faster, because
    all wait for the one that is not running."""
    counts = [torch.get_num_threads()]
    while counts[-1] > 1:
        counts.append(counts[-1] // 2)
    return counts


def changes(model: torch.nn.Module) -> list[tuple[str, int, int]]:
    """Names, places and change counts of all parameters, which adapters and edits change."""
    return [
        (name, item.data_ptr(), 0 if item.is_inference() else item._version) for name, item in model.named_parameters()
    ]


@dataclass
class Room:
    """Arrays that a forward over up to so many tokens writes into."""

    rows: int
    members: int
    arrays: tuple[np.ndarray, ...]


def new_room(rows: int, members: int, keys: int, size: int, middle: int, inner: int, kv: int) -> Room:
    """Arrays for ``kernels.llama_forward`` over so many rows and keys, by the widths of a model: of its states, of its
    feed-forward, of all its queries, and of all its keys."""
    widest = max(size, middle, inner)
    arrays = (
        np.empty((rows, inner + 2 * kv), np.float32),
        np.empty((rows, inner), np.float32),
        np.empty((rows, 2 * middle), np.float32),
        np.empty((rows, size), np.float32),
        np.empty((members, rows * widest), np.int16),
        np.empty((members, rows * widest // 32), np.float32),
        np.empty((members, rows * widest // 32), np.float32),
        np.empty((members, rows, widest), np.float32),
        np.empty((members, keys), np.float32),
    )
    return Room(rows, members, arrays)


class RotaryTables:
    """Cosines and sines of a rotary embedding that depends on the position alone, kept for those seen so far."""

    def __init__(self, rotary: Any, embedding: Any):
        self.rotary, self.embedding = rotary, embedding
        self.kept: tuple[np.ndarray, np.ndarray] | None = None

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tables ``[R, d]`` for positions ``[R]``."""
        needed, kept = int(positions.max()) + 1, self.kept
        if kept is None or needed > len(kept[0]):
            cos, sin = self.rotary(self.embedding.weight, torch.arange(needed + 1024)[None])
            kept = self.kept = cos[0].float().numpy(), sin[0].float().numpy()
        return kept[0][positions], kept[1][positions]


class LlamaForward:
    """The forward of one model.

    Args:
        model: ``lacks`` nothing.
        weights: the grouped weight of every linear layer, by module name.

    Raises:
        UnsupportedModelError: the model is not of this kind.
    """

    def __init__(self, model: LlamaForCausalLM, weights: dict[str, GroupedWeight]):
        problem = lacks(model)
        if problem is not None:
            raise UnsupportedModelError(f"This model has no compiled forward: {problem}.", "transformers' own works.")
        config = model.config
        self.size, self.middle, self.width = config.hidden_size, config.intermediate_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.layers, self.vocab = config.num_hidden_layers, config.vocab_size
        self.epsilon = float(config.rms_norm_eps)
        self.embedding = model.get_input_embeddings()
        layers = list(model.model.layers)
        pairs = [(layer.input_layernorm.weight, layer.post_attention_layernorm.weight) for layer in layers]
        self.norms = np.stack([[first.detach().numpy(), second.detach().numpy()] for first, second in pairs])
        self.last_norm = model.model.norm.weight.detach().numpy()

        def stacked(*names: str) -> tuple[np.ndarray, np.ndarray]:
            kinds = []
            for kind in ("weights", "scales"):
                rows = [
                    np.concatenate([getattr(weights[f"model.layers.{layer}.{name}"], kind) for name in names])
                    for layer in range(self.layers)
                ]
                kinds.append(np.stack(rows))
            return kinds[0], kinds[1]

        self.packed = (
            *stacked("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            *stacked("self_attn.o_proj"),
            *stacked("mlp.gate_proj", "mlp.up_proj"),
            *stacked("mlp.down_proj"),
            weights["lm_head"].weights,
            weights["lm_head"].scales,
        )
        self.tables = RotaryTables(model.model.rotary_emb, self.embedding)
        self._versions = changes(model)
        self._rooms = threading.local()
        self._paces: dict[tuple[int, int], Pace] = {}  # by how many tokens are read together

    def stands_for(self, model: Any) -> bool:
        """Whether it still gives what the model's own forward gives: nobody watches or has changed it."""
        config = model.config
        if model.training or config.output_attentions or config.output_hidden_states:
            return False
        for module in model.modules():
            replaced = "forward" in vars(module) and not hasattr(module, "_grouped")
            if replaced or module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
                return False
        return self._versions == changes(model)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_rooms"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _rooms=threading.local())

    def _arrays(self, rows: int, keys: int, members: int) -> tuple[np.ndarray, ...]:
        """Room for a forward; a thread keeps it for the next."""
        room: Room | None = getattr(self._rooms, "room", None)
        if room is None or room.rows < rows or room.members < members or room.arrays[-1].shape[1] < keys:
            rows, keys = max(rows, 16 if room is None else room.rows), keys + 1024
            members = members if room is None else max(members, room.members)
            sizes = self.size, self.middle, self.heads * self.width, self.kv_heads * self.width
            room = self._rooms.room = new_room(rows, members, keys, *sizes)
        return room.arrays

    @torch.no_grad()
    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        past: int,
        allowed: torch.Tensor | None = None,
        wanted: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads tokens behind ``past`` others.

        Args:
            tokens, positions: ``[R]``.
            keys, values: ``[L, kv heads, room, d]`` float32; filled up to ``past``, and here for R more.
            allowed: ``[R, R]`` boolean, which of the new tokens each may see; None: those up to itself. Only for R up
                to ``CHUNK``.
            wanted: the last so many tokens get logits.

        Returns:
            logits ``[wanted, V]``, and the states ``[L + 1, R, D]`` (what enters each layer; the last, normalised).
        """
        count = len(tokens)
        states = np.empty((self.layers + 1, count, self.size), np.float32)
        logits = np.empty((wanted, self.vocab), np.float32)
        embedded = self.embedding.weight[tokens].float().numpy()
        cos, sin = self.tables(positions.numpy())
        for first in range(0, count, CHUNK):
            rows = min(CHUNK, count - first)
            part = slice(first, first + rows)
            seen = np.tri(rows, dtype=np.bool_) if allowed is None else np.ascontiguousarray(allowed.numpy())
            asked = max(0, min(rows, first + rows - (count - wanted)))
            some = np.empty((self.layers + 1, rows, self.size), np.float32) if rows < count else states
            kind = rows.bit_length(), torch.get_num_threads()
            pace = self._paces.setdefault(kind, Pace(some_threads()))
            members, began = pace.choose(), time.perf_counter()
            run_together(
                kernels.llama_forward, members,
                np.ascontiguousarray(embedded[part]), self.norms, self.last_norm, self.epsilon,
                *self.packed, keys.numpy(), values.numpy(), past + first, seen, cos[part], sin[part], asked, some,
                logits[max(0, first - (count - wanted)) :][:asked], *self._arrays(rows, past + count, members),
            )  # fmt: skip
            pace.saw(members, rows, time.perf_counter() - began)
            if rows < count:
                states[:, part] = some
        return torch.from_numpy(logits), torch.from_numpy(states)
