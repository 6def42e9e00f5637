"""A feature draft's forward by the compiled pieces of its target's (``core.grouped.llama``).

A draft is one block and a head: so little arithmetic that torch spends more time on calling it than on computing. Its
block is a Llama of one layer, so the function that runs the target runs it as well, and nothing more is compiled. Its
weights are rounded to 4 bits (its head has 8, as the target's), which changes what is proposed and never what the
target writes. Keys and values lie in arrays: the committed text, and behind it the nodes of the tree that were read in
this round.
"""

from __future__ import annotations

import time
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from ...core.grouped import kernels
from ...core.grouped.llama import CHUNK, Room, RotaryTables, changes, new_room, some_threads
from ...core.grouped.team import run_together
from ...core.grouped.weights import GroupedWeight, group_weight
from ...core.pace import Pace
from ...decoding.row import fit
from ...decoding.row_cache import RowCache
from .drafting import DraftSession
from .modeling_feature_draft import FeatureDraftForCausalLM
from .trees import TokenTree

SPARE = 256
"""Room for so many more tokens than are known of."""


def _pack(weight: torch.Tensor, bits: int = 4) -> GroupedWeight:
    return group_weight(weight.detach(), bits, searched=False)


def lacks(draft: FeatureDraftForCausalLM) -> str | None:
    """Why a draft, attached to a target, cannot be compiled, in words, or None if it can."""
    config, head = draft.config, draft._head
    if head is None or draft._target[1].weight.dtype != torch.float32 or head.device.type != "cpu":
        return "it is not attached to a float32 target on a CPU"
    if (
        config.num_hidden_layers != 1
        or config.attention_bias
        or config.mlp_bias
        or draft._head_layer[0].bias is not None
    ):
        return "it has other layers, or biases"
    if config.hidden_act != "silu" or (config.rope_parameters or {}).get("rope_type", "default") != "default":
        return "its activation or its rotary embedding is another"
    sizes = (config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim)
    if any(size % 32 for size in sizes) or config.num_key_value_heads * config.head_dim % 8 or len(head) % 8:
        return "its sizes are no multiples of 32 and 8"
    return None


class CompiledDraft:
    """The forward of one attached draft, which ``lacks`` nothing."""

    def __init__(self, draft: FeatureDraftForCausalLM):
        config, block = draft.config, draft.block
        self.size, self.middle, self.width = config.hidden_size, config.intermediate_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.features = len(draft.feature_norms)
        self.epsilon = float(config.rms_norm_eps)
        self.embedding = draft._target[1]
        self.changes, self.target = changes(draft), draft._target[0]
        head = draft._head
        assert head is not None
        self.vocab = len(head)
        norms = [draft.embed_norm, *draft.feature_norms]
        self.mix_norms = np.stack([norm.weight.detach().numpy() for norm in norms])
        text, own = (
            _pack(torch.cat([draft.embed_proj.weight, other.weight], 1))
            for other in (draft.feature_proj, draft.hidden_proj)
        )
        self.mixes = {True: text, False: own}
        attention, mlp = block.self_attn, block.mlp
        layers = (
            torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
            attention.o_proj.weight,
            torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            mlp.down_proj.weight,
        )
        packed = [array[None] for weight in map(_pack, layers) for array in (weight.weights, weight.scales)]
        pair = (block.input_layernorm.weight, block.post_attention_layernorm.weight)
        self.block = (
            np.stack([weight.detach().numpy() for weight in pair])[None],
            draft.norm.weight.detach().numpy(),
            *packed,
        )
        packed_head = _pack(head, 8)
        self.head = packed_head.weights, packed_head.scales
        self.tables = RotaryTables(draft.rotary_emb, self.embedding)
        self._room: Room | None = None
        self._paces: dict[tuple[int, int], Pace] = {}

    def stands_for(self, draft: FeatureDraftForCausalLM) -> bool:
        """Whether it still gives what the draft's own forward gives."""
        return draft._target[0] is self.target and changes(draft) == self.changes

    def _normed(self, rows: np.ndarray, norm: int) -> np.ndarray:
        return rows / np.sqrt((rows * rows).mean(-1, keepdims=True) + self.epsilon) * self.mix_norms[norm]  # type: ignore[no-any-return]

    def _mixed(self, tokens: list[int], before: np.ndarray, from_target: bool) -> np.ndarray:
        """The block's input ``[R, D]``, see ``FeatureDraftForCausalLM.mix_inputs``."""
        parts = [self._normed(self.embedding.weight.detach().numpy()[tokens], 0)]
        if from_target:
            states = np.split(before, self.features, -1)
            parts += [self._normed(part, 1 + number) for number, part in enumerate(states)]
        else:
            parts.append(before)
        x, weight = np.concatenate(parts, -1).astype(np.float32), self.mixes[from_target]
        out = np.empty((len(tokens), self.size), np.float32)
        numbers, (steps, sums) = np.empty((1, x.size), np.int16), np.empty((2, 1, x.size // 32), np.float32)
        run_together(kernels.linear, 1, weight.bits, weight.weights, weight.scales, x, numbers, steps, sums, out)
        return out

    def _arrays(self, rows: int, keys: int, members: int) -> tuple[np.ndarray, ...]:
        room = self._room
        if room is None or room.rows < rows or room.members < members or room.arrays[-1].shape[1] < keys:
            sizes = self.size, self.middle, self.heads * self.width, self.kv_heads * self.width
            room = self._room = new_room(max(rows, 16), members, keys + 1024, *sizes)
        return room.arrays

    @torch.no_grad()
    def __call__(
        self,
        tokens: list[int],
        before: np.ndarray,
        from_target: bool,
        positions: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
        past: int,
        allowed: np.ndarray,
        wanted: int,
    ) -> tuple[torch.Tensor, np.ndarray]:
        """Reads up to ``CHUNK`` tokens.

        Args:
            before: one position earlier, the target's states ``[R, F]`` (``from_target``) or the draft's own
                ``[R, D]``.
            keys, values: ``[1, kv heads, room, d]``, filled up to ``past`` and, for the tree, behind it.
            allowed: ``[R, E + R]``, see ``llama_forward``.
            wanted: the last so many tokens get logits.

        Returns:
            logits ``[wanted, draft vocabulary]``, states ``[R, D]``.
        """
        rows = len(tokens)
        x = self._mixed(tokens, before, from_target)
        states, logits = np.empty((2, rows, self.size), np.float32), np.empty((wanted, self.vocab), np.float32)
        pace = self._paces.setdefault((rows.bit_length(), torch.get_num_threads()), Pace(some_threads()))
        members, began = pace.choose(), time.perf_counter()
        norms, last_norm, *packed = self.block
        run_together(
            kernels.llama_forward, members, x, norms, last_norm, self.epsilon, *packed, *self.head, keys, values, past,
            allowed, *self.tables(positions), wanted, states, logits, *self._arrays(rows, past + rows, members),
        )  # fmt: skip
        pace.saw(members, rows, time.perf_counter() - began)
        return torch.from_numpy(logits), states[1]


_known: WeakKeyDictionary[FeatureDraftForCausalLM, CompiledDraft] = WeakKeyDictionary()


def compiled_draft(draft: FeatureDraftForCausalLM) -> CompiledDraft | None:
    """The compiled forward of an attached draft, made at first use; None where there is none for its kind."""
    known = _known.get(draft)
    if known is None or not known.stands_for(draft):
        if lacks(draft) is not None or draft.training:
            return None
        known = _known[draft] = CompiledDraft(draft)
    return known


class CompiledSession(DraftSession):
    """See ``DraftSession``. Its cache is a pair of arrays, and the tree's nodes lie behind the committed text."""

    def __init__(self, draft: Any, target: Any, vocab: int, read_by: RowCache, compiled: CompiledDraft):
        super().__init__(draft, target, vocab, read_by)
        self.compiled, self.read = compiled, 0
        self.own: dict[int, np.ndarray] = {}  # the draft's states of the tree's nodes
        self.keys, self.values = (np.empty((1, compiled.kv_heads, SPARE, compiled.width), np.float32) for _ in range(2))

    def _forget_tree(self) -> None:
        self.read = self.base

    def forward(self, tree: TokenTree, nodes: list[int], reduced: bool) -> torch.Tensor:
        logits = self._read_pending() if nodes == [0] else self._read_nodes(tree, nodes)
        if reduced:
            return logits
        full = logits.new_full((len(nodes), self.model.config.target_vocab_size), torch.finfo(logits.dtype).min)
        assert self.token_ids is not None
        return fit(full.index_copy_(-1, self.token_ids, logits), self.vocab)

    def _read_pending(self) -> torch.Tensor:
        features, pending = torch.cat(self.pending_features).numpy(), self.pending
        for first in range(0, len(pending), CHUNK):
            part = pending[first : first + CHUNK]
            rows, last = len(part), first + CHUNK >= len(pending)
            self._make_room(self.base + rows)
            logits, states = self.compiled(
                part, features[first : first + rows], True, np.arange(rows) + (self.offset or 0) + self.base,
                self.keys, self.values, self.base, np.tri(rows, dtype=np.bool_), int(last),
            )  # fmt: skip
            self.base += rows
        self.read, self.own = self.base, {0: states[-1]}
        self.pending, self.pending_features = [], []
        return logits

    def _read_nodes(self, tree: TokenTree, nodes: list[int]) -> torch.Tensor:
        count, earlier = len(nodes), self.read - self.base
        self._make_room(self.read + count)
        allowed = np.zeros((count, earlier + count), np.bool_)
        self.rows.update((node, earlier + row) for row, node in enumerate(nodes))
        for row, node in enumerate(nodes):
            walk = node
            while walk > 0:
                allowed[row, self.rows[walk]] = True
                walk = tree.parents[walk]
        depths = np.array([tree.depths[node] for node in nodes])
        before = np.stack([self.own[tree.parents[node]] for node in nodes])
        logits, states = self.compiled(
            [tree.tokens[node] for node in nodes], before, False, depths - 1 + (self.offset or 0) + self.base,
            self.keys, self.values, self.base, allowed, count,
        )  # fmt: skip
        self.read += count
        self.own.update(zip(nodes, states, strict=True))
        return logits

    def _make_room(self, needed: int) -> None:
        if needed <= self.keys.shape[2]:
            return
        room = needed + max(needed // 2, SPARE)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = np.empty((*old.shape[:2], room, old.shape[3]), np.float32)
            new[:, :, : self.read] = old[:, :, : self.read]
            setattr(self, name, new)
