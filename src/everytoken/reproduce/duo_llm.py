"""Duo-LLM's claims on a small model of bytes: oracles of routes against fixed ones, with controls for hindsight.

One network learns with random routes, then its routers learn while the rest is frozen. On held-out windows every route
of every position is tried. The oracle sees the next byte, so its gain stands beside two controls: the best route for a
wrong byte, and the best of equally many passes with all blocks large and parts of them dropped at random.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from .base import Arms, Claim, Context, Reproduction

if TYPE_CHECKING:
    from ..architectures.duo_llm.method import DuoLlmRecipe
    from ..core.results import Values

METRIC = "nats of the next byte"
ONE, HALF, BIG, SMALL = "oracle of 1", "oracle of half", "all large", "all small"
ROUTER, DRAWN, BEST = "routers", "random routes", "best of random routes"
WRONG, DROPPED = "oracle of 1 for a wrong byte", "best of dropped passes"
WHY = "a network of 4 layers and 1.0M weights on bytes"
PLAY = 0.1
"""How far a random route's cost may lie from the routers', in large blocks a layer."""


def recipe_of(context: Context) -> DuoLlmRecipe:
    from ..architectures.duo_llm.method import DuoLlmRecipe

    settings: dict[str, Any] = {"steps": 800}
    if context.quick:
        settings |= {"steps": 12, "batch": 4, "length": 48, "width": 32, "intermediate": 64, "small": 8, "layers": 3}
        settings |= {"heads": 2}
    return DuoLlmRecipe(seed=context.seed, **settings)


def ranks(values: Any) -> Any:
    """Ranks from 0 on; equal values by place."""
    return values.argsort().argsort().double()


def run(context: Context) -> Arms:
    import torch

    from ..architectures.byte_text import as_ids
    from ..architectures.duo_llm.oracle import (
        all_routes,
        budget_curve,
        dropout_control,
        route_losses,
        within,
        wrong_target_control,
    )
    from ..architectures.training import learn
    from ..training.datasets.plain_text import TextWindows, example_text

    recipe = recipe_of(context)
    text = TextWindows(example_text(), seed=context.seed)
    count = 2 if context.quick else 12

    def measured() -> dict[str, dict[str, Values]]:
        model: Any = recipe.begin(None)
        learn("Duo-LLM", model, recipe, text, None, context.report)
        routes = all_routes(recipe.layers)
        spent = (routes == 2).sum(-1)
        found: dict[str, list[float]] = {}
        tables = []
        for row in as_ids(text.held(count, recipe.length)):
            context.report("every route of held-out windows", len(tables), count)
            targets = row[1:]
            table = route_losses(model, row, routes)
            wrong = route_losses(model, row, routes, targets=targets.roll(1))
            with torch.no_grad():
                output = model(input_ids=row[None], use_cache=False, route="router")
            taken = output.routes[0, :-1]
            by_router = (table * (routes[None] == taken[:, None]).all(-1)).sum(-1)
            # random routes that cost what the routers cost: a fair comparison
            costs = torch.tensor(model.config.costs)[routes].mean(-1)
            fair = (costs - float(output.cost)).abs() <= (costs - float(output.cost)).abs().min() + PLAY
            one = within(routes, 1)
            arms = {
                SMALL: table[:, spent == 0][:, 0],
                BIG: table[:, spent == recipe.layers][:, 0],
                ONE: table[:, one].min(-1).values,
                HALF: table[:, within(routes, recipe.layers // 2)].min(-1).values,
                ROUTER: by_router,
                DRAWN: table[:, fair].mean(-1),
                BEST: table[:, fair].min(-1).values,
                WRONG: wrong_target_control(table[:, one], wrong[:, one]),
                DROPPED: dropout_control(model, row, int(one.sum()), seed=context.seed),
            }
            for name, values in arms.items():
                found.setdefault(name, []).extend(values.tolist())
            tables.append(table)
        whole = torch.cat(tables)
        loss, gain = whole[:, spent == 0][:, 0], whole[:, spent == 0][:, 0] - whole.min(-1).values
        context.artifacts["oracle's loss by budget"] = {
            mode: budget_curve(whole, routes, mode).tolist() for mode in ("at_most", "exactly")
        }
        context.artifacts["rank correlation of difficulty and loss"] = float(
            torch.corrcoef(torch.stack([ranks(loss), ranks(gain)]))[0, 1]
        )
        context.artifacts["routers' cost"] = float(output.cost)
        return {name: {METRIC: values} for name, values in found.items()}

    return context.part("Duo-LLM", partial(measured))


def lower(method: str, baseline: str, paper: str) -> Claim:
    """A claim that the method's loss is lower."""
    return Claim(METRIC, method, baseline, paper, "difference", higher_is_better=False, why=WHY)


REPRODUCTION = Reproduction(
    name="duo-llm",
    summary="oracles of routes, routers and random routes of one network, with two controls for hindsight",
    run=run,
    claims=[
        lower(ONE, BIG, "one large block, well chosen, beats large ones everywhere"),
        lower(ONE, SMALL, "a single large block helps"),
        lower(HALF, BIG, "half of the large blocks, well chosen, beat all of them"),
        lower(ONE, WRONG, "not in the paper: the gain is more than the choice among noisy passes"),
        lower(ONE, DROPPED, "not in the paper: the gain is more than the choice among noisy passes"),
        lower(ROUTER, DRAWN, "routers are better than random routes of their cost"),
        lower(HALF, ROUTER, "routers stay far from the oracle"),
    ],
)
