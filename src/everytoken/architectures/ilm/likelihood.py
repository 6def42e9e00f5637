"""How likely a text is under an insertion language model: over all histories that write it, or at least.

Every order in which the L tokens of an answer may appear is one history, and no two orders are the same history. So ::

    p(y) = sum over orders of prod_j (1 - stop(z_{j-1})) p(k_j, v_j | z_{j-1})  *  stop(y)

which a sum over the 2^L sets of tokens that are there gives exactly. For longer answers Jensen's inequality bounds it::

    log p(y) >= log L! + mean over orders of the log-probability of the history

Both are of a row that is drawn at temperature 1 with ``stop_threshold=None``.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ...core.errors import BadInputError
from ...core.modes import evaluating
from ...core.noise import row_generators
from ..any_order.losses import insertion_logps
from .sampling import gaps_of

MOST = 12
"""The longest answer of which all sets of tokens are tried."""


def insertion_logp(
    model: Any,
    ids: torch.Tensor,
    response: torch.Tensor,
    *,
    forbidden: tuple[int, ...] | None = None,
    limit: int | None = None,
    rows: int = 256,
) -> torch.Tensor:
    """The log-probability of an answer, exactly, ``[]`` float64, by ``2^L`` texts.

    Args:
        model: an ``InsertionLM``, or any that a sampler takes.
        ids: ``[T]`` one whole text, without padding.
        response: ``[T]`` bool, its answer of L tokens.
        forbidden: as for ``InsertionSampler``.
        limit: the sampler's ``gen_length``; an answer of as many tokens ends whatever the stop head says.
        rows: texts a forward.

    Raises:
        BadInputError: a batch, an answer of more than ``MOST`` tokens or of more than ``limit``.
    """
    if ids.dim() != 1 or response.shape != ids.shape:
        raise BadInputError(f"ids and response are one text, [T] each; got {list(ids.shape)}, {list(response.shape)}.")
    places = response.bool().nonzero()[:, 0]
    length = len(places)
    if length > MOST:
        raise BadInputError(f"{length} tokens have {2**length:,} sets; {MOST} tokens are the most.", "insertion_bound.")
    if limit is not None and length > limit:
        raise BadInputError(f"The answer has {length} tokens, and {limit} are the limit.")
    sets = torch.arange(2**length, device=ids.device)
    there = (sets[:, None] >> torch.arange(length, device=ids.device)) & 1 == 1  # [2^L, L]
    logps, ends, continues = _insertions(model, ids, places, there, forbidden, rows)
    reached = torch.full((2**length,), -torch.inf, dtype=torch.float64)
    reached[0] = 0.0
    sizes = there.sum(1)
    for size in range(length):
        chosen = (sizes == size).nonzero()[:, 0]
        step = reached[chosen, None] + continues[chosen, None] + logps[chosen]  # [N, L]
        following = chosen[:, None] | (1 << torch.arange(length, device=ids.device))
        for item in range(length):  # a set is reached from each of its tokens once
            fresh = ~there[chosen, item]
            target = following[fresh, item]
            reached[target] = torch.logaddexp(reached[target], step[fresh, item])
    last = torch.zeros((), dtype=torch.float64) if limit == length else ends[-1]
    return reached[-1] + last


def insertion_bound(
    model: Any,
    ids: torch.Tensor,
    response: torch.Tensor,
    *,
    orders: torch.Tensor | None = None,
    count: int = 8,
    seed: int = 0,
    forbidden: tuple[int, ...] | None = None,
    rows: int = 256,
) -> torch.Tensor:
    """Log-probabilities of orders plus ``log L!``, ``[K]`` float64; their mean bounds the answer's from below.

    Args:
        ids, response, forbidden, rows: as for ``insertion_logp``.
        orders: ``[K, L]``, places of the answer in the order of insertion; None draws ``count`` rows.

    Raises:
        BadInputError: a batch, or orders of another length.
    """
    places = response.bool().nonzero()[:, 0] if ids.dim() == 1 and response.shape == ids.shape else None
    if places is None:
        raise BadInputError(f"ids and response are one text, [T] each; got {list(ids.shape)}, {list(response.shape)}.")
    length = len(places)
    if orders is None:
        generator = row_generators([seed], 1)[0]
        orders = torch.stack([torch.randperm(length, generator=generator) for _ in range(count)])
    if orders.dim() != 2 or orders.shape[1] != length:
        raise BadInputError(f"orders must be [K, {length}]; got {list(orders.shape)}.")
    ranks = orders.argsort(1).to(ids.device)
    there = ranks[:, None] < torch.arange(length + 1, device=ids.device)[None, :, None]  # [K, L + 1, L]
    logps, ends, continues = _insertions(model, ids, places, there.flatten(0, 1), forbidden, rows)
    shape = (len(orders), length + 1)
    steps = logps.view(*shape, length)[:, :-1].gather(-1, orders.to(ids.device)[..., None])[..., 0]
    return steps.sum(1) + continues.view(shape)[:, :-1].sum(1) + ends.view(shape)[:, -1] + math.lgamma(length + 1)


@torch.no_grad()
def _insertions(
    model: Any,
    ids: torch.Tensor,
    places: torch.Tensor,
    there: torch.Tensor,
    forbidden: tuple[int, ...] | None,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of texts that hold some tokens of the answer, ``there [N, L]``: log-probabilities ``[N, L]`` that each of the
    others comes next, of the end ``[N]``, and of no end ``[N]``; float64.
    """
    config = model.config.get_text_config()
    named = getattr(config, "never_inserted", (config.mask_token_id,)) if forbidden is None else forbidden
    closed = torch.zeros(config.vocab_size, dtype=torch.bool, device=ids.device)
    closed[list(named)] = True
    logps, ends, continues = [], [], []
    with evaluating(model):
        for part in there.split(rows):
            kept = torch.ones(len(part), len(ids), dtype=torch.bool, device=ids.device)
            kept[:, places] = part
            text = ids.expand(len(part), -1)
            # what is not there stays in the tensor, unseen: no text is copied
            output = model(
                input_ids=text, attention_mask=kept.long(), position_ids=(kept.long().cumsum(1) - 1).clamp(min=0)
            )
            scores = insertion_logps(output.logits, gaps_of(model, text, kept), closed)
            anchor = torch.where(kept, torch.arange(len(ids), device=ids.device), -1).cummax(1).values[:, places]
            flat = anchor * scores.shape[-1] + ids[places]
            logps.append(scores.flatten(1).gather(1, flat).double())
            stop = output.stop_logits.double().log_softmax(-1)
            ends.append(stop[:, 0])
            continues.append(stop[:, 1])
    return torch.cat(logps).cpu(), torch.cat(ends).cpu(), torch.cat(continues).cpu()
