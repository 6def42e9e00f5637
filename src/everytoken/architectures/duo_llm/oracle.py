"""The oracle of Duo-LLM: for every token the route that predicts the next token best, with so many large blocks.

At position ``t`` with budget ``b``::

    a*_t = argmin over routes with at most (or exactly) b large blocks of -log p(x_{t+1} | x_{<=t}; a_t)

Earlier tokens keep the routes of a stated policy, so their keys and values are computed once. Each candidate is then a
row of one token on this cache; its mask lets it see the tokens before its own.

The oracle sees the answer. The least of many noisy losses is below every fixed route even in an untrained network, so
``wrong_target_control`` and ``dropout_control`` measure how much of the gain is selection alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from ...core.errors import BadInputError, UnknownNameError
from ...core.progress import Report, silent
from ...core.rng import derive_seed
from .configuration_duo_llm import BIG, SKIP, SMALL
from .modeling_duo_llm import DuoFeedForward

if TYPE_CHECKING:
    from .modeling_duo_llm import DuoLlmForCausalLM, Route

SEARCHES = ("exhaustive", "random", "greedy")
MODES = ("at_most", "exactly")
LIMIT = 4096
"""Routes that an exhaustive search tries for a token; 2^12 of a network of 12 layers without skips."""
ROWS = 512
"""Candidates a forward."""
OWN = "oracle"
"""The context policy under which earlier tokens keep the routes that the oracle chose for them, from left to right."""


@dataclass
class OracleRoutes:
    """What the oracle found for ``P`` positions of a text.

    Attributes:
        positions: ``[P]``, the tokens whose routes were chosen; each predicts the next one.
        routes: ``[P, L]``.
        losses: ``[P]``, nats of the next token by that route.
        small, big: ``[P]``, the same with all blocks small, and all large.
        search: how routes were looked for; only an exhaustive search finds the best for sure.
    """

    positions: torch.Tensor
    routes: torch.Tensor
    losses: torch.Tensor
    small: torch.Tensor
    big: torch.Tensor
    search: str

    @property
    def difficulty(self) -> torch.Tensor:
        """``[P]``, nats that the budget gains over all blocks small; never negative for a budget of at most so many."""
        return self.small - self.losses


def all_routes(layers: int, allow_skip: bool = False) -> torch.Tensor:
    """Every route of a token, ``[R, L]``; the one of small blocks comes first.

    Raises:
        BadInputError: there are more than ``LIMIT``.
    """
    choices = (SMALL, BIG, SKIP) if allow_skip else (SMALL, BIG)
    count = len(choices) ** layers
    if count > LIMIT:
        raise BadInputError(
            f"{layers} layers have {count:,} routes; an exhaustive search tries {LIMIT:,}.",
            "Use search='random' or search='greedy'.",
        )
    return torch.tensor(list(product(choices, repeat=layers)))


@torch.no_grad()
def route_losses(
    model: DuoLlmForCausalLM,
    ids: torch.Tensor,
    routes: torch.Tensor,
    positions: torch.Tensor | None = None,
    policy: Route = "big",
    targets: torch.Tensor | None = None,
    report: Report = silent,
) -> torch.Tensor:
    """Nats of the next token for every candidate route of every position.

    Args:
        ids: ``[S]`` or ``[1, S]``, one text without padding.
        routes: ``[R, L]`` for all positions, or ``[P, R, L]``.
        positions: ``[P]``; None takes all but the last.
        policy: the routes of earlier tokens, by name or as ``[1, S, L]``; ``"random"`` is drawn once.
        targets: ``[P]`` token ids in place of the next ones.
        report: called with the number of candidates done.

    Returns:
        ``[P, R]`` in float32.

    Raises:
        BadInputError: not one text, a text of one token, positions without a next token, or routes that do not fit.
    """
    ids, positions = _checked(model, ids, positions)
    count, layers = len(positions), model.config.num_hidden_layers
    if routes.dim() == 2:
        routes = routes[None].expand(count, -1, -1)
    if routes.shape[0] != count or routes.shape[-1] != layers:
        raise BadInputError(
            f"Routes are [R, {layers}] or [{count}, R, {layers}] here (positions, routes, layers); got "
            f"{tuple(routes.shape)}."
        )
    targets = ids[0, positions + 1] if targets is None else targets
    cache = DynamicCache(config=model.config)
    model.model(input_ids=ids, past_key_values=cache, use_cache=True, route=policy)
    kept = [(layer.keys, layer.values) for layer in cache.layers]
    number = routes.shape[1]
    flat, found = routes.reshape(-1, layers), []
    places = torch.arange(ids.shape[1], device=ids.device)
    for start in range(0, len(flat), ROWS):
        which = torch.arange(start, min(start + ROWS, len(flat)), device=ids.device) // number
        at = positions[which]
        sees = torch.cat([places < at[:, None], torch.ones_like(at[:, None], dtype=torch.bool)], -1)
        shared = DynamicCache(config=model.config)
        for layer, (keys, values) in enumerate(kept):
            shared.update(keys.expand(len(at), -1, -1, -1), values.expand(len(at), -1, -1, -1), layer)
        logits = model(
            input_ids=ids[0, at, None],
            position_ids=at[:, None],
            attention_mask=sees[:, None, None],
            past_key_values=shared,
            use_cache=True,
            route=flat[start : start + ROWS, None].to(ids.device),
        ).logits[:, -1]
        found.append(F.cross_entropy(logits.float(), targets[which], reduction="none"))
        report("candidate routes", min(start + ROWS, len(flat)), len(flat))
    return torch.cat(found).view(count, number)


@torch.no_grad()
def oracle_routes(
    model: DuoLlmForCausalLM,
    ids: torch.Tensor,
    budget: int,
    mode: str = "at_most",
    search: str = "exhaustive",
    context_policy: Route = "big",
    positions: torch.Tensor | None = None,
    tries: int = 100,
    seed: int = 0,
    report: Report = silent,
) -> OracleRoutes:
    """The best route of every token with a budget of large blocks.

    Args:
        ids: ``[S]`` or ``[1, S]``, one text.
        budget: large blocks a token.
        mode: ``"at_most"`` the budget, or ``"exactly"``. A larger budget never loses with the first, and may with the
            second.
        search: ``"exhaustive"``; ``"random"``, the best of so many ``tries`` a token; or ``"greedy"``, which adds the
            best single large block again and again, and is not exact.
        context_policy: the routes of earlier tokens, as ``policy`` of ``route_losses``; or ``"oracle"``, its own. These
            are chosen one token after the other, which takes a search for every token up to the last position.
        positions: ``[P]``; None takes all but the last.
        seed: of the random search.
        report: as for ``route_losses``.

    Raises:
        BadInputError: a budget out of range, an unknown mode, too many routes for an exhaustive search; and as
            ``route_losses``.
        UnknownNameError: another search.
    """
    layers, skips = model.config.num_hidden_layers, model.config.allow_skip
    if not 0 <= budget <= layers:
        raise BadInputError(f"The budget lies between 0 and the {layers} layers; got {budget}.")
    if mode not in MODES:
        raise BadInputError(f"mode is {' or '.join(MODES)}; got {mode!r}.")
    if search not in SEARCHES:
        raise UnknownNameError("search", search, SEARCHES)
    ids, positions = _checked(model, ids, positions)
    if isinstance(context_policy, str) and context_policy == OWN:
        settings = {"mode": mode, "search": search, "tries": tries}
        return _left_to_right(model, ids, budget, positions, settings, seed, report)
    ends = torch.tensor([[SMALL] * layers, [BIG] * layers])
    fixed = route_losses(model, ids, ends, positions, context_policy)
    small, big = fixed.unbind(-1)
    if search == "greedy":
        routes, losses = _greedy(model, ids, budget, mode, context_policy, positions, small, report)
    else:
        if search == "exhaustive":
            candidates = all_routes(layers, skips)
            candidates = candidates[within(candidates, budget, mode)]
        else:
            candidates = random_routes(len(positions), tries, layers, budget, mode, seed)
        table = route_losses(model, ids, candidates, positions, context_policy, report=report)
        losses, best = table.min(-1)
        routes = candidates[best.cpu()] if candidates.dim() == 2 else candidates[torch.arange(len(best)), best.cpu()]
    return OracleRoutes(positions, routes, losses, small, big, search)


def within(routes: torch.Tensor, budget: int, mode: str = "at_most") -> torch.Tensor:
    """``[...]`` booleans, which routes ``[..., L]`` keep the budget of large blocks."""
    spent = (routes == BIG).sum(-1)
    return spent == budget if mode == "exactly" else spent <= budget


def budget_curve(losses: torch.Tensor, routes: torch.Tensor, mode: str = "at_most") -> torch.Tensor:
    """``[L + 1]``, the mean loss of the oracle for every budget, from the losses of all routes.

    Args:
        losses: ``[P, R]``, of ``route_losses``.
        routes: ``[R, L]``, ``all_routes``.
    """
    kept = [within(routes, budget, mode).to(losses.device) for budget in range(routes.shape[-1] + 1)]
    return torch.stack([losses[:, mask].min(-1).values.mean() for mask in kept])


def random_routes(
    positions: int, tries: int, layers: int, budget: int, mode: str = "at_most", seed: int = 0
) -> torch.Tensor:
    """``[P, R, L]`` routes of small and large blocks; with "at_most" each number of large blocks is equally likely.

    Raises:
        BadInputError: fewer than one try.
    """
    if tries < 1:
        raise BadInputError(f"A random search tries at least one route; got {tries}.")
    generator = torch.Generator().manual_seed(seed)
    shape = (positions, tries, 1)
    spent = torch.full(shape, budget)
    if mode == "at_most":
        spent = torch.randint(0, budget + 1, shape, generator=generator)
    order = torch.rand(positions, tries, layers, generator=generator).argsort(-1).argsort(-1)
    return torch.where(order < spent, BIG, SMALL)


def wrong_target_control(losses: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
    """``[P]``, the right target's loss by the route that is best for a wrong one: what selection cannot explain.

    Args:
        losses, wrong: ``[P, R]`` of the same routes, for the next tokens and for other targets.
    """
    return losses.gather(-1, wrong.argmin(-1, keepdim=True))[:, 0]


@torch.no_grad()
def dropout_control(
    model: DuoLlmForCausalLM, ids: torch.Tensor, tries: int, rate: float = 0.1, seed: int = 0
) -> torch.Tensor:
    """``[S - 1]``, the least of ``tries`` losses a token with all blocks large and random parts of them dropped: what
    choosing the best of so many noisy passes gains by itself.

    Args:
        ids: ``[S]`` or ``[1, S]``, one text.
        rate: share of the blocks' outputs that is dropped.

    Raises:
        BadInputError: fewer than one try, or a rate out of range; and as ``route_losses``.
    """
    if tries < 1 or not 0 <= rate < 1:
        raise BadInputError(f"The control has at least one try and a rate from 0 to below 1; got {tries} and {rate}.")
    ids, _ = _checked(model, ids, None)
    blocks = [part for part in model.modules() if isinstance(part, DuoFeedForward)]
    handles = [
        block.register_forward_hook(lambda _, args, output: F.dropout(output, rate, training=True)) for block in blocks
    ]
    try:
        best = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for _ in range(tries):
                logits = model(input_ids=ids, route="big", use_cache=False).logits[0, :-1]
                losses = F.cross_entropy(logits.float(), ids[0, 1:], reduction="none")
                best = losses if best is None else torch.minimum(best, losses)
    finally:
        for handle in handles:
            handle.remove()
    assert best is not None
    return best


# -- how it is done ----------------------------------------------------------------------------------------------------
def _checked(
    model: DuoLlmForCausalLM, ids: torch.Tensor, positions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise BadInputError(f"The oracle reads one text of at least two tokens; got ids of shape {tuple(ids.shape)}.")
    if positions is None:
        positions = torch.arange(ids.shape[1] - 1)
    if len(positions) == 0 or int(positions.min()) < 0 or int(positions.max()) >= ids.shape[1] - 1:
        raise BadInputError(f"Positions of a text of {ids.shape[1]} tokens lie between 0 and {ids.shape[1] - 2}.")
    return ids.to(model.device), positions.to(model.device)


def _left_to_right(
    model: DuoLlmForCausalLM,
    ids: torch.Tensor,
    budget: int,
    positions: torch.Tensor,
    settings: dict[str, Any],
    seed: int,
    report: Report,
) -> OracleRoutes:
    """Each token's route is chosen after those before it, which keep theirs."""
    last = int(positions.max())
    # what a token sees does not depend on the routes of later ones, so any will do for them
    routes = torch.full((1, last + 2, model.config.num_hidden_layers), BIG, device=ids.device)
    found = []
    for place in range(last + 1):
        cut, at = slice(0, place + 2), torch.tensor([place])
        own = derive_seed(seed, place)
        found.append(
            oracle_routes(model, ids[:, cut], budget, context_policy=routes[:, cut], positions=at, seed=own, **settings)
        )
        routes[0, place] = found[-1].routes[0].to(ids.device)
        report("tokens from left to right", place + 1, last + 1)
    losses, small, big = (
        torch.cat([getattr(found[place], name) for place in positions.tolist()]) for name in ("losses", "small", "big")
    )
    return OracleRoutes(positions, routes[0, positions].cpu(), losses, small, big, found[0].search)


def _greedy(
    model: DuoLlmForCausalLM,
    ids: torch.Tensor,
    budget: int,
    mode: str,
    policy: Route,
    positions: torch.Tensor,
    small: torch.Tensor,
    report: Report,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One large block more at a time, the best for each position; with "at_most" the best of all steps."""
    layers = model.config.num_hidden_layers
    routes = torch.full((len(positions), layers), SMALL)
    best_routes, best = routes.clone(), small.clone()
    for _ in range(budget):
        candidates = torch.where(torch.eye(layers, dtype=torch.bool), BIG, routes[:, None])
        table = route_losses(model, ids, candidates, positions, policy, report=report)
        # a layer that is large already adds nothing
        table = table.masked_fill((routes == BIG).to(table.device), torch.inf)
        losses, place = table.min(-1)
        routes = candidates[torch.arange(len(positions)), place.cpu()]
        better = losses < best if mode == "at_most" else torch.ones_like(losses, dtype=torch.bool)
        best = torch.where(better, losses, best)
        best_routes = torch.where(better.cpu()[:, None], routes, best_routes)
    return best_routes, best
