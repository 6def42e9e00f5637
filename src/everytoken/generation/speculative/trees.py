"""Drafted token trees, and how they grow: best slot first, or layer by layer (DySpec, arXiv 2410.11744).

A *slot* is an open place for one more child of a node. Its value is the estimated chance that verification comes to
test it. When sampling, slots are ranked by that value alone, which never looks at the token that will fill the slot:
otherwise the tree's shape would betray the draws and the output would no longer follow the target. In greedy decoding
nothing random has to be protected, and slots are ranked by the value of the node that would fill them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Candidates = list[tuple[list[int], list[float]]]
Expand = Callable[[list[int]], Candidates]
"""Nodes -> the draft's candidates after each: tokens and their probabilities, in drawing order."""


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

    def ranked(self) -> list[int]:
        """Nodes below the root by falling value; parents before their children."""
        return sorted(range(1, len(self)), key=lambda node: (-self.values[node], node))

    def only(self, nodes: list[int]) -> TokenTree:
        """The tree of the root and ``nodes``, which must hold the parents of all of them; distributions are not
        kept."""
        kept, places = TokenTree(), {0: 0}
        kept.add(self.tokens[0], -1, 1.0)
        for node in sorted(nodes):
            places[node] = kept.add(self.tokens[node], places[self.parents[node]], self.probs[node])
        return kept

    def ancestor_mask(self) -> torch.Tensor:
        """``[n, n]`` bool: row i sees itself and its ancestors."""
        mask = torch.eye(len(self), dtype=torch.bool)
        for node in range(1, len(self)):
            mask[node] |= mask[self.parents[node]]
        return mask


def grow_tree(
    tree: TokenTree,
    expand: Expand,
    budget: int,
    threshold: float | None = None,
    max_depth: int = 1 << 30,
    sampling: bool = False,
) -> TokenTree:
    """Grows ``tree`` (a root) to ``budget`` more nodes at most.

    Args:
        expand: ``list of nodes -> list of (tokens, probs)``: the draft's candidates after each node, in drawing order
            (sampled without replacement, or by falling probability); ``probs`` are under the full draft distribution.
        threshold: None for the fixed-size tree, or the least slot value to fill.
        sampling: rank open slots by the slot's own value (which must not depend on the token that will fill it);
            otherwise by the value of the node that would fill it.
    """
    return (_grow_layers if threshold is not None else _grow_greedy)(
        tree, expand, budget, threshold or 0.0, max_depth, sampling
    )


def _grow_greedy(
    tree: TokenTree, expand: Expand, budget: int, _threshold: float, max_depth: int, sampling: bool
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
    tree: TokenTree, expand: Expand, budget: int, threshold: float, max_depth: int, sampling: bool
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
