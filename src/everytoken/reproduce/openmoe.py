"""OpenMoE's three findings on a small model of bytes, and two remedies for late drops.

One network learns English prose, whose capacity is that of each row: late positions come last. While it learns, its
routing is analysed on the same held-out windows again and again. Drops are counted on held-out prose and on text of
another kind, the source code of Python's library. Both remedies train for equally many steps: some code among the
windows of the warm-up, and a random order of service.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .base import Arms, Claim, Context, Reproduction

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..architectures.openmoe.method import OpenMoeRecipe
    from ..architectures.routing_analysis import RoutingAnalysis
    from ..core.results import Values
    from ..training.datasets.plain_text import TextWindows

OWN, MIXED, RANDOM = "OpenMoE", "code in the warm-up", "random order"
TOKEN, POSITION, SHUFFLED = "token id", "position", "shuffled token ids"
FIFTH, START = "a fifth of the training", "before training"
WHY = "a network of 1.8M weights on bytes, 8 experts in 2 layers, and capacity for 1.0 times an even share"
LATE = "late minus early drop rate, prose"
CODE_DROPS, PROSE_DROPS = "drop rate, code", "drop rate, prose"
MODULES = ("argparse", "ast", "collections", "csv", "dataclasses", "difflib", "inspect", "json.decoder", "logging")
"""Whose source is the text of another kind."""


def source_code() -> str:
    """About 400 kB of Python, which every Python brings."""
    import importlib
    import inspect

    return "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in MODULES)


@dataclass(frozen=True)
class MixedWindows:
    """Windows of prose, a tenth of them code in the first steps.

    Attributes:
        text, other: where windows come from.
        until: the step at which code ends.
    """

    text: TextWindows
    other: TextWindows
    until: int

    def batch(self, count: int, length: int, *names: Any) -> torch.Tensor:
        """As ``TextWindows.batch``; the last name is the step."""
        rows = self.text.batch(count, length, *names)
        if names[-1] < self.until:
            share = max(1, count // 10)
            rows[:share] = self.other.batch(share, length, *names)
        return rows


def recipe_of(context: Context) -> OpenMoeRecipe:
    from ..architectures.openmoe.method import OpenMoeRecipe

    settings: dict[str, Any] = {"capacity": 1.0, "capacity_eval": 1.0, "routing_group": "sequence"}
    if context.quick:
        settings |= {"steps": 10, "batch": 4, "length": 64, "width": 32, "intermediate": 32, "layers": 2, "heads": 2}
    return OpenMoeRecipe(seed=context.seed, **settings)


def run(context: Context) -> Arms:
    from ..architectures.byte_text import as_ids
    from ..architectures.routing_analysis import RoutingAnalysis, early_learning
    from ..architectures.training import learn
    from ..core.results import mean
    from ..training.datasets.plain_text import TextWindows, example_text

    base = recipe_of(context)
    prose = TextWindows(example_text(), seed=context.seed)
    code = TextWindows(source_code(), seed=context.seed)
    windows = 8 if context.quick else 64

    def analysed(model: PreTrainedModel, text: TextWindows) -> RoutingAnalysis:
        ids = as_ids(text.held(windows, base.length)).tolist()
        return RoutingAnalysis.from_model(model, ids, max_length=base.length, bins=4)

    def late(analysis: RoutingAnalysis) -> float:
        rates = analysis.drop_rate().mean(0)
        return float(rates[-1] - rates[0])

    def trained(name: str, recipe: OpenMoeRecipe, text: Any) -> dict[str, dict[str, Values]]:
        model = recipe.begin(None)
        seen = [analysed(model, prose)]
        places = [0]

        def watch(stage: str, done: int, total: int) -> None:
            context.report(f"{name}: {stage}", done, total)
            # a fifth, two fifths and so on; the stage reports every fiftieth of its steps
            if name == OWN and done * 5 // total > places[-1] * 5 // total:
                places.append(done)
                seen.append(analysed(model, prose))

        learn(name, model, recipe, text, None, watch)  # type: ignore[arg-type]
        own, other = analysed(model, prose), analysed(model, code)
        found: dict[str, dict[str, Values]] = {
            name: {
                LATE: late(own),
                PROSE_DROPS: own.figures()["share of dropped choices"],
                CODE_DROPS: other.figures()["share of dropped choices"],
                "bits per byte": recipe.bits(model, prose.held(windows, base.length)),
            }
        }
        if name == OWN:
            by_token, by_position = own.specialisation("token"), own.specialisation("position")
            metric = "share of the choice explained"
            found[TOKEN] = {metric: mean([item.share for item in by_token])}
            found[SHUFFLED] = {metric: mean([item.shuffled for item in by_token])}
            found[POSITION] = {metric: mean([item.share for item in by_position])}
            agreement = early_learning([*seen, own], minimum=4)
            metric = "token ids with their final expert"
            found[START], found[FIFTH] = {metric: agreement[0].favourite}, {metric: agreement[1].favourite}
            context.artifacts["agreement by step"] = [
                [step, item.favourite, item.overlap]
                for step, item in zip([*places, base.steps], agreement, strict=True)
            ]
            context.artifacts["drop rate by quarter"] = own.drop_rate().mean(0).tolist()
        return found

    arms: Arms = {}
    mixed = MixedWindows(prose, code, base.steps // 5)
    for name, recipe, text in (
        (OWN, base, prose),
        (MIXED, base, mixed),
        (RANDOM, replace(base, fill_order="random"), prose),
    ):
        arms |= context.part(name, partial(trained, name, recipe, text))
    return arms


REPRODUCTION = Reproduction(
    name="openmoe",
    summary="routing of a small mixture of experts by token id, over its training and by position, and two remedies",
    run=run,
    claims=[
        Claim("share of the choice explained", TOKEN, POSITION, "experts follow the token id", "difference", why=WHY),
        Claim("share of the choice explained", TOKEN, SHUFFLED, "experts follow the token id", "difference", why=WHY),
        Claim(
            "token ids with their final expert",
            FIFTH,
            "",
            "almost full overlap from a fifth of the training on",
            "value",
            threshold=0.8,
            why=WHY,
        ),
        Claim(LATE, OWN, "", "late positions lose their experts", "value", threshold=0.0, why=WHY),
        Claim(
            CODE_DROPS,
            MIXED,
            OWN,
            "a remedy that the paper proposes",
            "difference",
            higher_is_better=False,
            why=WHY,
        ),
        Claim(
            LATE,
            RANDOM,
            OWN,
            "not in the paper: who is served first is drawn",
            "difference",
            higher_is_better=False,
            why=WHY,
        ),
    ],
)
