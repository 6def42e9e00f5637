"""Experts that serve a limited number of tokens: who is served, without a loop over tokens.

All first choices are served in the order of the tokens, then all second choices, and so on. So a first choice beats an
earlier token's second choice. The rank of a second choice starts behind all first choices of its expert, served or not.
"""

from __future__ import annotations

import torch


def expert_capacity(tokens: torch.Tensor, experts: int, top_k: int, factor: float, minimum: int = 4) -> torch.Tensor:
    """``C = floor(k * factor * tokens / E)``, plus 1 where that is odd, at least ``minimum``.

    Args:
        tokens: how many each group has; any shape.
        experts, top_k: how many there are, and how many a token takes.
        factor: room beyond an even share.
        minimum: the least that is served.

    Returns:
        Whole numbers of the same shape.
    """
    capacity = torch.floor(tokens.double() * (top_k * factor) / experts).long()
    return (capacity + capacity % 2).clamp(min=minimum)


def serve(
    indices: torch.Tensor,
    experts: int,
    capacity: torch.Tensor,
    mask: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which choices are served.

    Args:
        indices: ``[G, n, k]``, each token's experts by round; groups do not share capacity.
        experts: how many there are.
        capacity: ``[G]``, choices that each expert serves.
        mask: ``[G, n]``, false for padding, which asks for nothing and is not served.
        order: ``[n]``, a permutation: token ``order[0]`` is served first. None takes them as they stand.

    Returns:
        ``[G, n, k]`` booleans.
    """
    groups, tokens, rounds = indices.shape
    wanted = indices if mask is None else indices.masked_fill(~mask[..., None], experts)
    if order is not None:
        wanted = wanted[:, order]
    # every (group, expert) is a queue, whose members a stable sort keeps in the order of rounds and tokens
    queue = wanted.transpose(1, 2).reshape(groups, -1)
    queue = (queue + torch.arange(groups, device=queue.device)[:, None] * (experts + 1)).flatten()
    sizes = torch.zeros(groups * (experts + 1), dtype=torch.long, device=queue.device)
    sizes = sizes.scatter_add(0, queue, torch.ones_like(queue))
    starts = sizes.cumsum(0) - sizes
    by_queue = torch.argsort(queue, stable=True)
    places = torch.arange(len(queue), device=queue.device)
    rank = torch.empty_like(queue).scatter(0, by_queue, places - starts[queue[by_queue]])
    served = rank.view(groups, rounds, tokens).transpose(1, 2) < capacity[:, None, None]
    if order is not None:
        served = torch.empty_like(served).index_copy(1, order, served)
    return served if mask is None else served & mask[..., None]
