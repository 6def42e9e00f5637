"""DySpec: speculative decoding with a token tree that grows where the draft is sure (arXiv 2410.11744).

One forward of the target can check many drafted continuations at once, laid out as a tree. Which tree? DySpec estimates
the chance that a node is accepted by the product of draft probabilities along its path and grows the tree greedily by
that value. A *slot* is an open place for one more child of a node: it has a value ``v`` (the chance that verification
comes to test it) and the residual distribution ``R`` (the draft's, without the siblings already there). Filling a slot
with ``y ~ R`` opens two::

    child slot of y:    v0 = v R[y]          (verification accepts y and moves on)
    next sibling slot:  v1 = v (1 - R[y])    (verification rejects y and tries again)

Fixed size: always fill the slot of largest value, ``budget`` times. Threshold: layer by layer, fill every slot with
``v > threshold`` (about 1/budget), one draft forward a layer.

Verification walks down from the root with the target's distribution T and the draft's D. A child y is accepted with
probability ``min(1, T[y] / D[y])``; on rejection ``T <- norm(max(T - D, 0))`` and ``D[y] <- 0, D <- norm(D)``. When no
child is left the next token is drawn from T. The output has exactly the target's distribution, for any draft and any
tree, because a slot's value never looks at the token that will fill it. In greedy decoding the child equal to arg-max T
is accepted, the output is the target's own greedy text, and (as nothing random has to be protected there) nodes are
ranked by the value ``v R[y]`` of the node itself, which maximises the expected number of accepted tokens among all
trees of that size.

Two choices of ours, both without influence on the result: draft forwards of the fixed-size tree are batched, by looking
ahead at every slot that may still be filled; and each round starts by running the draft over the tokens just committed,
so a draft that reads the target's hidden states (``drafts.FeatureDraftForCausalLM``) gets the true ones.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from ..core.errors import BadInputError
from ..core.pace import Pace
from ..decoding.base import Decoder, Example
from ..decoding.call import DecodingCall
from ..decoding.checks import check_decoder_only, check_same_vocabulary, check_unread
from ..decoding.inputs import check_flex, check_reads_text
from ..decoding.lean import LeanRowCache, row_cache
from ..decoding.matcher import Matcher, fill_mask
from ..decoding.row import DecodingRow
from ..decoding.row_cache import check_cached, check_rewindable
from .speculative import check_feature_target
from .speculative.drafting import DraftSession
from .speculative.trees import Candidates, Expand, TokenTree, grow_tree

# Processors that look at one row of scores and not at the text before it: they can run on all nodes at once.
PATH_FREE = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
)


WIDTHS = (3, 7)
"""Budgets that are tried beside none and the one that was asked for."""
_paces: WeakKeyDictionary[PreTrainedModel, dict[tuple[Any, ...], Pace]] = WeakKeyDictionary()


@dataclass
class DySpec(Decoder):
    """Lossless speculative decoding with a dynamic token tree.

    Args:
        draft_model: a small causal language model with the target's tokenizer, or a ``FeatureDraftForCausalLM``. None
            is only allowed for the embedded target, whose draft ships with the package.
        budget: nodes of the tree, at most. 0 is plain decoding, 1 one speculated token. Choose it from the cost of a
            target forward over so many tokens (16 suits a small model on a CPU, 64 a 7B model on a GPU).
        threshold: a number grows layer by layer all slots above it, with one draft forward a layer (the paper: about
            1/budget); None grows the fixed-size tree, which needs more draft forwards.
        max_depth: longest drafted path.
        adaptive: try several budgets up to this one, none among them, and use the fastest by the clock. The text stays
            the same, and which tokens were drafted may differ from run to run. Greedy decoding only; a sample would not
            be the same for the same seed. None: where the target has a compiled forward, whose plain steps are often
            cheaper than any draft (``load_model(weights="int4")``).
        max_children: drafted alternatives considered per node.
        matcher: a ``Matcher`` in its initial state. Every node of the tree is masked by it, in the draft's
            distribution and in the target's, so the output has exactly the distribution of masked plain decoding.

    Rows of a batch are decoded one after the other, each with its own tree and cache. Logits processors that remember
    the text so far (``guidance_scale``, or one of the user's) see the checked tokens alone, each once and in order; the
    draft proposes without them. The draft's vocabulary may lack tokens that were added to the target: it never
    proposes them, and the target still writes them.
    """

    draft_model: PreTrainedModel | None = None
    budget: int = 16
    threshold: float | None = 0.08
    max_depth: int = 12
    max_children: int = 8
    adaptive: bool | None = None
    matcher: Matcher | None = field(default=None, kw_only=True, repr=False)
    trace_columns: ClassVar[tuple[str, ...]] = ("round", "depth", "draft_prob", "source", "value")
    processes_once: ClassVar[bool] = True
    recurrent: ClassVar[bool] = True
    compiled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.budget < 0 or self.max_depth < 1 or self.max_children < 1:
            raise BadInputError(
                f"DySpec needs budget >= 0, max_depth >= 1 and max_children >= 1; got {self.budget}, {self.max_depth}, "
                f"{self.max_children}."
            )
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise BadInputError(f"threshold is a probability between 0 and 1; got {self.threshold}.", "Try 1 / budget.")

    def check_model(self, config: PreTrainedConfig) -> None:
        """Without a draft of the user's, one must ship for the target.

        Raises:
            UnsupportedModelError: no draft is given and none ships for this model.
        """
        super().check_model(config)
        if self.draft_model is None:
            from .speculative import check_draft_ships

            check_draft_ships(config)

    def load_helpers(self, model: PreTrainedModel) -> None:
        if self.draft_model is None:
            from .speculative import load_draft

            self.draft_model = load_draft(model)

    def check_call(self, call: DecodingCall[Any]) -> None:
        """Raises TokenizerMismatchError for a draft of another vocabulary, UnsupportedModelError for a target or
        draft that tokens and a cache do not suffice for, or a cache from which tokens cannot be dropped."""
        assert self.draft_model is not None
        check_flex("DySpec", call.model)
        check_cached("DySpec", call.model)
        if not check_feature_target(self.draft_model, call.model):
            check_decoder_only("DySpec's draft", self.draft_model.config)
            check_reads_text("DySpec's draft", self.draft_model, recurrent=True)
            check_cached("DySpec's draft", self.draft_model)
        check_same_vocabulary(call.model, self.draft_model)
        cache = call.cache
        check_rewindable("DySpec", self.new_row_cache(call) if cache is None else cache)

    def matcher_for(self, call: DecodingCall[Any], row: int) -> Matcher | None:
        return self.matcher

    def grow(self, tree: TokenTree, expand: Expand, budget: int, max_depth: int, sampling: bool) -> TokenTree:
        """Grows a round's tree; override it for another shape (see ``grow_tree`` for the arguments)."""
        return grow_tree(tree, expand, budget, self.threshold, max_depth, sampling)

    def decode_row(self, call: DecodingCall[Any], row: DecodingRow) -> None:
        _Speculation(self, call, row).decode()

    @classmethod
    def examples(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Example]:
        from ..testing.models import tiny_llama

        draft = tiny_llama(model.config.vocab_size, seed=9)
        return {
            "layers": Example(lambda **settings: cls(draft, budget=6, **settings), exact=True),
            "fixed size": Example(lambda **settings: cls(draft, budget=4, threshold=None, **settings), exact=True),
            "itself as draft": Example(lambda **settings: cls(model, budget=5, **settings), exact=True),
        }


class _Speculation:
    """Decoding of one prompt: target cache, draft, and the rounds."""

    def __init__(self, decoder: DySpec, call: DecodingCall[Any], row: DecodingRow):
        assert decoder.draft_model is not None
        assert row.cache is not None
        self.decoder, self.row, self.model, self.stats = decoder, row, call.model, call.stats
        self.vocab = check_same_vocabulary(call.model, decoder.draft_model)
        self.cache, self.device, self.max_length = row_cache(call.model, row.cache), row.device, call.config.max_length
        self.path_free = all(type(item) in PATH_FREE for item in row.processors)
        self.draft = DraftSession(decoder.draft_model, call.model, self.vocab, self.cache)
        # where a model cannot mask a tree, one path is drafted: it needs no mask
        self.branches = self.cache.trees and self.draft.trees

        self.pace = self._pace(decoder)

    def _pace(self, decoder: DySpec) -> Pace | None:
        """The measured pace of this draft with this target, which goes on from call to call; None: always draft."""
        wanted = isinstance(self.cache, LeanRowCache) if decoder.adaptive is None else decoder.adaptive
        if not wanted or self.row.do_sample or decoder.budget == 0:
            return None
        known = _paces.setdefault(self.model, {})
        key = (id(decoder.draft_model), decoder.budget, decoder.threshold, torch.get_num_threads())
        return known.setdefault(key, Pace((0, *(width for width in WIDTHS if width < decoder.budget), decoder.budget)))

    # -- the loop ------------------------------------------------------------------------------------------------------
    def decode(self) -> None:
        try:
            logits = self._prefill()
            done = self._commit_first(logits)
            turn = 1
            while not done:
                # a tree deeper than the room left would only be thrown away
                room = (self.max_length or 1 << 30) - len(self.row.padding) - len(self.row.text) - 1
                began, before = time.perf_counter(), len(self.row.new)
                budget = self.decoder.budget if self.pace is None else self.pace.choose()
                tree = self._grow(min(budget, 1 << 30 if room > 0 else 0), room)
                logits = self._verify_forward(tree)
                self.stats.rounds += self.pace is None or len(tree) > 1
                self.stats.proposed += len(tree) - 1
                done = self._walk(tree, logits, turn)
                turn += 1
                if self.pace is not None and room > budget:  # a tree that was cut short says nothing about its budget
                    self.pace.saw(budget, len(self.row.new) - before, time.perf_counter() - began)
        finally:
            self.draft.close()
            self.cache.close()

    def _prefill(self) -> torch.Tensor:
        """The prompt through the target; returns ``[V]`` logits for the next token."""
        assert self.row.cache is not None
        check_unread(self.row.cache, len(self.row.text))
        past = self.cache.length
        output = self.cache.read(self.row.text)
        self.stats.target_forwards += 1
        # a draft of its own reads the whole text; one that lives on the target's states, what the target read just now
        start = past if self.draft.uses_features else 0
        self.draft.commit(self.row.text[start:], start)
        logits: torch.Tensor = output["logits"]
        return logits[0, -1, : self.vocab].float()

    def _verify_forward(self, tree: TokenTree) -> torch.Tensor:
        """All nodes through the target in one forward: ``[n, V]`` logits after each node's path."""
        past = self.cache.length
        self.cache.mark()
        if len(tree) == 1:
            output = self.cache.read(self.row.text)
        else:
            allowed = None
            if self.branches:
                allowed = torch.ones(len(tree), past + len(tree), dtype=torch.bool)
                allowed[:, past:] = tree.ancestor_mask()
            output = self.cache.read_tree(tree.tokens, tree.depths, allowed)
        self.stats.target_forwards += 1
        logits: torch.Tensor = output["logits"]
        return logits[0, :, : self.vocab].float()

    # -- growing -------------------------------------------------------------------------------------------------------
    def _grow(self, budget: int, room: int) -> TokenTree:
        """The tree for this round; ``room`` bounds its depth."""
        tree = TokenTree()
        tree.add(self.row.text[-1], -1, 1.0)
        room = int(min(room, self.cache.room(len(self.row.text)), self.draft.room(len(self.row.text))))
        if budget == 0 or room <= 0:
            return tree
        depth = min(self.decoder.max_depth, room)
        return self.decoder.grow(tree, lambda nodes: self._expand(tree, nodes), budget, depth, self.row.do_sample)

    def _expand(self, tree: TokenTree, nodes: list[int]) -> Candidates:
        """Draft candidates after each of ``nodes`` (one draft forward): tokens and probabilities, in drawing order."""
        self.stats.draft_forwards += 1
        reduced = not self.row.do_sample and self.path_free and self.row.matcher is None
        # processors that remember the text are not asked about drafts: any draft distribution gives the target's text
        logits = self.draft.forward(tree, nodes, reduced)
        width = min(self.decoder.max_children, self.decoder.budget) if self.branches else 1
        if reduced:  # greedy: the ranking needs no full-size distribution
            top = torch.softmax(logits, -1).topk(min(width, logits.shape[-1]), -1)
            tokens = self.draft.token_ids[top.indices] if self.draft.token_ids is not None else top.indices
            return list(zip(tokens.tolist(), top.values.tolist(), strict=True))
        paths = [tree.path(node) for node in nodes]
        scores = self._process(self._masked(logits, paths), [self.row.text + path for path in paths])
        dists = torch.softmax(scores, -1).nan_to_num(0.0)  # no token at all where all are forbidden to the draft
        if not self.row.do_sample:
            top = dists.topk(min(width, dists.shape[-1]), -1)
            kept = (top.values > 0).sum(-1).tolist()  # a matcher may leave fewer tokens than that
            rows = zip(top.indices.tolist(), top.values.tolist(), kept, strict=True)
            return [(tokens[:count], probs[:count]) for tokens, probs, count in rows]
        for node, dist in zip(nodes, dists, strict=True):
            tree.dists[node] = dist
        # Gumbel top-k: the order in which y ~ R would be drawn one by one without replacement
        noise = -torch.empty_like(dists).exponential_().log()
        keys = torch.where(dists > 0, dists.log() + noise, -torch.inf)
        order = keys.topk(min(width, dists.shape[-1]), -1).indices
        probs = dists.gather(-1, order).tolist()
        candidates = []
        for tokens, chances in zip(order.tolist(), probs, strict=True):
            pairs = [(token, prob) for token, prob in zip(tokens, chances, strict=True) if prob > 0]
            candidates.append(([token for token, _ in pairs], [prob for _, prob in pairs]))
        return candidates

    def _masked(self, logits: torch.Tensor, paths: list[list[int]]) -> torch.Tensor:
        """Logits ``[n, V]`` without what the matcher forbids after each path below the text; the matcher ends where it
        began."""
        if self.row.matcher is None:
            return logits
        logits = logits.clone()
        for row, path in enumerate(paths):
            taken = 0
            for token in path:
                if self.row.matcher.is_terminated() or not self.row.matcher.accept_token(token):
                    break
                taken += 1
            if taken == len(path):
                fill_mask(self.row.matcher, logits[row])
            if taken:
                self.row.matcher.rollback(taken)
        return logits

    def _process(self, logits: torch.Tensor, texts: list[list[int]]) -> torch.Tensor:
        """Logits processors on ``[n, V]`` rows, each with its own text (rows of equal length share a call)."""
        processors = self.row.stateless
        if not processors:
            return logits
        if self.path_free:
            return processors(torch.tensor([texts[0]], device=self.device).expand(len(texts), -1), logits)
        scores = torch.empty_like(logits)
        by_length: dict[int, list[int]] = {}
        for row, text in enumerate(texts):
            by_length.setdefault(len(text), []).append(row)
        for rows in by_length.values():
            ids = torch.tensor([self.row.padding + texts[row] for row in rows], device=self.device)
            scores[rows] = processors(ids, logits[rows])
        return scores

    # -- verification --------------------------------------------------------------------------------------------------
    def _walk(self, tree: TokenTree, logits: torch.Tensor, turn: int) -> bool:
        """Accepts a path, commits it and the bonus token, and keeps the cache rows of the path only."""
        past = self.cache.length - len(tree)
        path, node, stop = [0], 0, False
        greedy = None
        if not self.row.do_sample and self.path_free and self.row.matcher is None:
            greedy = (
                (self._process(logits, [self.row.text] * len(tree)) if self.row.processors else logits)
                .argmax(-1)
                .tolist()
            )
        while not stop:
            scores = self.row.processed(logits[node]) if greedy is None or self.row.scores is not None else logits[node]
            if greedy is None and self.row.do_sample:
                child, chosen = self._accept(tree, node, torch.softmax(scores, -1))
            else:
                chosen = int(scores.argmax()) if greedy is None else greedy[node]
                child = next((kid for kid in tree.children[node] if tree.tokens[kid] == chosen), None)
            source = "target" if child is None else "draft"
            prob = tree.probs[child] if child is not None else None
            value = tree.values[child] if child is not None else None
            stop = self.row.append(
                chosen, scores, logits[node], round=turn, depth=len(path), draft_prob=prob, source=source, value=value
            )
            if child is None:
                break
            self.stats.accepted += 1
            if not stop:
                path.append(child)
            node = child
        # the last token of the text is the next root: it has no cache row yet
        if self.branches:
            self.cache.keep(path)
        elif not self.cache.back(len(path)):  # a recurrent state goes back to before the drafts: read what is accepted
            self.cache.read(self.row.text[: past + len(path)])
            self.stats.target_forwards += 1
        committed = self.row.text[past + 1 :]
        if not stop:
            self.draft.commit(committed, past + 1, path)
        return stop

    def _accept(self, tree: TokenTree, node: int, target: torch.Tensor) -> tuple[int | None, int]:
        """Speculative sampling over the children of ``node``; returns ``(child or None, token)``."""
        draft = tree.dists.get(node)
        for child in tree.children[node]:
            token = tree.tokens[child]
            assert draft is not None
            ratio = target[token] / draft[token]
            if torch.rand((), device=target.device) < ratio:
                return child, token
            residual = (target - draft).clamp(min=0)
            total = residual.sum()
            target = residual / total if total > 0 else target
            draft = draft.clone()
            draft[token] = 0
            left = draft.sum()
            if left <= 0:
                break
            draft = draft / left
        return None, int(torch.multinomial(target, 1))

    def _commit_first(self, logits: torch.Tensor) -> bool:
        """The first token after the prompt, straight from the target."""
        scores = self.row.processed(logits)
        token = self.row.choose(scores)
        stop = self.row.append(token, scores, logits, round=0, depth=0, source="target")
        if not stop:
            self.draft.commit([token], len(self.row.text) - 1)
        return stop
