"""A feature draft's forward in one compiled call, for targets that have one too (``core.grouped.llama``).

A draft is one block and a head: so little arithmetic that torch spends more time on calling it than on computing. Here
the mixing of its inputs, the block, the head and the choice of the likeliest tokens are one function. Its weights are
rounded to 4 bits, which changes what is proposed and never what the target writes. Keys and values lie in arrays: the
committed text, and behind it the nodes of the tree that were read in this round.
"""

from __future__ import annotations

import time
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from ...core.grouped.llama import CHUNK, Room, changes, some_threads
from ...core.grouped.team import run_together
from ...core.grouped.weights import GroupedWeight, group_weight
from ...core.pace import Pace
from ...decoding.row import fit
from ...decoding.row_cache import RowCache
from .draft_kernels import draft_forward, grow_compiled
from .drafting import DraftSession, Wanted
from .modeling_feature_draft import FeatureDraftForCausalLM
from .trees import Candidates, TokenTree

SPARE = 256
"""Room for so many more tokens than are known of."""
HEAD_BITS = 4


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
        self.rotary = draft.rotary_emb
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
        self.mixes = ((text.weights, text.scales), (own.weights, own.scales))
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
        self.head = _pack(head, HEAD_BITS)
        self._tables = (np.empty((0, self.width), np.float32),) * 2
        self._room: Room | None = None
        self._paces: dict[tuple[int, int], Pace] = {}

    def stands_for(self, draft: FeatureDraftForCausalLM) -> bool:
        """Whether it still gives what the draft's own forward gives."""
        return draft._target[0] is self.target and changes(draft) == self.changes

    def tables(self, positions: np.ndarray, whole: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Rotary tables ``[R, d]`` for positions ``[R]``, or the whole tables."""
        if positions.max() >= len(self._tables[0]):
            some = torch.arange(int(positions.max()) + 1024)[None]
            self._tables = tuple(part[0].numpy() for part in self.rotary(self.embedding.weight, some))  # type: ignore[assignment]
        cos, sin = self._tables
        if whole:
            return cos, sin
        return cos[positions], sin[positions]

    def _arrays(self, rows: int, keys: int, members: int) -> tuple[Any, ...]:
        room = self._room
        if room is None or room.rows < rows or room.members < members or room.arrays[-1].shape[1] < keys:
            rows = max(rows, 16)
            inner, mixed = self.heads * self.width, self.size * (1 + self.features)
            widest, keys = max(self.size, self.middle, inner, mixed), max(keys + 1024, self.vocab)
            arrays = (
                np.empty((rows, inner + 2 * self.kv_heads * self.width), np.float32),
                np.empty((rows, inner), np.float32),
                np.empty((rows, 2 * self.middle), np.float32),
                np.empty((rows, self.size), np.float32),
                np.empty((members, rows * widest), np.int16),
                np.empty((members, rows * widest // 32), np.float32),
                np.empty((members, rows * widest // 32), np.float32),
                np.empty((members, rows, widest), np.float32),
                np.empty((members, keys), np.float32),
            )
            room = self._room = Room(rows, members, arrays)
        return room.arrays

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
        temperature: float,
        width: int,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Reads up to ``CHUNK`` tokens.

        Args:
            before: one position earlier, the target's states ``[R, F]`` (``from_target``) or the draft's own
                ``[R, D]``.
            keys, values: ``[1, kv heads, room, d]``, filled up to ``past`` and, for the tree, behind it.
            allowed: ``[R, E + R]``, see ``llama_forward``.
            wanted: the last so many tokens are continued.
            width: candidates for each.

        Returns:
            candidates' places in the draft's vocabulary and their chances ``[wanted, width]``, states ``[R, D]``,
            logits ``[wanted, draft vocabulary]``.
        """
        rows, width = len(tokens), min(width, self.vocab)
        cos, sin = self.tables(positions)
        embeds = self.embedding.weight.detach().numpy()[tokens]
        normed = 1 + self.features if from_target else 1
        states, logits = np.empty((2, rows, self.size), np.float32), np.empty((wanted, self.vocab), np.float32)
        chosen, chances = np.empty((wanted, width), np.int64), np.empty((wanted, width), np.float32)
        kind = rows.bit_length(), torch.get_num_threads()
        pace = self._paces.setdefault(kind, Pace(some_threads()))
        members, began = pace.choose(), time.perf_counter()
        arrays = self._arrays(rows, past + allowed.shape[1], members)
        mix, mix_scales = self.mixes[0 if normed > 1 else 1]
        run_together(
            draft_forward, members, embeds, before, self.mix_norms, normed, mix, mix_scales, self.epsilon, self.block,
            self.head.bits, self.head.weights, self.head.scales, keys, values, past, allowed, cos, sin, wanted,
            1 / temperature, states, logits, np.empty((rows, self.size), np.float32), arrays[-2], arrays,
            np.empty((members, wanted, width), np.int64), np.empty((members, wanted, width), np.float32),
            np.empty((members, wanted), np.float32), chosen, chances,
        )  # fmt: skip
        pace.saw(members, rows, time.perf_counter() - began)
        return chosen, chances, states[1], logits

    def grow(
        self,
        pending: list[int],
        features: np.ndarray,
        offset: int,
        vocabulary: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
        past: int,
        wanted: Wanted,
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """A whole tree behind ``pending``; see ``grow_compiled``.

        Returns:
            tokens and parents ``[2, n]`` of its nodes, the root's first; their chances ``[n]``; how often the draft was
            asked.
        """
        rows, budget, width = len(pending), wanted.budget, min(wanted.width, self.vocab)
        longest = offset + past + rows + wanted.deepest
        cos, sin = self.tables(np.array([longest]), whole=True)
        tree, probs, made = np.zeros((2, budget + 1), np.int64), np.ones(budget + 1), np.zeros(2, np.int64)
        tree[:, 0] = pending[-1], -1
        pace = self._paces.setdefault((0, torch.get_num_threads()), Pace(some_threads()))
        members, began = pace.choose(), time.perf_counter()
        arrays = self._arrays(rows, past + rows + budget, members)
        empty = np.empty
        run_together(
            grow_compiled, members, np.array(pending), features, offset, vocabulary,
            self.embedding.weight.detach().numpy(), cos, sin, self.mix_norms, *self.mixes[0], *self.mixes[1],
            self.epsilon, self.block, self.head.bits, self.head.weights, self.head.scales, keys, values, past,
            wanted.deepest, 1 / wanted.temperature, wanted.floor, wanted.worth_asking,
            empty((2, rows, self.size), np.float32), empty((rows, self.size), np.float32),
            empty((2, 1, self.size), np.float32), empty((1, self.size), np.float32),
            empty((1, self.vocab), np.float32), arrays[-2], arrays, empty((members, 1, width), np.int64),
            empty((members, 1, width), np.float32), empty((members, 1), np.float32), empty((1, width), np.int64),
            empty((1, width), np.float32), tree, probs, made,
        )  # fmt: skip
        count, asked = made.tolist()
        pace.saw(members, asked, time.perf_counter() - began)
        return tree[:, :count], probs[:count], asked


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
        logits = torch.from_numpy(self._run(tree, nodes, 1.0, 1)[2])
        if reduced:
            return logits
        full = logits.new_full((len(nodes), self.model.config.target_vocab_size), torch.finfo(logits.dtype).min)
        assert self.token_ids is not None
        return fit(full.index_copy_(-1, self.token_ids, logits), self.vocab)

    def likeliest(self, tree: TokenTree, nodes: list[int], width: int, temperature: float) -> Candidates:
        places, chances, _ = self._run(tree, nodes, temperature, width)
        assert self.token_ids is not None
        tokens = self.token_ids.numpy()[places]
        return list(zip(tokens.tolist(), chances.tolist(), strict=True))

    def grow(self, wanted: Wanted) -> tuple[TokenTree, int]:
        """A round's tree in one call, and how often the draft was asked."""
        self._make_room(self.base + len(self.pending) + wanted.budget)
        features = torch.cat(self.pending_features).numpy()
        while len(self.pending) > CHUNK:
            self._read_part(features)
            features = features[CHUNK:]
        assert self.token_ids is not None
        nodes, probs, asked = self.compiled.grow(
            self.pending, features, self.offset or 0, self.token_ids.numpy(), self.keys, self.values, self.base, wanted
        )
        self.base += len(self.pending)
        self.read, self.own, self.pending, self.pending_features = self.base, {}, [], []
        tree = TokenTree()
        for token, parent, prob in zip(*nodes.tolist(), probs.tolist(), strict=True):
            tree.add(token, parent, prob)
        return tree, asked

    def _read_part(self, features: np.ndarray) -> None:
        """The first ``CHUNK`` pending tokens."""
        part, self.pending = self.pending[:CHUNK], self.pending[CHUNK:]
        positions = np.arange(CHUNK) + (self.offset or 0) + self.base
        self.compiled(
            part, features[:CHUNK], True, positions, self.keys, self.values, self.base,
            np.tri(CHUNK, dtype=np.bool_), 0, 1.0, 1,
        )  # fmt: skip
        self.base += CHUNK

    def _run(
        self, tree: TokenTree, nodes: list[int], temperature: float, width: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Candidates after each of ``nodes`` and their chances, and the draft's logits."""
        count = len(self.pending) if nodes == [0] else len(nodes)
        self._make_room(self.read + count)
        if nodes == [0]:
            return self._run_pending(temperature, width)
        earlier = self.read - self.base
        allowed = np.zeros((count, earlier + count), np.bool_)
        for row, node in enumerate(nodes):
            self.rows[node] = earlier + row
        for row, node in enumerate(nodes):
            walk = node
            while walk > 0:
                allowed[row, self.rows[walk]] = True
                walk = tree.parents[walk]
        depths = np.array([tree.depths[node] for node in nodes])
        before = np.stack([self.own[tree.parents[node]] for node in nodes])
        places, chances, states, logits = self.compiled(
            [tree.tokens[node] for node in nodes], before, False, depths - 1 + (self.offset or 0) + self.base,
            self.keys, self.values, self.base, allowed, count, temperature, width,
        )  # fmt: skip
        self.read += count
        self.own.update(zip(nodes, states, strict=True))
        return places, chances, logits

    def _run_pending(self, temperature: float, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        features = torch.cat(self.pending_features).numpy()
        while len(self.pending) > CHUNK:
            self._read_part(features)
            features = features[CHUNK:]
        rows = len(self.pending)
        places, chances, states, logits = self.compiled(
            self.pending, features, True, np.arange(rows) + (self.offset or 0) + self.base, self.keys, self.values,
            self.base, np.tri(rows, dtype=np.bool_), 1, temperature, width,
        )  # fmt: skip
        self.base += rows
        self.read, self.own = self.base, {0: states[-1]}
        self.pending, self.pending_features = [], []
        return places, chances, logits

    def _make_room(self, needed: int) -> None:
        if needed <= self.keys.shape[2]:
            return
        room = needed + max(needed // 2, SPARE)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = np.empty((*old.shape[:2], room, old.shape[3]), np.float32)
            new[:, :, : self.base] = old[:, :, : self.base]
            setattr(self, name, new)
