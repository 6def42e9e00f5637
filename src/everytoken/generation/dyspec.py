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

Choices of ours, none of which changes the result:

- Sampling proposes the draft's likeliest tokens by default. Verification then follows the target's own sample wherever
  it is in the tree, and the same ranking serves that is best in greedy decoding. ``drawn=True`` is the paper's way.
- Nodes also come from the text itself (``speculative.matches``): how it went on before, after words like the last ones.
  They need no draft model, so ``DySpec()`` works with any target, and they cost no forward. Beside a draft a token that
  both propose is one node.
- Of the grown tree those nodes are kept that pay for themselves (``speculative.worth``), perhaps none.
- Draft forwards of the fixed-size tree are batched, by looking ahead at every slot that may still be filled.
- Each round starts by running the draft over the tokens just committed, so a draft that reads the target's hidden
  states (``FeatureDraftForCausalLM``) gets the true ones.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from ..core.converted import check_model_name
from ..core.errors import BadInputError
from ..core.pace import Pace, RunningCurve
from ..core.settings import check_file
from ..decoding.base import BY_NAME, Decoder, Example
from ..decoding.call import DecodingCall
from ..decoding.checks import check_decoder_only, check_same_vocabulary, check_unread
from ..decoding.inputs import check_flex, check_reads_text
from ..decoding.lean import LeanRowCache, row_cache
from ..decoding.matcher import Matcher
from ..decoding.row import DecodingRow
from ..decoding.row_cache import check_cached, check_rewindable
from .speculative import check_draft_ships, check_feature_target, find_draft, load_draft, load_named_draft
from .speculative.drafting import draft_share
from .speculative.matches import Corpus, TextMatches, corpus_tokens
from .speculative.proposals import Proposals, process
from .speculative.sessions import draft_session
from .speculative.trees import Expand, TokenTree, grow_tree
from .speculative.worth import Cost, Worth, default_cost
from .tree_shapes import TreeShape

TEXT = "text"
"""As ``draft_model``: text alone proposes."""
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


WARM = 2
"""Rounds of a model's first text that draft nothing, to measure a plain step."""
WIDTHS = (3, 7)
"""Budgets that are tried beside none and the one that was asked for."""
_paces: WeakKeyDictionary[PreTrainedModel, dict[tuple[Any, ...], Pace]] = WeakKeyDictionary()
_curves: WeakKeyDictionary[PreTrainedModel, dict[tuple[Any, ...], tuple[RunningCurve, RunningCurve]]] = (
    WeakKeyDictionary()
)


@dataclass
class DySpec(Decoder):
    """Lossless speculative decoding with a dynamic token tree.

    Args:
        draft_model: a small causal language model with the target's tokenizer, a ``FeatureDraftForCausalLM``, or the
            hub id or folder of either. None takes the draft that ``everytoken train dyspec`` trained for this model,
            or that ships for it; where there is none, and for ``"text"``, text alone proposes.
        budget: nodes of the tree, at most. 0 is plain decoding, 1 one speculated token. Choose it from the cost of a
            target forward over so many tokens (16 suits a small model on a CPU, 64 a 7B model on a GPU).
        threshold: a number grows layer by layer all slots above it, with one draft forward a layer (the paper: about
            1/budget), and keeps of these nodes what pays; None grows the paper's fixed-size tree from the draft model
            alone, always full, which needs more draft forwards.
        max_depth: longest drafted path.
        adaptive: choose by the clock. The text stays the same, and which tokens were drafted may differ from run to
            run. Where the target has a compiled forward (``load_model(weights="int4")``), what its rounds cost by the
            size of their trees is measured while it decodes, and trees hold what pays by that curve, in sampling too:
            there a tree changes no bit of the target's logits. Elsewhere several budgets up to this one are tried, none
            among them, and the fastest is used; greedy decoding only, as a sample would not be the same for the same
            seed. None: where the target has a compiled forward.
        max_children: drafted alternatives considered per node.
        drawn: when sampling, draw the nodes from the draft's distribution, as the paper does, and correct for it.
            Otherwise the likeliest tokens are proposed, and verification follows the target's own sample: the
            distribution is the same, and so is plain sampling's text from the same seed.
        text_nodes: propose how the text went on before after words like the last ones.
        corpus: texts to search as well: a file, texts, or the tokens of texts. Texts need the tokenizer:
            ``DySpec(corpus=...).prepare(tokenizer, vocab_size)``.
        cost: what a target forward over n tokens costs, in any unit: ``cost(n)``. None takes ``model.forward_cost``,
            which was measured on this machine (``core.choosing.load_fastest``), or else a straight line
            (``speculative.worth.default_cost``). Trees that keep only what pays are made no larger, deeper or less
            sure than a given or measured cost can repay (``tree_shapes``).
        matcher: a ``Matcher`` in its initial state. Every node of the tree is masked by it, in the draft's
            distribution and in the target's, so the output has exactly the distribution of masked plain decoding.

    Rows of a batch are decoded one after the other, each with its own tree and cache. Logits processors that remember
    the text so far (``guidance_scale``, or one of the user's) see the checked tokens alone, each once and in order; the
    draft proposes without them. The draft's vocabulary may lack tokens that were added to the target: it never
    proposes them, and the target still writes them.
    """

    draft_model: Any = field(default=None, metadata=BY_NAME)
    budget: int = 16
    threshold: float | None = 0.08
    max_depth: int = 12
    max_children: int = 8
    adaptive: bool | None = None
    drawn: bool = field(default=False, kw_only=True)
    text_nodes: bool = field(default=True, kw_only=True)
    corpus: Any = field(default=None, kw_only=True, repr=False, metadata=BY_NAME)
    cost: Cost | None = field(default=None, kw_only=True, repr=False)
    matcher: Matcher | None = field(default=None, kw_only=True, repr=False)
    searched: Corpus | None = field(default=None, init=False, repr=False, compare=False)
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
        if self.draft_model == TEXT and not self.text_nodes:
            raise BadInputError("text_nodes=False leaves nothing that proposes.", "Name a draft_model.")
        if self.corpus is not None and not self.text_nodes:
            raise BadInputError("A corpus is searched for text nodes, and text_nodes=False turns them off.")
        if isinstance(self.corpus, (str, Path)):
            check_file(Path(self.corpus))
        if isinstance(self.draft_model, str) and self.draft_model != TEXT:
            check_model_name(self.draft_model)

    def load_helpers(self, model: PreTrainedModel) -> None:
        """Loads the draft that was named, or the one that is there for this model.

        Raises:
            UnsupportedModelError: there is none, and ``text_nodes`` is off.
            EverytokenError: the folder that was named holds no draft.
        """
        if self.draft_model == TEXT:
            return
        if isinstance(self.draft_model, (str, Path)):
            self.draft_model = load_named_draft(model, self.draft_model)
        elif self.draft_model is None:
            folder = find_draft(model)
            if folder is not None:
                self.draft_model = load_draft(model, folder)
            elif not self.text_nodes:
                check_draft_ships(model.config)

    def prepare(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Self:
        """Reads the corpus with the model's tokenizer; returns the decoder."""
        if self.corpus is not None:
            self.searched = Corpus(corpus_tokens(self.corpus, tokenizer))
        return self

    @property
    def drafting(self) -> PreTrainedModel | None:
        """The draft model, once it is loaded; None where text alone proposes."""
        return None if isinstance(self.draft_model, (str, Path)) else self.draft_model

    def check_call(self, call: DecodingCall[Any]) -> None:
        """Raises TokenizerMismatchError for a draft of another vocabulary, UnsupportedModelError for a target or
        draft that tokens and a cache do not suffice for, or a cache from which tokens cannot be dropped, BadInputError
        for ``drawn`` without a draft, or a corpus of texts that no tokenizer has read."""
        draft = self.drafting
        check_flex("DySpec", call.model)
        check_cached("DySpec", call.model)
        if draft is not None:
            if not check_feature_target(draft, call.model):
                check_decoder_only("DySpec's draft", draft.config)
                check_reads_text("DySpec's draft", draft, recurrent=True)
                check_cached("DySpec's draft", draft)
            check_same_vocabulary(call.model, draft)
        drawn = self.drawn and bool(call.config.do_sample)
        if draft is None and drawn:
            raise BadInputError(
                "drawn=True draws from a draft model's distribution, and there is none for this model.",
                "Leave drawn out: text nodes need no distribution. Or train a draft: everytoken train dyspec.",
            )
        if self.corpus is not None and draft is not None and (drawn or self.threshold is None):
            raise BadInputError(
                "A corpus is searched for text nodes; drawn=True and threshold=None grow the draft model's tree alone.",
                "Leave the corpus out, or those.",
            )
        if self.corpus is not None and self.searched is None:
            self.searched = Corpus(corpus_tokens(self.corpus))
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
            "text alone": Example(lambda **settings: cls(TEXT, **settings), exact=True),
            "layers": Example(lambda **settings: cls(draft, budget=6, **settings), exact=True),
            "fixed size": Example(lambda **settings: cls(draft, budget=4, threshold=None, **settings), exact=True),
            "itself as draft": Example(lambda **settings: cls(model, budget=5, **settings), exact=True),
        }


def _cost(decoder: DySpec, model: PreTrainedModel, device: str, choosy: bool) -> tuple[Cost, TreeShape]:
    """What a forward of the target costs, and the trees that can pay at that price."""
    asked = TreeShape(decoder.budget, decoder.threshold, decoder.max_depth)
    # a tree that must be the same everywhere (drawn, or always full) does not depend on what was measured here
    known = decoder.cost or (getattr(model, "forward_cost", None) if choosy else None)
    if known is None:
        return default_cost(device), asked
    return known, asked.within(known) if choosy else asked


class _Speculation:
    """Decoding of one prompt: target cache, draft, and the rounds."""

    def __init__(self, decoder: DySpec, call: DecodingCall[Any], row: DecodingRow):
        assert row.cache is not None
        self.decoder, self.row, self.model, self.stats = decoder, row, call.model, call.stats
        self.vocab = call.vocab_size
        self.cache, self.device, self.max_length = row_cache(call.model, row.cache), row.device, call.config.max_length
        self.path_free = all(type(item) in PATH_FREE for item in row.processors)
        draft = decoder.drafting
        self.draft = None if draft is None else draft_session(draft, call.model, self.vocab, self.cache)
        # where a model cannot mask a tree, one path is drafted: it needs no mask
        self.branches = self.cache.trees and (self.draft is None or self.draft.trees)
        self.drawn = row.do_sample and decoder.drawn
        self.matches = None
        self.choosy = decoder.threshold is not None and not self.drawn
        if decoder.text_nodes and (self.choosy or self.draft is None):
            self.matches = TextMatches(self.vocab, decoder.searched)
        cost, self.shape = _cost(decoder, call.model, self.device.type, self.choosy)
        self.grower = decoder
        if self.shape.threshold != decoder.threshold:
            self.grower = copy.copy(decoder)
            self.grower.threshold = self.shape.threshold
        self.curves = self._measured(decoder)
        cost = cost if self.curves is None else self.curves[0]
        if self.draft is None:
            share = 0.0
        elif self.curves is not None and self.curves[1].seconds:
            share = self.curves[1].step / self.curves[0].step
        else:
            share = draft_share(call.model, self.draft.model)
        rereads = bool(getattr(call.model, "_is_stateful", False))
        self.worth = Worth(cost, share * cost(1), rereads, self.shape.budget)
        self.worth.measured = self.curves is not None
        width = min(decoder.max_children, self.shape.budget) if self.branches else 1
        self.proposals = Proposals(
            row, self.draft, self.matches, self.worth, self.stats, self.path_free, self.drawn, self.choosy, width
        )
        self.pace = self._pace(decoder)

    def _pace(self, decoder: DySpec) -> Pace | None:
        """The measured pace of this draft with this target, which goes on from call to call; None: always draft."""
        wanted = isinstance(self.cache, LeanRowCache) if decoder.adaptive is None else decoder.adaptive
        budget = self.shape.budget
        if not wanted or self.row.do_sample or budget == 0 or self.curves is not None:
            return None
        known = _paces.setdefault(self.model, {})
        key = (id(decoder.draft_model), budget, self.shape.threshold, torch.get_num_threads())
        return known.setdefault(key, Pace((0, *(width for width in WIDTHS if width < budget), budget)))

    def _measured(self, decoder: DySpec) -> tuple[RunningCurve, RunningCurve] | None:
        """What rounds cost by the size of their trees, and what growing costs by draft forwards, as far as measured;
        None: they are not measured.

        Only a compiled target gives the same bits for every tree, so that samples cannot look at the clock either.
        """
        lean = isinstance(self.cache, LeanRowCache)
        if not lean or not self.choosy or decoder.adaptive is False or decoder.cost is not None:
            return None
        known = _curves.setdefault(self.model, {})
        return known.setdefault((id(decoder.draft_model), torch.get_num_threads()), (RunningCurve(), RunningCurve()))

    # -- the loop ------------------------------------------------------------------------------------------------------
    def decode(self) -> None:
        try:
            logits = self._prefill()
            done = self._commit_first(logits)
            turn = 1
            while not done:
                # a tree deeper than the room left would only be thrown away
                room = (self.max_length or 1 << 30) - len(self.row.padding) - len(self.row.text) - 1
                forwards, accepted = self.stats.draft_forwards, self.stats.accepted
                began, before = time.perf_counter(), len(self.row.new)
                budget = self.shape.budget if self.pace is None else self.pace.choose()
                if self.curves is not None and turn <= WARM and not self.curves[0].seconds:
                    budget = 0  # what a plain step costs
                tree = self._grow(budget, room)
                grown = time.perf_counter()
                logits = self._verify_forward(tree)
                self.stats.rounds += self.pace is None or len(tree) > 1
                self.stats.proposed += len(tree) - 1
                done = self._walk(tree, logits, turn)
                ended = time.perf_counter()
                turn += 1
                asked, came = self.stats.draft_forwards - forwards, self.stats.accepted - accepted
                if self.curves is not None and turn > WARM:
                    self._measure(len(tree), ended - grown, asked, grown - began)
                self.worth.add(len(tree) - 1, asked, sum(tree.values[1:]), came)
                if self.pace is not None and room > budget:  # a tree that was cut short says nothing about its budget
                    self.pace.saw(budget, len(self.row.new) - before, ended - began)
        finally:
            if self.draft is not None:
                self.draft.close()
            self.cache.close()

    def _measure(self, size: int, checked: float, asked: int, grown: float) -> None:
        """Takes note of the seconds of a round: to check a tree of so many nodes, and to grow it."""
        assert self.curves is not None
        trees, drafts = self.curves
        trees.saw(size, checked)
        if asked:
            drafts.saw(1, grown / asked)
            self.worth.draft_cost = drafts.step / trees.step

    def _prefill(self) -> torch.Tensor:
        """The prompt through the target; returns ``[V]`` logits for the next token."""
        assert self.row.cache is not None
        check_unread(self.row.cache, len(self.row.text))
        past = self.cache.length
        output = self.cache.read(self.row.text)
        self.stats.target_forwards += 1
        if self.matches is not None:
            self.matches.commit(self.row.text)
        if self.draft is not None:
            # a draft that reads text needs all of it; one that reads the target's states, what was read just now
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
        root = TokenTree()
        root.add(self.row.text[-1], -1, 1.0)
        reach = math.inf if self.draft is None else self.draft.room(len(self.row.text))
        room = int(min(room, self.cache.room(len(self.row.text)), reach, self.shape.depth))
        if budget == 0 or room <= 0:
            return root
        self.proposals.begin()
        # of more nodes than will be checked the best are kept, and of those what pays
        size = 2 * budget if self.choosy else budget
        tree = self.grower.grow(root, lambda nodes: self.proposals.expand(root, nodes), size, room, self.drawn)
        if not self.choosy:
            return tree
        best = tree.ranked()[:budget]
        if not best:
            return tree
        return tree.only(best[: self.worth.nodes([tree.values[node] for node in best])])

    # -- verification --------------------------------------------------------------------------------------------------
    def _walk(self, tree: TokenTree, logits: torch.Tensor, turn: int) -> bool:
        """Accepts a path, commits it and the bonus token, and keeps the cache rows of the path only."""
        past = self.cache.length - len(tree)
        path, node, stop = [0], 0, False
        greedy = None
        if not self.row.do_sample and self.path_free and self.row.matcher is None:
            greedy = (
                (process(self.row, logits, [self.row.text] * len(tree), True) if self.row.processors else logits)
                .argmax(-1)
                .tolist()
            )
        while not stop:
            scores = self.row.processed(logits[node]) if greedy is None or self.row.scores is not None else logits[node]
            if self.drawn:
                child, chosen = self._accept(tree, node, torch.softmax(scores, -1))
            else:
                chosen = self.row.choose(scores) if greedy is None else greedy[node]
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
            self._tell(committed, past + 1, path)
        return stop

    def _tell(self, tokens: list[int], position: int, path: list[int] | None = None) -> None:
        """New text for those that propose; ``path`` as for ``DraftSession.commit``."""
        if self.matches is not None:
            self.matches.commit(tokens)
        if self.draft is not None:
            self.draft.commit(tokens, position, path)

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
            self._tell([token], len(self.row.text) - 1)
        return stop
