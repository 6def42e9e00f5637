"""DySpec: speculative decoding with a token tree that grows where the draft is sure (arXiv 2410.11744).

One forward of the target can check many drafted continuations at once, laid out as a tree. Which tree? DySpec estimates the
chance that a node is accepted by the product of draft probabilities along its path and grows the tree greedily by that value.
A *slot* is an open place for one more child of a node: it has a value ``v`` (the chance that verification comes to test it)
and the residual distribution ``R`` (the draft's, without the siblings already there). Filling a slot with ``y ~ R`` opens two::

    child slot of y:    v0 = v R[y]          (verification accepts y and moves on)
    next sibling slot:  v1 = v (1 - R[y])    (verification rejects y and tries again)

Fixed size: always fill the slot of largest value, ``budget`` times. Threshold: layer by layer, fill every slot with
``v > threshold`` (about 1/budget), one draft forward a layer.

Verification walks down from the root with the target's distribution T and the draft's D. A child y is accepted with
probability ``min(1, T[y] / D[y])``; on rejection ``T <- norm(max(T - D, 0))`` and ``D[y] <- 0, D <- norm(D)``. When no child
is left the next token is drawn from T. The output has exactly the target's distribution, for any draft and any tree, because
a slot's value never looks at the token that will fill it. In greedy decoding the child equal to arg-max T is accepted, the
output is the target's own greedy text, and (as nothing random has to be protected there) nodes are ranked by the value
``v R[y]`` of the node itself, which maximises the expected number of accepted tokens among all trees of that size.

Two choices of ours, both without influence on the result: draft forwards of the fixed-size tree are batched, by looking ahead
at every slot that may still be filled; and each round starts by running the draft over the tokens just committed, so a draft
that reads the target's hidden states (``drafts.FeatureDraftForCausalLM``) gets the true ones.
"""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..core.errors import BadInputError
from ..core.trace import TokenTrace
from .base import (
    Decoder,
    DecodingStats,
    check_croppable,
    check_prompt,
    check_same_vocabulary,
    refuse_unsupported,
)

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


@dataclass
class DySpecOutput(GenerateDecoderOnlyOutput):
    """``generate``'s usual output plus ``stats`` (DecodingStats) and ``trace`` (a TokenTrace per row, or None)."""

    stats: Any = None
    trace: Any = None


@dataclass
class TokenTree:
    """A drafted tree. Node 0 is the root (the last committed token); children come after their parents.

    Attributes:
        tokens, parents, depths: one entry a node.
        probs: draft probability of the node's token given its path (1 for the root).
        values: the node's estimated chance of acceptance, the product of ``probs`` along its path.
        children: node ids in the order in which they were drawn.
        dists: ``[V]`` draft distribution after each node, for nodes where it was computed (needed to verify samples).
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    children: list[list[int]] = field(default_factory=list)
    dists: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(self, token: int, parent: int, prob: float) -> int:
        """Appends a node and returns its index; the root has parent -1."""
        node = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1 if parent >= 0 else 0)
        self.probs.append(prob)
        self.values.append(self.values[parent] * prob if parent >= 0 else 1.0)
        self.children.append([])
        if parent >= 0:
            self.children[parent].append(node)
        return node

    def __len__(self) -> int:
        return len(self.tokens)

    def path(self, node: int) -> list[int]:
        """Tokens from below the root down to ``node``."""
        tokens = []
        while node > 0:
            tokens.append(self.tokens[node])
            node = self.parents[node]
        return tokens[::-1]

    def ancestor_mask(self) -> torch.Tensor:
        """``[n, n]`` bool: row i sees itself and its ancestors."""
        mask = torch.eye(len(self), dtype=torch.bool)
        for node in range(1, len(self)):
            mask[node] |= mask[self.parents[node]]
        return mask


@dataclass
class DySpec(Decoder):
    """Lossless speculative decoding with a dynamic token tree.

    Args:
        draft_model: a small causal language model with the target's tokenizer, or a ``FeatureDraftForCausalLM``. None is only
            allowed for the embedded target, whose draft ships with the package.
        budget: nodes of the tree, at most. 0 is plain decoding, 1 one speculated token.
        threshold: None grows the fixed-size tree; a number grows layer by layer all slots above it (1/budget is a good
            start) with fewer draft forwards.
        max_depth: longest drafted path.
        max_children: drafted alternatives considered per node.

    Rows of a batch are decoded one after the other, each with its own tree and cache.
    """

    draft_model: PreTrainedModel | None = None
    budget: int = 16
    threshold: float | None = None
    max_depth: int = 12
    max_children: int = 8

    def __post_init__(self) -> None:
        if self.budget < 0 or self.max_depth < 1 or self.max_children < 1:
            raise BadInputError(
                f"DySpec needs budget >= 0, max_depth >= 1 and max_children >= 1; got {self.budget}, {self.max_depth}, "
                f"{self.max_children}."
            )
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise BadInputError(
                f"threshold is a probability between 0 and 1; got {self.threshold}.", "Try 1 / budget."
            )

    def grow(self, tree: TokenTree, expand: Any, budget: int, max_depth: int, sampling: bool) -> TokenTree:
        """Grows a round's tree; override it for another shape (see ``grow_tree`` for the arguments)."""
        return grow_tree(tree, expand, budget, self.threshold, max_depth, sampling)

    @torch.inference_mode()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: Any = None,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> DySpecOutput | torch.Tensor:
        """Decodes as ``generate`` would; see ``Decoder``.

        Raises:
            BadInputError: empty or too long prompt, or a generation mode that a tree cannot honour.
            TokenizerMismatchError: draft and target have different vocabularies.
            UnsupportedModelError: the model's cache cannot drop rejected tokens.
        """
        start = time.perf_counter()
        config = generation_config if generation_config is not None else model.generation_config
        refuse_unsupported("DySpec", config, synced_gpus)
        mask = model_kwargs.get("attention_mask")
        check_prompt(model, input_ids.shape[1], config.max_length)
        if self.draft_model is None:
            from .drafts import load_draft

            self.draft_model = load_draft(model)
        vocab = check_same_vocabulary(model, self.draft_model)
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            check_croppable("DySpec", cache)
        rows = input_ids.shape[0]
        if rows > 1 and cache is not None and cache.get_seq_length() > 0:
            raise BadInputError("DySpec continues a filled cache for one row only.", "Pass the rows one at a time.")
        if rows > 1 and streamer is not None:
            raise BadInputError("A streamer follows one row only.", "Decode one prompt at a time.")
        self.stats, self.trace = DecodingStats(), []
        results = []
        for row in range(rows):
            ids = input_ids[row]
            if mask is not None:
                keep = mask[row, -ids.shape[0] :].bool()
                if not bool(keep[keep.int().argmax() :].all()):
                    raise BadInputError("Padding must be on the left.", "Set padding_side='left' on the tokenizer.")
                padding = ids[~keep]
                ids = ids[keep]
                if ids.numel() == 0:
                    raise BadInputError(f"Row {row} of the batch is empty.", "Give at least one token.")
            else:
                padding = ids[:0]
            run = _Row(
                self,
                model,
                ids,
                padding,
                vocab,
                LogitsProcessorList(logits_processor or []),
                StoppingCriteriaList(stopping_criteria or []),
                bool(config.do_sample),
                cache if rows == 1 and cache is not None else DynamicCache(),
                streamer,
                bool(config.return_dict_in_generate and config.output_scores),
                bool(config.return_dict_in_generate and config.output_logits),
                config.max_length,
            )
            results.append(run.decode())
        if streamer is not None:
            streamer.end()
        self.stats.seconds = time.perf_counter() - start
        self.stats.new_tokens = sum(len(result.new) for result in results)
        return self._collect(results, input_ids, config)

    def _collect(self, results: list[_Row], input_ids: torch.Tensor, config: Any) -> DySpecOutput | torch.Tensor:
        """Pads the rows' new tokens to one tensor and wraps what was asked for."""
        pad = getattr(config, "_pad_token_tensor", None)
        pad_id = int(pad) if pad is not None else (config.pad_token_id or 0)
        longest = max(len(result.new) for result in results)
        new = torch.full((len(results), longest), pad_id, dtype=input_ids.dtype, device=input_ids.device)
        for row, result in enumerate(results):
            new[row, : len(result.new)] = torch.tensor(result.new, dtype=input_ids.dtype)
        sequences = torch.cat([input_ids, new], dim=1)
        if not config.return_dict_in_generate:
            return sequences

        def stacked(name: str) -> tuple[torch.Tensor, ...] | None:
            columns = [getattr(result, name) for result in results]
            if columns[0] is None:
                return None
            return tuple(
                torch.stack([column[min(step, len(column) - 1)] for column in columns]) for step in range(longest)
            )

        return DySpecOutput(
            sequences=sequences,
            scores=stacked("scores"),
            logits=stacked("logits"),
            past_key_values=results[0].cache if len(results) == 1 else None,
            stats=self.stats,
            trace=self.trace or None,
        )


class _Row:
    """Decoding of one prompt: target cache, draft, and the rounds."""

    def __init__(
        self,
        decoder: DySpec,
        model: PreTrainedModel,
        ids: torch.Tensor,
        padding: torch.Tensor,
        vocab: int,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        do_sample: bool,
        cache: Any,
        streamer: Any,
        keep_scores: bool,
        keep_logits: bool,
        max_length: int | None,
    ):
        self.decoder, self.model, self.vocab, self.cache = decoder, model, vocab, cache
        self.device, self.do_sample, self.streamer = ids.device, do_sample, streamer
        self.processors, self.criteria = processors, criteria
        self.path_free = all(isinstance(item, PATH_FREE) for item in processors)
        self.text = ids.tolist()
        self.padding = padding.tolist()  # stopping criteria count padded length, as in generate
        self.new: list[int] = []
        self.scores: list[torch.Tensor] | None = [] if keep_scores else None
        self.logits: list[torch.Tensor] | None = [] if keep_logits else None
        self.max_length = max_length
        self.columns: dict[str, list[Any]] = {"round": [], "depth": [], "draft_prob": [], "source": [], "value": []}
        self.additive_mask = getattr(model.config, "_attn_implementation", None) == "eager"
        self.draft = _Draft(decoder.draft_model, model, vocab)

    # -- the loop --------------------------------------------------------------------------------------------------------
    def decode(self) -> _Row:
        stats = self.decoder.stats
        try:
            logits = self._prefill()
            done = self._commit_first(logits[0])
            turn = 1
            while not done:
                # a tree deeper than the room left would only be thrown away
                room = (self.max_length or 1 << 30) - len(self.padding) - len(self.text) - 1
                tree = self._grow(min(self.decoder.budget, 1 << 30 if room > 0 else 0), room)
                logits = self._verify_forward(tree)
                stats.rounds += 1
                stats.proposed += len(tree) - 1
                done = self._walk(tree, logits, turn)
                turn += 1
        finally:
            self.draft.close()
        if self.decoder.trace_enabled:
            start = len(self.text) - len(self.new)
            self.decoder.trace.append(TokenTrace(self.text[start:], columns=self.columns, station="generation"))
        return self

    def _prefill(self) -> torch.Tensor:
        """The prompt through the target; returns ``[1, V]`` logits for the next token."""
        past = self.cache.get_seq_length()
        if past >= len(self.text):
            raise BadInputError("The cache already holds the whole prompt.", "Pass at least one token beyond the cache.")
        fresh = torch.tensor([self.text[past:]], device=self.device)
        positions = torch.arange(past, len(self.text), device=self.device)[None]
        output = self.model(
            input_ids=fresh, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        check_croppable("DySpec", self.cache)
        self.decoder.stats.target_forwards += 1
        self.draft.commit(self.text[past:], past)
        return output.logits[0, -1:, : self.vocab].float()

    def _verify_forward(self, tree: TokenTree) -> torch.Tensor:
        """All nodes through the target in one forward: ``[n, V]`` logits after each node's path."""
        past = self.cache.get_seq_length()
        positions = torch.tensor([tree.depths], device=self.device) + past
        mask = None
        if len(tree) > 1:
            mask = torch.ones(len(tree), past + len(tree), dtype=torch.bool)
            mask[:, past:] = tree.ancestor_mask()
            mask = mask[None, None].to(self.device)
            if self.additive_mask:
                lowest = torch.finfo(self.model.dtype).min
                mask = torch.zeros(mask.shape, dtype=self.model.dtype, device=self.device).masked_fill(~mask, lowest)
        output = self.model(
            input_ids=torch.tensor([tree.tokens], device=self.device),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.decoder.stats.target_forwards += 1
        return output.logits[0, :, : self.vocab].float()

    # -- growing ---------------------------------------------------------------------------------------------------------
    def _grow(self, budget: int, room: int) -> TokenTree:
        """The tree for this round; ``room`` bounds its depth."""
        tree = TokenTree()
        tree.add(self.text[-1], -1, 1.0)
        if budget == 0:
            return tree
        depth = min(self.decoder.max_depth, room)
        return self.decoder.grow(tree, lambda nodes: self._expand(tree, nodes), budget, depth, self.do_sample)

    def _expand(self, tree: TokenTree, nodes: list[int]) -> list[tuple[list[int], list[float]]]:
        """Draft candidates after each of ``nodes`` (one draft forward): tokens and probabilities, in drawing order."""
        self.decoder.stats.draft_forwards += 1
        reduced = not self.do_sample and self.path_free
        logits = self.draft.forward(tree, nodes, reduced)
        width = min(self.decoder.max_children, self.decoder.budget)
        if reduced:  # greedy: the ranking needs no full-size distribution
            top = torch.softmax(logits, -1).topk(min(width, logits.shape[-1]), -1)
            tokens = self.draft.token_ids[top.indices] if self.draft.token_ids is not None else top.indices
            return list(zip(tokens.tolist(), top.values.tolist(), strict=True))
        scores = self._process(logits, [self.text + tree.path(node) for node in nodes])
        dists = torch.softmax(scores, -1)
        if not self.do_sample:
            top = dists.topk(min(width, dists.shape[-1]), -1)
            return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
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

    def _process(self, logits: torch.Tensor, texts: list[list[int]]) -> torch.Tensor:
        """Logits processors on ``[n, V]`` rows, each with its own text (rows of equal length share a call)."""
        if not self.processors:
            return logits
        if self.path_free:
            return self.processors(torch.tensor([texts[0]], device=self.device).expand(len(texts), -1), logits)
        scores = torch.empty_like(logits)
        by_length: dict[int, list[int]] = {}
        for row, text in enumerate(texts):
            by_length.setdefault(len(text), []).append(row)
        for rows in by_length.values():
            ids = torch.tensor([self.padding + texts[row] for row in rows], device=self.device)
            scores[rows] = self.processors(ids, logits[rows])
        return scores

    # -- verification ----------------------------------------------------------------------------------------------------
    def _walk(self, tree: TokenTree, logits: torch.Tensor, turn: int) -> bool:
        """Accepts a path, commits it and the bonus token, and keeps the cache rows of the path only."""
        past = self.cache.get_seq_length() - len(tree)
        path, node, stop = [0], 0, False
        greedy = None
        if not self.do_sample and self.path_free:
            greedy = (self._process(logits, [self.text] * len(tree)) if self.processors else logits).argmax(-1).tolist()
        while not stop:
            text = self.text
            if greedy is not None:
                chosen = greedy[node]
                child = next((kid for kid in tree.children[node] if tree.tokens[kid] == chosen), None)
            else:
                scores = self._process(logits[node : node + 1], [text])[0]
                if self.do_sample:
                    child, chosen = self._accept(tree, node, torch.softmax(scores, -1))
                else:
                    chosen = int(scores.argmax())
                    child = next((kid for kid in tree.children[node] if tree.tokens[kid] == chosen), None)
            if self.scores is not None:
                self.scores.append(self._process(logits[node : node + 1].clone(), [text])[0])
            if self.logits is not None:
                self.logits.append(logits[node])
            source = "target" if child is None else "draft"
            prob = tree.probs[child] if child is not None else None
            value = tree.values[child] if child is not None else None
            stop = self._append(chosen, turn, len(path), source, prob, value)
            if child is None:
                break
            self.decoder.stats.accepted += 1
            if not stop:
                path.append(child)
            node = child
        # the last token of the text is the next root: it has no cache row yet
        self._keep_rows(past, path)
        committed = self.text[past + 1 :]
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
        scores = self._process(logits[None].clone(), [self.text])[0]
        token = int(torch.multinomial(torch.softmax(scores, -1), 1)) if self.do_sample else int(scores.argmax())
        if self.scores is not None:
            self.scores.append(scores)
        if self.logits is not None:
            self.logits.append(logits)
        stop = self._append(token, 0, 0, "target", None, None)
        if not stop:
            self.draft.commit([token], len(self.text) - 1)
        return stop

    def _append(
        self, token: int, turn: int, depth: int, source: str, prob: float | None, value: float | None
    ) -> bool:
        """Adds a token to the text and says whether a stopping criterion is met."""
        self.text.append(token)
        self.new.append(token)
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))
        if self.decoder.trace_enabled:
            for name, entry in zip(self.columns, (turn, depth, prob, source, value), strict=True):
                self.columns[name].append(entry)
        ids = torch.tensor([self.padding + self.text], device=self.device)
        return bool(self.criteria(ids, None).all())

    def _keep_rows(self, past: int, path: list[int]) -> None:
        """Moves the cache rows of the accepted path behind the first ``past`` rows and drops the others."""
        length = self.cache.get_seq_length()
        if path != list(range(len(path))):
            index = torch.tensor(path, device=self.device) + past
            for layer in self.cache.layers:
                layer.keys[:, :, past : past + len(path)] = layer.keys[:, :, index]
                layer.values[:, :, past : past + len(path)] = layer.values[:, :, index]
        drop = length - past - len(path)
        if drop:
            self.cache.crop(-drop)


def grow_tree(
    tree: TokenTree,
    expand: Any,
    budget: int,
    threshold: float | None = None,
    max_depth: int = 1 << 30,
    sampling: bool = False,
) -> TokenTree:
    """Grows ``tree`` (a root) to ``budget`` more nodes at most.

    Args:
        expand: ``list of nodes -> list of (tokens, probs)``: the draft's candidates after each node, in drawing order (sampled
            without replacement, or by falling probability); ``probs`` are under the full draft distribution.
        threshold: None for the fixed-size tree, or the least slot value to fill.
        sampling: rank open slots by the slot's own value (which must not depend on the token that will fill it); otherwise
            by the value of the node that would fill it.
    """
    return (_grow_layers if threshold is not None else _grow_greedy)(
        tree, expand, budget, threshold or 0.0, max_depth, sampling
    )


def _grow_greedy(
    tree: TokenTree, expand: Any, budget: int, _threshold: float, max_depth: int, sampling: bool
) -> TokenTree:
    """Best-first growth. Heap entries are slots ``(-priority, node, sibling rank, slot value)``."""
    drawn: dict[int, tuple[list[int], list[float]]] = {}
    heap: list[tuple[float, int, int, float]] = [(-1.0, 0, 0, 1.0)]
    left = budget
    while heap and left > 0:
        priority, node, rank, slot = heapq.heappop(heap)
        if tree.depths[node] >= max_depth:
            continue
        if node not in drawn:
            # One forward serves this node and every other one that is likely to be filled: those among the best `left`
            # open slots. Looking ahead changes which forwards share a batch, never which slot is filled next.
            waiting = [entry for entry in heapq.nsmallest(left, heap) if entry[1] not in drawn and entry[2] == 0]
            ahead = [entry[1] for entry in waiting if entry[0] < 0.25 * priority and tree.depths[entry[1]] < max_depth]
            nodes = [node, *ahead]
            for item, candidates in zip(nodes, expand(nodes), strict=True):
                drawn[item] = candidates
        tokens, probs = drawn[node]
        if rank >= len(tokens):
            continue
        gain = tree.values[node] * probs[rank]
        if not sampling and -priority > gain and heap and -heap[0][0] > gain:
            # the priority was only a bound (the draft had not been asked yet): put the slot back with its true value
            heapq.heappush(heap, (-gain, node, rank, slot))
            continue
        child = tree.add(tokens[rank], node, probs[rank])
        left -= 1
        mass = 1.0 - sum(probs[:rank])  # what is left of D before this draw; R[y] = D[y] / mass
        accepted = slot * probs[rank] / mass if mass > 0 else slot
        if sampling:
            heapq.heappush(heap, (-accepted, child, 0, accepted))
            heapq.heappush(heap, (-max(slot - accepted, 0.0), node, rank + 1, max(slot - accepted, 0.0)))
        else:
            heapq.heappush(heap, (-gain, child, 0, gain))
            if rank + 1 < len(tokens):
                heapq.heappush(heap, (-tree.values[node] * probs[rank + 1], node, rank + 1, slot))
    return tree


def _grow_layers(
    tree: TokenTree, expand: Any, budget: int, threshold: float, max_depth: int, sampling: bool
) -> TokenTree:
    """Layer by layer: one call of ``expand`` for all nodes of a layer whose slot value passes the threshold."""
    layer: list[tuple[int, float]] = [(0, 1.0)]
    left, depth = budget, 0
    while layer and left > 0 and depth < max_depth:
        nodes = [node for node, _ in layer]
        following: list[tuple[int, float]] = []
        candidates = dict(zip(nodes, expand(nodes), strict=True))
        heap = []
        for node, slot in layer:
            tokens, probs = candidates[node]
            first = slot if sampling else (tree.values[node] * probs[0] if tokens else 0.0)
            heap.append((-first, node, 0, slot))
        heapq.heapify(heap)
        while heap and left > 0:
            priority, node, rank, slot = heapq.heappop(heap)
            tokens, probs = candidates[node]
            if rank >= len(tokens) or -priority <= threshold:
                continue
            child = tree.add(tokens[rank], node, probs[rank])
            left -= 1
            mass = 1.0 - sum(probs[:rank])
            accepted = slot * probs[rank] / mass if mass > 0 else slot
            if sampling:
                rest = max(slot - accepted, 0.0)
                heapq.heappush(heap, (-rest, node, rank + 1, rest))
            else:
                accepted = tree.values[child]
                if rank + 1 < len(tokens):
                    heapq.heappush(heap, (-tree.values[node] * probs[rank + 1], node, rank + 1, slot))
            if accepted > threshold:
                following.append((child, accepted))
        layer, depth = following, depth + 1
    return tree


class _Draft:
    """The draft's side: its cache of committed text, and forwards over tree nodes.

    The cache holds the committed text (root included) and, during a round, the tree nodes already run, in ``self.rows``.
    ``commit`` drops those and remembers the new text; the next forward runs it first.
    """

    def __init__(self, draft: Any, target: PreTrainedModel, vocab: int):
        from .drafts.modeling_feature_draft import FeatureDraftForCausalLM, FeatureTap

        self.model, self.vocab = draft, vocab
        self.uses_features = isinstance(draft, FeatureDraftForCausalLM)
        self.tap = FeatureTap(target, draft.config.feature_layers) if self.uses_features else None
        if self.uses_features and (draft._head is None or draft._target[0] is not target):
            draft.attach(target)
        self.token_ids = draft.draft_token_ids.long() if self.uses_features else None
        self.cache = DynamicCache()
        self.device = target.device
        self.pending: list[int] = []
        self.pending_features: torch.Tensor | None = None
        self.carry: torch.Tensor | None = None  # target features of the last verified position
        self.base = 0  # cache rows of committed text
        self.offset: int | None = None  # position of the first cached token (a reused target cache may hide earlier ones)
        self.rows: dict[int, int] = {}
        self.states: dict[int, torch.Tensor] = {}
        self.additive_mask = getattr(draft.config, "_attn_implementation", None) == "eager"

    def close(self) -> None:
        if self.tap is not None:
            self.tap.remove()

    def commit(self, tokens: list[int], position: int, path: list[int] | None = None) -> None:
        """Tells the draft of new text that starts at ``position``; ``path`` are the tree nodes whose features are known."""
        if self.offset is None:
            self.offset = position
        drop = self.cache.get_seq_length() - self.base if self.base else 0
        if drop > 0:
            self.cache.crop(-drop)
        self.rows, self.states = {}, {}
        if self.uses_features:
            self._commit_features(tokens, path)
        self.pending += tokens

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
        ids = torch.tensor([[tree.tokens[node] for node in nodes]], device=self.device)
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
        if mask is not None and self.additive_mask and not self.uses_features:
            lowest = torch.finfo(self.model.dtype).min
            mask = torch.zeros(mask.shape, dtype=self.model.dtype, device=self.device).masked_fill(~mask, lowest)
        if self.uses_features:
            kwargs["reduced_logits"] = reduced
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=len(nodes),
            **kwargs,
        )
        if self.uses_features:
            for node, state in zip(nodes, output.hidden_states[0][0, -len(nodes) :], strict=True):
                self.states[node] = state
        logits = output.logits[0, -len(nodes) :].float()
        return logits if reduced and self.uses_features else logits[:, : self.vocab]
