"""What models of any order are trained with, as functions of a model and a batch of whole texts.

- ``mdlm_loss``: masked diffusion (MDLM, arXiv 2406.07524; LLaDA): mask each response token with probability
  t ~ U(eps, 1) and weigh the loss of the masked ones by 1/t. Its mean is an upper bound of -log p, a response token.
- ``insertion_loss``: drop tokens and ask, from those that stay, for all that is missing in each gap.
- ``any_subset_loss``: know a random subset of the positions, and predict the others in one order with two streams.

All choices are drawn by a generator, so that a step can be made again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from ...core.errors import BadInputError
from ...decoding.canvas.model import CanvasModel, mask_token
from ...decoding.canvas.orders import order_mask, subset_order

EPS = 1e-3
"""The least mask level."""


class Masked(NamedTuple):
    """A batch with masks.

    Attributes:
        ids: ``[B, T]`` with the mask id where ``masked``.
        masked: ``[B, T]`` bool.
        weights: ``[B]``, 1/t.
    """

    ids: torch.Tensor
    masked: torch.Tensor
    weights: torch.Tensor


def mask_batch(
    ids: torch.Tensor,
    response: torch.Tensor,
    mask_id: int,
    generator: torch.Generator | None = None,
    levels: torch.Tensor | None = None,
    eps: float = EPS,
) -> Masked:
    """Masks each response token with its row's probability.

    Args:
        ids: ``[B, T]``.
        response: ``[B, T]`` bool, what may be masked.
        levels: ``[B]`` probabilities; None draws t ~ U(eps, 1), stratified over the batch.
    """
    rows, device = len(ids), ids.device
    if levels is None:
        # one draw in each of B equal parts: the batch's levels are spread, and each is uniform
        drawn = torch.rand(rows, generator=generator, device=device)
        levels = eps + (1 - eps) * (torch.arange(rows, device=device) + drawn) / rows
    masked = response & (torch.rand(ids.shape, generator=generator, device=device) < levels[:, None])
    return Masked(ids.masked_fill(masked, mask_id), masked, 1 / levels)


def mdlm_loss(
    model: Any,
    ids: torch.Tensor,
    response: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    mask_id: int | None = None,
    generator: torch.Generator | None = None,
    levels: torch.Tensor | None = None,
) -> torch.Tensor:
    """``mean_b 1/(t L) sum_i masked -log p(x_i | masked x)``, a scalar in nats a response token.

    Args:
        model: any model with ``.logits [B, T, V]`` of both sides.
        ids: ``[B, T]`` whole texts.
        response: ``[B, T]`` bool, what the model writes; never padding.
        mask_id: None takes the model's.
        levels: ``[B]``, the mask levels t; None draws them.

    Raises:
        BadInputError: a row without a response.
    """
    lengths = response.sum(1)
    if bool((lengths == 0).any()):
        raise BadInputError(f"Row {int((lengths == 0).nonzero()[0])} has no response to learn.")
    mask = mask_token(model, mask_id)
    noisy = mask_batch(ids, response, mask, generator, levels)
    logits = CanvasModel(model, mask).logits(noisy.ids, None if attention_mask is None else attention_mask.bool())
    losses = F.cross_entropy(logits.transpose(1, 2), ids.masked_fill(~noisy.masked, -100), reduction="none")
    return ((losses * noisy.masked).sum(1) * noisy.weights / lengths).mean()


class Insertions(NamedTuple):
    """What is missing from texts after some of their tokens were dropped, sparse.

    Attributes:
        ids, attention: ``[B, Z]`` what stays, in order, padded on the right.
        row, anchor, token: ``[N]``, one entry a dropped token: its row, the place in ``ids`` behind which it belongs,
            and its id.
        dropped: ``[B]``, how many a row lost.
    """

    ids: torch.Tensor
    attention: torch.Tensor
    row: torch.Tensor
    anchor: torch.Tensor
    token: torch.Tensor
    dropped: torch.Tensor


def drop_tokens(ids: torch.Tensor, attention: torch.Tensor, dropped: torch.Tensor, pad: int = 0) -> Insertions:
    """Takes tokens out of texts.

    Args:
        ids, attention: ``[B, T]``; padding is on the right.
        dropped: ``[B, T]`` bool; a dropped token needs a kept one on its left, which becomes its anchor.

    Raises:
        BadInputError: a token without an anchor, or one of padding.
    """
    attention = attention.bool()
    if bool((dropped & ~attention).any()):
        raise BadInputError("A token of padding cannot be dropped.")
    kept = attention & ~dropped
    place = kept.long().cumsum(1) - 1
    if bool((place[dropped] < 0).any()):
        raise BadInputError("A dropped token has no kept token on its left.", "Begin texts with one that stays.")
    longest = int(kept.sum(1).max())
    out = ids.new_full((len(ids), longest), pad)
    row, where = kept.nonzero(as_tuple=True)
    out[row, place[row, where]] = ids[row, where]
    there = torch.arange(longest, device=ids.device) < kept.sum(1, keepdim=True)
    row, where = dropped.nonzero(as_tuple=True)
    return Insertions(out, there, row, place[row, where], ids[row, where], dropped.sum(1))


def draw_missing(response: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """``[B, T]`` bool, tokens of the response that a text loses: n uniform from 0 to its length, then any n of them."""
    rows, device = len(response), response.device
    drawn = torch.rand(rows, generator=generator, device=device)
    count = (drawn * (response.sum(1) + 1)).long()
    noise = torch.rand(response.shape, generator=generator, device=device).masked_fill(~response, 2.0)
    return noise.argsort(1).argsort(1) < count[:, None]


def insertion_logps(
    logits: torch.Tensor, open_gaps: torch.Tensor, forbidden: torch.Tensor | None = None
) -> torch.Tensor:
    """``[B, Z, V]`` float32 log-probabilities of inserting v right behind k, one softmax over all open gaps and tokens.

    Args:
        logits: ``[B, Z, V]``.
        open_gaps: ``[B, Z]`` bool.
        forbidden: ``[V]`` bool, tokens that are never inserted.
    """
    scores = logits.float().masked_fill(~open_gaps[..., None], -torch.inf)
    if forbidden is not None:
        scores = scores.masked_fill(forbidden, -torch.inf)
    return (scores.flatten(1) - scores.flatten(1).logsumexp(-1, keepdim=True)).view_as(scores)


def insertion_loss(
    model: Any,
    batch: Insertions,
    *,
    first_gap: int = 1,
    stop_weight: float = 1.0,
    closed_gaps: torch.Tensor | None = None,
) -> torch.Tensor:
    """``mean_b [ -1/n sum_dropped log p(anchor, token | what stays) + stop_weight CE(stop) ]``.

    The minimum of the first part is the entropy of what is missing, not 0. A row that lost nothing has the second
    alone.

    Args:
        model: with ``.logits [B, Z, V]`` and ``.stop_logits [B, 2]``, whose class 0 says that nothing is missing.
        first_gap: gaps before this place are closed; 1 closes that behind the first token.
        closed_gaps: ``[B, Z]`` bool, further gaps that are closed.
    """
    output = model(input_ids=batch.ids, attention_mask=batch.attention.long())
    open_gaps = batch.attention & (torch.arange(batch.ids.shape[1], device=batch.ids.device) >= first_gap)
    if closed_gaps is not None:
        open_gaps = open_gaps & ~closed_gaps
    logps = insertion_logps(output.logits, open_gaps)
    share = 1 / batch.dropped[batch.row].to(logps.dtype)
    losses = logps.new_zeros(len(batch.ids)).index_add(
        0, batch.row, -logps[batch.row, batch.anchor, batch.token] * share
    )
    stop = F.cross_entropy(output.stop_logits.float(), (batch.dropped > 0).long(), reduction="none")
    return (losses + stop_weight * stop).mean()


def any_subset_loss(
    model: Any,
    ids: torch.Tensor,
    known: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    parallel: bool = False,
) -> torch.Tensor:
    """Mean over the open positions of ``-log p(x_i | known, open ones on the left)``, in one forward of two streams.

    Args:
        model: takes ``perm_mask`` as XLNet does.
        ids: ``[B, T]``.
        known: ``[B, T]`` bool; padding counts as known.
        parallel: every open position sees the known ones alone, which trains the drafts of speculative decoding.

    Raises:
        BadInputError: nothing is open.
    """
    if bool(known.all()):
        raise BadInputError("Every position is known: there is nothing to predict.")
    upto = known.sum(1) if parallel else None
    inputs: dict[str, torch.Tensor] = {"perm_mask": order_mask(subset_order(known), known, upto)}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    every = torch.eye(ids.shape[1], device=ids.device).expand(len(ids), -1, -1)
    logits = model(input_ids=ids, target_mapping=every, **inputs).logits.float()
    return F.cross_entropy(logits[~known], ids[~known])


def draw_known(
    response: torch.Tensor, low: float, high: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """``[B, T]`` bool: all but a share of each row's response, drawn from ``U(low, high)``; one position at least is
    open.
    """
    rows = len(response)
    lengths = response.sum(1)
    share = low + (high - low) * torch.rand(rows, generator=generator, device=response.device)
    count = (share * lengths).long().clamp(min=1)
    noise = torch.rand(response.shape, generator=generator, device=response.device).masked_fill(~response, 2.0)
    return noise.argsort(1).argsort(1) >= count[:, None]
