"""Where the nodes of a round's tree come from: a draft model, the text's own repetitions, or both in one tree.

``Proposals.expand`` answers ``grow_tree``. In *ranked* trees candidates stand by falling estimated chance. Those of the
two sources are merged: a token that both propose is one node, and its chance is a mixture of both opinions. In *drawn*
trees (the paper's way to sample) candidates are drawn from the draft's distribution without replacement, and text takes
no part.
"""

from __future__ import annotations

import math

import torch
from transformers import TemperatureLogitsWarper

from ...decoding.call import DecodingStats
from ...decoding.matcher import Matcher, fill_mask
from ...decoding.row import DecodingRow
from .drafting import DraftSession
from .matches import TextMatches
from .trees import Candidates, TokenTree
from .worth import Worth

BESIDE_A_DRAFT = 0.5
"""The share of what matches in the text are believed that they keep beside a draft model's opinion."""


class Proposals:
    """Candidates for one row's trees.

    Args:
        row: the text, its processors and its matcher.
        draft: the draft model's session, or None.
        matches: the text's continuations, or None.
        path_free: whether the row's processors look at one position's scores alone.
        drawn: whether candidates are drawn.
        choosy: whether the draft is asked only where its forward can pay.
        width: candidates a node, at most.
    """

    def __init__(
        self,
        row: DecodingRow,
        draft: DraftSession | None,
        matches: TextMatches | None,
        worth: Worth,
        stats: DecodingStats,
        path_free: bool,
        drawn: bool,
        choosy: bool,
        width: int,
    ):
        self.row, self.draft, self.matches, self.worth, self.stats = row, draft, matches, worth, stats
        self.path_free, self.drawn, self.choosy, self.width = path_free, drawn, choosy, width
        self.asking = draft is not None
        # tokens beyond the draft's own vocabulary are not needed where their scores decide nothing
        self.reduced = not drawn and path_free and row.matcher is None
        warm = [item.temperature for item in row.processors if isinstance(item, TemperatureLogitsWarper)]
        self.temperature = math.prod(warm) if row.do_sample else 1.0

    def begin(self) -> None:
        """A new round."""
        self.worth.begin()
        if self.matches is not None:
            # beside a draft half of a match is believed, and it adds to what the draft thinks
            self.matches.begin(self.worth.floor if self.choosy else 0.0)
        self.asking = self.draft is not None and (not self.choosy or self.worth.rested())

    def expand(self, tree: TokenTree, nodes: list[int]) -> Candidates:
        """Candidates after each of ``nodes``: tokens and chances, in drawing order or falling.

        The draft is asked about a layer only where its forward can pay. Where it was not asked it knows nothing deeper
        either, and matches alone go on.
        """
        paths = [tree.path(node) for node in nodes]
        if self.drawn:
            return self._draw(tree, nodes, paths)
        asked = list(range(len(nodes))) if self.asking else []
        if self.asking and self.choosy and nodes != [0]:
            pays = self.worth.asks([tree.values[node] for node in nodes])
            asked = [place for place in asked if pays[place]]
            self.asking = bool(asked)
        candidates: list[tuple[list[int], list[float]] | None] = [None] * len(nodes)
        if asked:
            answers = self._ask(tree, [nodes[place] for place in asked], [paths[place] for place in asked])
            for place, answer in zip(asked, answers, strict=True):
                candidates[place] = answer
        if self.matches is None:
            return [
                ([], []) if given is None else self._paying(tree, node, given)
                for node, given in zip(nodes, candidates, strict=True)
            ]
        return [
            self._paying(tree, node, self._merged(path, given))
            for node, path, given in zip(nodes, paths, candidates, strict=True)
        ]

    def _paying(
        self, tree: TokenTree, node: int, candidates: tuple[list[int], list[float]]
    ) -> tuple[list[int], list[float]]:
        """The first candidates, as far as any can pay for itself."""
        if not self.choosy:
            return candidates
        least = self.worth.floor / tree.values[node] if tree.values[node] > 0 else math.inf
        tokens, chances = candidates
        count = sum(chance >= least for chance in chances)
        return tokens[:count], chances[:count]

    # -- the draft model -----------------------------------------------------------------------------------------------
    def _ask(self, tree: TokenTree, nodes: list[int], paths: list[list[int]]) -> Candidates:
        """The draft's likeliest tokens after each node."""
        assert self.draft is not None
        dists = self._distributions(tree, nodes, paths)
        top = dists.topk(min(self.width, dists.shape[-1]), -1)
        token_ids = self.draft.token_ids if self.reduced else None
        tokens = top.indices if token_ids is None else token_ids[top.indices]
        kept = (top.values > 0).sum(-1).tolist()  # a matcher may leave fewer tokens than that
        rows = zip(tokens.tolist(), top.values.tolist(), kept, strict=True)
        return [(tokens[:count], probs[:count]) for tokens, probs, count in rows]

    def _draw(self, tree: TokenTree, nodes: list[int], paths: list[list[int]]) -> Candidates:
        """Tokens drawn from the draft one by one without replacement; the tree keeps the distributions."""
        dists = self._distributions(tree, nodes, paths)
        for node, dist in zip(nodes, dists, strict=True):
            tree.dists[node] = dist
        # Gumbel top-k: the order in which y ~ R would be drawn
        noise = -torch.empty_like(dists).exponential_().log()
        keys = torch.where(dists > 0, dists.log() + noise, -torch.inf)
        order = keys.topk(min(self.width, dists.shape[-1]), -1).indices
        candidates = []
        for tokens, chances in zip(order.tolist(), dists.gather(-1, order).tolist(), strict=True):
            pairs = [(token, prob) for token, prob in zip(tokens, chances, strict=True) if prob > 0]
            candidates.append(([token for token, _ in pairs], [prob for _, prob in pairs]))
        return candidates

    def _distributions(self, tree: TokenTree, nodes: list[int], paths: list[list[int]]) -> torch.Tensor:
        """The draft's distribution after each node (one forward): ``[n, V]``, or its own vocabulary where reduced."""
        assert self.draft is not None
        self.stats.draft_forwards += 1
        # processors that remember the text are not asked about drafts: any draft distribution gives the target's text
        logits = self.draft.forward(tree, nodes, self.reduced)
        if not (self.reduced and not self.row.do_sample):  # greedy: the ranking is the same without processors
            logits = process(
                self.row, mask(self.row.matcher, logits, paths), [self.row.text + p for p in paths], self.path_free
            )
        return torch.softmax(logits, -1).nan_to_num(0.0)  # no token at all where all are forbidden to the draft

    # -- the text ------------------------------------------------------------------------------------------------------
    def _merged(self, path: list[int], by_draft: tuple[list[int], list[float]] | None) -> tuple[list[int], list[float]]:
        """One list of candidates from both sources."""
        assert self.matches is not None
        tokens, chances = self.matches.candidates(path, self.width)
        if self.row.matcher is not None and tokens:
            allowed = allowed_after(self.row.matcher, path, tokens)
            pairs = [(token, chance) for token, chance in zip(tokens, chances, strict=True) if token in allowed]
            tokens, chances = [token for token, _ in pairs], [chance for _, chance in pairs]
        if by_draft is None or not by_draft[0] or not tokens:
            return (tokens, chances) if by_draft is None or not by_draft[0] else by_draft
        share = BESIDE_A_DRAFT * sum(chances)
        mixed = {token: (1 - share) * prob for token, prob in zip(*by_draft, strict=True)}
        for token, chance in zip(tokens, chances, strict=True):
            mixed[token] = mixed.get(token, 0.0) + BESIDE_A_DRAFT * chance
        best = sorted(mixed.items(), key=lambda item: -item[1])[: self.width]
        return [token for token, _ in best], [chance for _, chance in best]


def mask(matcher: Matcher | None, logits: torch.Tensor, paths: list[list[int]]) -> torch.Tensor:
    """Logits ``[n, V]`` without what the matcher forbids after each path below the text; the matcher ends where it
    began."""
    if matcher is None:
        return logits
    logits = logits.clone()
    for row, path in enumerate(paths):
        if follow(matcher, path):
            fill_mask(matcher, logits[row])
            if path:
                matcher.rollback(len(path))
    return logits


def follow(matcher: Matcher, path: list[int]) -> bool:
    """Moves the matcher along a path; where it forbids a token it stays, and the answer is False."""
    for taken, token in enumerate(path):
        if matcher.is_terminated() or not matcher.accept_token(token):
            if taken:
                matcher.rollback(taken)
            return False
    return True


def allowed_after(matcher: Matcher, path: list[int], tokens: list[int]) -> set[int]:
    """Those of ``tokens`` that the matcher allows after ``path``."""
    if not follow(matcher, path):
        return set()
    allowed = set() if matcher.is_terminated() else {token for token in tokens if matcher.accepts(token)}
    if path:
        matcher.rollback(len(path))
    return allowed


def process(row: DecodingRow, logits: torch.Tensor, texts: list[list[int]], path_free: bool) -> torch.Tensor:
    """Logits processors on ``[n, V]`` rows, each with its own text (rows of equal length share a call).

    Args:
        path_free: whether the processors look at one row of scores and not at the text before it.
    """
    processors = row.stateless
    if not processors:
        return logits
    if path_free:
        return processors(torch.tensor([texts[0]], device=row.device).expand(len(texts), -1), logits)
    scores = torch.empty_like(logits)
    by_length: dict[int, list[int]] = {}
    for place, text in enumerate(texts):
        by_length.setdefault(len(text), []).append(place)
    for places in by_length.values():
        ids = torch.tensor([row.padding + texts[place] for place in places], device=row.device)
        scores[places] = processors(ids, logits[places])
    return scores
