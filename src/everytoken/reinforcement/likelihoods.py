"""Log-likelihoods of texts that were written in any order: the one piece in which policy gradients for masked diffusion
differ.

A masked diffusion model gives ``p(y_i | y without S)`` for any set S of masks. With ``f(S) = sum_{i in S} log p(y_i |
y without S)`` the evidence lower bound of a response of L tokens is::

    ELBO(y) = int_0^1 E_{S ~ Bernoulli(t)}[f(S) / t] dt = sum_{k=1}^L 1/k mean_{|S|=k} f(S)  <=  log p(y)

which is also the mean any-order log-likelihood over all L! orders (``exact_elbo``). Estimators:

- ``one_step``: all masks at once (diffu-GRPO): one forward, no token sees another;
- ``elbo``: a quadrature over t with random masks (GDPO's semi-deterministic Monte Carlo), or t drawn too;
- ``trajectory_logps``: the very steps that the sampler took, or some of them.

Masks of a row are drawn by the row's own seed, so the old, the reference and the new policy are asked the same, and the
split into micro-batches changes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..core.errors import BadInputError, UnknownNameError
from ..core.noise import row_generators
from ..decoding.canvas.model import CanvasModel, mask_token
from ..decoding.canvas.trajectory import Trajectory

RULES = ("gauss-1", "gauss-2", "gauss-3", "gauss-4", "simpson", "mc")
LARGEST = 14
"""Tokens of a response whose subsets can all be tried."""


@dataclass
class LikelihoodEstimate:
    """What an estimator returns.

    Attributes:
        per_position: ``[B, T]``, 0 outside of the scored positions; the sum of a row is its estimate.
        forwards: forward passes a row.
    """

    per_position: torch.Tensor
    forwards: int

    @property
    def sequence(self) -> torch.Tensor:
        """``[B]`` nats."""
        return self.per_position.sum(1)


def quadrature(rule: str) -> tuple[list[float], list[float]]:
    """Nodes and weights on [0, 1]: Gauss-Legendre of 1 to 4 points, or the three points of ``simpson`` at .1, .5, 1.

    Raises:
        UnknownNameError: another rule.
    """
    if rule == "simpson":
        return [0.1, 0.5, 1.0], [1 / 6, 4 / 6, 1 / 6]
    name, _, count = rule.partition("-")
    if name != "gauss" or rule not in RULES:
        raise UnknownNameError("rule", rule, RULES)
    nodes, weights = np.polynomial.legendre.leggauss(int(count))
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()


def check_scored(ids: torch.Tensor, scored: torch.Tensor, attention: torch.Tensor | None) -> None:
    """Raises ``BadInputError`` for masks that do not fit the ids, a row without a response, or scored padding."""
    for name, value in (("scored", scored), ("attention_mask", attention)):
        if value is not None and value.shape != ids.shape:
            raise BadInputError(f"{name} must be as the ids, {list(ids.shape)}; got {list(value.shape)}.")
    if bool((scored.sum(1) == 0).any()):
        raise BadInputError(f"Row {int((scored.sum(1) == 0).nonzero()[0])} has no response to score.")
    if attention is not None and bool((scored & ~attention.bool()).any()):
        raise BadInputError("scored names positions of padding.")


def masked_logps(
    model: Any,
    ids: torch.Tensor,
    masked: torch.Tensor,
    attention: torch.Tensor | None = None,
    *,
    mask_id: int | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> torch.Tensor:
    """``log p(y_i | y without S)`` at the masked positions, 0 elsewhere, with gradients; one forward a mask.

    Args:
        ids: ``[B, T]``.
        masked: ``[N, B, T]`` bool, N sets S a row.
        temperature: divides the logits.
        chunk: rows of a forward at most; None takes all ``N B`` at once.

    Returns:
        ``[N, B, T]`` float32.
    """
    count, rows, length = masked.shape
    mask = mask_token(model, mask_id)
    every = ids.expand(count, -1, -1).masked_fill(masked, mask).flatten(0, 1)
    flat = masked.flatten(0, 1)
    there = None if attention is None else attention.bool().expand(count, -1, -1).flatten(0, 1)
    wrapped, found = CanvasModel(model, mask), []
    targets = ids.expand(count, -1, -1).flatten(0, 1)
    for begin in range(0, count * rows, chunk or count * rows):
        part = slice(begin, begin + (chunk or count * rows))
        logits = wrapped.logits(every[part], None if there is None else there[part], flat[part]) / temperature
        logps = logits.log_softmax(-1).gather(-1, targets[part][flat[part]][:, None])[:, 0]
        found.append(logps.new_zeros(flat[part].shape).masked_scatter(flat[part], logps))
    return torch.cat(found).view(count, rows, length)


def row_noise(seeds: Sequence[int] | torch.Tensor, scored: torch.Tensor, draws: int) -> torch.Tensor:
    """``[draws, B, T + 1]`` numbers in [0, 1): one a scored position and, last, one a draw.

    Each row's come from its seed and count its own response alone, so padding changes nothing.

    Raises:
        BadInputError: not one seed a row.
    """
    generators = row_generators(seeds, len(scored))
    found = torch.ones(draws, *scored.shape)
    last = torch.empty(draws, len(generators), 1)
    here = scored.cpu()
    for row, generator in enumerate(generators):
        drawn = torch.rand(draws, int(here[row].sum()) + 1, generator=generator)
        found[:, row, here[row]] = drawn[:, 1:]
        last[:, row, 0] = drawn[:, 0]
    return torch.cat([found, last], -1).to(scored.device)


def elbo_masks(
    scored: torch.Tensor,
    seeds: Sequence[int] | torch.Tensor,
    rule: str = "gauss-2",
    masks: int = 1,
    count: str = "fixed",
    weight: str = "L/k",
    floor: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sets of ``elbo`` and what each weighs: ``[N, B, T]`` bool and ``[N, B]``, N = nodes times masks.

    Raises:
        BadInputError, UnknownNameError: see ``elbo``.
    """
    if count not in ("fixed", "bernoulli") or weight not in ("L/k", "1/t"):
        raise BadInputError(f"count is fixed or bernoulli, and weight L/k or 1/t; got {count!r} and {weight!r}.")
    if count == "bernoulli" and weight == "L/k":
        raise BadInputError(
            "Bernoulli masks weigh 1/t: the number of masks is random, and may be 0.", "Use weight='1/t'."
        )
    if masks < 1:
        raise BadInputError(f"masks must be at least 1; got {masks}.")
    lengths = scored.sum(1)
    nodes = [None] if rule == "mc" else quadrature(rule)[0]
    shares = [1.0] if rule == "mc" else quadrature(rule)[1]
    noise = row_noise(seeds, scored, len(nodes) * masks)
    draws, last = noise[..., :-1], noise[..., -1]
    sets, weights = [], []
    for number, (node, share) in enumerate(zip(nodes, shares, strict=True)):
        part = slice(number * masks, (number + 1) * masks)
        if node is None:
            level = last[part]
            if count == "bernoulli" or weight == "1/t":
                least = 1 / lengths if floor is None else torch.full_like(level[0], floor)
                level = torch.maximum(level, least)
        else:
            level = torch.full_like(last[part], node)
        if count == "bernoulli":
            chosen = draws[part] < level[..., None]
            scale = share / level
        else:
            size = (level * lengths).floor().long() + (1 if node is None and weight == "L/k" else 0)
            size = torch.minimum(size.clamp(min=1), lengths)
            chosen = draws[part].masked_fill(~scored, 2.0).argsort(-1).argsort(-1) < size[..., None]
            scale = share * lengths / size if weight == "L/k" else share / level
        sets.append(chosen & scored)
        weights.append(scale / masks)
    return torch.cat(sets), torch.cat(weights)


def elbo(
    model: Any,
    ids: torch.Tensor,
    scored: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    seeds: Sequence[int] | torch.Tensor,
    rule: str = "gauss-2",
    masks: int = 1,
    count: str = "fixed",
    weight: str = "L/k",
    floor: float | None = None,
    mask_id: int | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> LikelihoodEstimate:
    """The evidence lower bound by a quadrature over the mask level: ``e_i = sum_n w_n / (t_n K) sum_k M_i log p_i``.

    Args:
        ids: ``[B, T]`` prompt and response.
        scored: ``[B, T]`` bool, the response.
        seeds: one a row; the same seeds give the same masks.
        rule: of ``RULES``. ``mc`` draws t as well (double Monte Carlo).
        masks: K, masks at a node.
        count: ``fixed``, ``max(1, floor(t L))`` masks in a uniform subset (with ``mc`` and ``L/k``: uniform in 1..L);
            or ``bernoulli``, each position with probability t.
        weight: of a mask: ``L/k`` with k masks, or ``1/t``. A fixed count with ``1/t`` is biased for short responses,
            since ``floor(t L) / (t L)`` is not 1; the released code has it.
        floor: the least t that ``mc`` divides by; None takes 1/L. Without one the variance would be infinite.
        temperature: divides the logits.
        chunk: rows of a forward at most.

    Raises:
        BadInputError: shapes that do not fit, or settings that do not go together.
        UnknownNameError: an unknown rule.
    """
    check_scored(ids, scored, attention_mask)
    sets, weights = elbo_masks(scored, seeds, rule, masks, count, weight, floor)
    logps = masked_logps(model, ids, sets, attention_mask, mask_id=mask_id, temperature=temperature, chunk=chunk)
    return LikelihoodEstimate((weights[..., None].to(logps.dtype) * logps).sum(0), len(sets))


def one_step(
    model: Any,
    ids: torch.Tensor,
    scored: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    seeds: Sequence[int] | torch.Tensor | None = None,
    prompt_mask_prob: float = 0.0,
    mask_id: int | None = None,
    temperature: float = 1.0,
) -> LikelihoodEstimate:
    """All of the response masked at once (diffu-GRPO): one forward, and no token sees another.

    Args:
        prompt_mask_prob: each prompt token is masked with this probability, by the row's seed.

    Raises:
        BadInputError: shapes that do not fit, or a probability without seeds.
    """
    check_scored(ids, scored, attention_mask)
    mask = mask_token(model, mask_id)
    shown = ids
    if prompt_mask_prob:
        if seeds is None:
            raise BadInputError("Masks in the prompt are drawn.", "Give seeds.")
        there = torch.ones_like(scored) if attention_mask is None else attention_mask.bool()
        prompt = there & ~scored
        keep = bool(prompt.any())
        noise = row_noise(seeds, prompt, 1)[0, :, :-1] if keep else torch.ones(ids.shape, device=ids.device)
        shown = ids.masked_fill(prompt & (noise < prompt_mask_prob), mask)
    shown = torch.where(scored, ids, shown)
    logps = masked_logps(model, shown, scored[None], attention_mask, mask_id=mask, temperature=temperature)
    return LikelihoodEstimate(logps[0], 1)


def trajectory_logps(
    model: Any, trajectory: Trajectory, *, steps: Sequence[int] | None = None, temperature: float = 1.0
) -> LikelihoodEstimate:
    """``log p(y_i | state s)`` of every position at the step s that fixed it: the likelihood of the choices of tokens.

    Args:
        trajectory: of a sampler that takes nothing back, or whose final tokens are scored at their last step.
        steps: which steps; None takes all that fixed something. Positions of other steps are 0.
        temperature: divides the logits.

    Raises:
        BadInputError: no such step.
    """
    found, forwards = [], 0
    for step in range(trajectory.steps) if steps is None else steps:
        state = trajectory.state(step)
        fixed = trajectory.editable & (trajectory.fix_step == step)
        if not bool(fixed.any()):
            continue
        wrapped = CanvasModel(model, trajectory.mask_id)
        logits = wrapped.logits(state, trajectory.attention, fixed) / temperature
        logps = logits.log_softmax(-1).gather(-1, trajectory.final_ids[fixed][:, None])[:, 0]
        found.append(logps.new_zeros(fixed.shape).masked_scatter(fixed, logps))
        forwards += 1
    if not found:
        return LikelihoodEstimate(torch.zeros(trajectory.final_ids.shape, device=trajectory.final_ids.device), 0)
    return LikelihoodEstimate(torch.stack(found).sum(0), forwards)


def exact_elbo(
    model: Any,
    ids: torch.Tensor,
    scored: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    mask_id: int | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """``[B]``, the bound itself by all ``2^L - 1`` subsets of a short response: ``sum_k 1/k mean_{|S|=k} f(S)``.

    Raises:
        BadInputError: rows of different lengths, or more than ``LARGEST`` tokens.
    """
    check_scored(ids, scored, attention_mask)
    lengths = set(scored.sum(1).tolist())
    if len(lengths) != 1 or (length := lengths.pop()) > LARGEST:
        raise BadInputError(f"All subsets are tried for rows of one length, {LARGEST} tokens at most.")
    places = scored.nonzero()[:, 1].view(len(ids), length)
    sets = [subset for size in range(1, length + 1) for subset in itertools.combinations(range(length), size)]
    masked = torch.zeros(len(sets), *ids.shape, dtype=torch.bool)
    for number, subset in enumerate(sets):
        masked[number].scatter_(1, places[:, list(subset)], True)
    logps = masked_logps(model, ids, masked, attention_mask, mask_id=mask_id, temperature=temperature)
    sizes = torch.tensor([len(subset) for subset in sets])
    among = torch.bincount(sizes)[sizes]  # how many sets are as large
    return (logps.sum(-1) / (sizes * among)[:, None]).sum(0)
