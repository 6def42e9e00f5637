"""The draft's side of speculative decoding: its cache, and forwards over the nodes of a tree.

Works with any causal language model of transformers that shares the target's tokenizer, and with a
``FeatureDraftForCausalLM``, which is handed the target's hidden states at every verified position.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ...decoding.inputs import device_of
from ...decoding.lean import LeanRowCache
from ...decoding.row import fit, known_tokens
from ...decoding.row_cache import RowCache, room_before
from .trees import TokenTree


def is_feature_draft(model: Any) -> bool:
    """Whether a draft reads the target's hidden states."""
    from .modeling_feature_draft import FeatureDraftForCausalLM

    return isinstance(model, FeatureDraftForCausalLM)


def draft_share(target: PreTrainedModel, draft: PreTrainedModel) -> float:
    """What a draft forward costs in steps of the target, by the weights that each reads."""

    def read(model: PreTrainedModel) -> int:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", None)
        looked_up = 0 if tied or embedding is None else sum(item.numel() for item in embedding.parameters())
        return sum(item.numel() for item in model.parameters()) - looked_up

    if is_feature_draft(draft):
        own = sum(item.numel() for item in draft.parameters())
        weights = own + draft.config.draft_vocab_size * draft.config.hidden_size
    else:
        weights = read(draft)
    return min(weights / max(read(target), 1), 1.0)


class DraftSession:
    """The draft's side: its cache of committed text, and forwards over tree nodes.

    The cache holds the committed text (root included) and, during a round, the tree nodes already run, in
    ``self.rows``. ``commit`` drops those and remembers the new text; the next forward runs it first.

    Args:
        vocab: the target's vocabulary size. A draft may know fewer tokens: it proposes no others, and reads another
            token in their place.
        read_by: the target's cache, if the target reads through one; None where something else calls the target.
    """

    def __init__(self, draft: Any, target: PreTrainedModel, vocab: int, read_by: RowCache | None = None):
        from .modeling_feature_draft import FeatureDraftForCausalLM, FeatureTap

        self.model, self.vocab = draft, vocab
        self.uses_features = isinstance(draft, FeatureDraftForCausalLM)
        self.tap = None
        if self.uses_features:
            lean = read_by if isinstance(read_by, LeanRowCache) else None  # its forward runs no hooks
            self.tap = FeatureTap(target, draft.config.feature_layers, hooked=lean is None)
            if lean is not None:
                lean.watchers.append(self.tap.see)
        if self.uses_features and (draft._head is None or draft._target[0] is not target):
            draft.attach(target)
        self.token_ids = draft.draft_token_ids.long() if self.uses_features else None
        self.cache = RowCache(draft)
        self.trees = self.uses_features or self.cache.trees
        self.text: list[int] = []  # committed, for drafts that read the text alone
        self.device = device_of(target)
        self.pending: list[int] = []
        self.pending_features: list[torch.Tensor] = []
        self.carry: torch.Tensor | None = None  # target features of the last verified position
        self.base = 0  # cache rows of committed text
        self.offset: int | None = (
            None  # position of the first cached token (a reused target cache may hide earlier ones)
        )
        self.rows: dict[int, int] = {}
        self.states: dict[int, torch.Tensor] = {}

    def room(self, length: int) -> float:
        """How many tokens behind a text of ``length`` the draft can still read."""
        return room_before(self.model, length)

    def close(self) -> None:
        if self.tap is not None:
            self.tap.remove()

    def commit(self, tokens: list[int], position: int, path: list[int] | None = None) -> None:
        """Tells the draft of new text that starts at ``position``; ``path`` are the tree nodes whose features are
        known."""
        if self.offset is None:
            self.offset = position
        if self.base:
            self._forget_tree()
        self.rows, self.states = {}, {}
        if self.uses_features:
            self._commit_features(tokens, path)
            self.pending += tokens
        else:
            self.text += known_tokens(tokens, self.model)

    def _forget_tree(self) -> None:
        """Leaves the committed text in the cache."""
        self.cache.back()

    def _commit_features(self, tokens: list[int], path: list[int] | None) -> None:
        """Features one position before each of ``tokens``, from the target's last forward."""
        assert self.tap is not None
        if self.carry is None:  # the prompt: nothing precedes its first token
            seen = self.tap.last[0]
            previous = torch.cat([torch.zeros_like(seen[:1]), seen[:-1]])
            self.carry = seen[-1:]
        elif path is None:  # one token straight after the prompt
            previous = self.carry
        else:  # tokens[i] follows tree node path[i]
            previous = self.tap.last[0][torch.tensor(path, device=self.device)]
            self.carry = previous[-1:]
        self.pending_features.append(previous[: len(tokens)])

    def forward(self, tree: TokenTree, nodes: list[int], reduced: bool) -> torch.Tensor:
        """Logits after each of ``nodes`` (the root among them only in the round's first call): ``[len(nodes), V]``."""
        if nodes == [0]:
            return self._run_root(reduced)
        rows = self.rows
        start = self.cache.length
        mask = torch.zeros(len(nodes), start + len(nodes), dtype=torch.bool)
        mask[:, : self.base] = True
        for row, node in enumerate(nodes):
            rows[node] = start + row
        for row, node in enumerate(nodes):
            walk = node
            while walk > 0:
                mask[row, rows[walk]] = True
                walk = tree.parents[walk]
        depths, tokens = [tree.depths[node] - 1 for node in nodes], [tree.tokens[node] for node in nodes]
        if not self.uses_features:
            output = self.cache.read_tree(known_tokens(tokens, self.model), depths, mask if self.trees else None)
            logits: torch.Tensor = output["logits"]
            return fit(logits[0, -len(nodes) :].float(), self.vocab)
        positions = torch.tensor([depths], device=self.device) + (self.offset or 0) + self.base
        hidden = torch.stack([self.states[tree.parents[node]] for node in nodes])[None]
        ids = torch.tensor([tokens], device=self.device)
        return self._call(ids, positions, mask[None, None].to(self.device), nodes, reduced, hidden=hidden)

    def _run_root(self, reduced: bool) -> torch.Tensor:
        if not self.uses_features:
            output = self.cache.read(self.text)
            self.base = self.cache.length
            self.cache.mark()
            logits: torch.Tensor = output["logits"]
            return fit(logits[0, -1:].float(), self.vocab)
        position = (self.offset or 0) + self.cache.length
        ids = torch.tensor([self.pending], device=self.device)
        positions = torch.arange(position, position + len(self.pending), device=self.device)[None]
        features = torch.cat(self.pending_features)[None]
        logits = self._call(ids, positions, None, [0], reduced, features=features)
        self.base = self.cache.length
        self.cache.mark()
        self.pending, self.pending_features = [], []
        return logits

    def _call(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: Any, nodes: list[int], reduced: bool, **kwargs: Any
    ) -> torch.Tensor:
        """A feature draft's forward over ``nodes``."""
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache.cache,
            use_cache=True,
            logits_to_keep=len(nodes),
            reduced_logits=reduced,
            **kwargs,
        )
        self.cache.length += ids.shape[1]
        for node, state in zip(nodes, output.hidden_states[0][0, -len(nodes) :], strict=True):
            self.states[node] = state
        logits: torch.Tensor = output.logits[0, -len(nodes) :].float()
        return logits if reduced else fit(logits, self.vocab)
