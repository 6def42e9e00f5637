"""The draft's side of speculative decoding: its cache, and forwards over the nodes of a tree.

Works with any causal language model of transformers that shares the target's tokenizer, and with a
``FeatureDraftForCausalLM``, which is handed the target's hidden states at every verified position.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ...decoding.inputs import device_of, takes
from ...decoding.row import attention_mask_for, fit, known_tokens
from .trees import TokenTree


class DraftSession:
    """The draft's side: its cache of committed text, and forwards over tree nodes.

    The cache holds the committed text (root included) and, during a round, the tree nodes already run, in
    ``self.rows``. ``commit`` drops those and remembers the new text; the next forward runs it first.

    Args:
        vocab: the target's vocabulary size. A draft may know fewer tokens: it proposes no others, and reads another
            token in their place.
    """

    def __init__(self, draft: Any, target: PreTrainedModel, vocab: int):
        from .modeling_feature_draft import FeatureDraftForCausalLM, FeatureTap

        self.model, self.vocab = draft, vocab
        self.uses_features = isinstance(draft, FeatureDraftForCausalLM)
        self.tap = FeatureTap(target, draft.config.feature_layers) if self.uses_features else None
        if self.uses_features and (draft._head is None or draft._target[0] is not target):
            draft.attach(target)
        self.token_ids = draft.draft_token_ids.long() if self.uses_features else None
        self.cache = DynamicCache()
        self.device = device_of(target)
        self.pending: list[int] = []
        self.pending_features: torch.Tensor | None = None
        self.carry: torch.Tensor | None = None  # target features of the last verified position
        self.base = 0  # cache rows of committed text
        self.offset: int | None = (
            None  # position of the first cached token (a reused target cache may hide earlier ones)
        )
        self.rows: dict[int, int] = {}
        self.states: dict[int, torch.Tensor] = {}

    def close(self) -> None:
        if self.tap is not None:
            self.tap.remove()

    def commit(self, tokens: list[int], position: int, path: list[int] | None = None) -> None:
        """Tells the draft of new text that starts at ``position``; ``path`` are the tree nodes whose features are
        known."""
        if self.offset is None:
            self.offset = position
        drop = self.cache.get_seq_length() - self.base if self.base else 0
        if drop > 0:
            self.cache.crop(-drop)
        self.rows, self.states = {}, {}
        if self.uses_features:
            self._commit_features(tokens, path)
        self.pending += tokens if self.uses_features else known_tokens(tokens, self.model)

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
        previous = previous[: len(tokens)]
        known = self.pending_features
        self.pending_features = previous if known is None else torch.cat([known, previous])

    def forward(self, tree: TokenTree, nodes: list[int], reduced: bool) -> torch.Tensor:
        """Logits after each of ``nodes`` (the root among them only in the round's first call): ``[len(nodes), V]``."""
        if nodes == [0]:
            return self._run_root(reduced)
        rows = self.rows
        start = self.cache.get_seq_length()
        mask = torch.zeros(len(nodes), start + len(nodes), dtype=torch.bool)
        mask[:, : self.base] = True
        for row, node in enumerate(nodes):
            rows[node] = start + row
        for row, node in enumerate(nodes):
            walk = node
            while walk > 0:
                mask[row, rows[walk]] = True
                walk = tree.parents[walk]
        position = (self.offset or 0) + self.base - 1
        positions = torch.tensor([[position + tree.depths[node] for node in nodes]], device=self.device)
        tokens = [tree.tokens[node] for node in nodes]
        ids = torch.tensor([tokens if self.uses_features else known_tokens(tokens, self.model)], device=self.device)
        kwargs: dict[str, Any] = {}
        if self.uses_features:
            kwargs["hidden"] = torch.stack([self.states[tree.parents[node]] for node in nodes])[None]
        return self._call(ids, positions, mask[None, None].to(self.device), nodes, reduced, **kwargs)

    def _run_root(self, reduced: bool) -> torch.Tensor:
        past = self.cache.get_seq_length()
        ids = torch.tensor([self.pending], device=self.device)
        position = (self.offset or 0) + past
        positions = torch.arange(position, position + len(self.pending), device=self.device)[None]
        kwargs: dict[str, Any] = {}
        if self.uses_features:
            kwargs["features"] = self.pending_features[None]  # type: ignore[index]
        logits = self._call(ids, positions, None, [0], reduced, **kwargs)
        self.base = self.cache.get_seq_length()
        self.pending, self.pending_features = [], None
        return logits

    def _call(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: Any, nodes: list[int], reduced: bool, **kwargs: Any
    ) -> torch.Tensor:
        if mask is not None and not self.uses_features:
            mask = attention_mask_for(self.model, mask)
        if self.uses_features:
            kwargs["reduced_logits"] = reduced
        if takes(self.model, "logits_to_keep"):
            kwargs["logits_to_keep"] = len(nodes)
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **kwargs,
        )
        if self.uses_features:
            for node, state in zip(nodes, output.hidden_states[0][0, -len(nodes) :], strict=True):
                self.states[node] = state
        logits = output.logits[0, -len(nodes) :].float()
        return logits if reduced and self.uses_features else fit(logits, self.vocab)
