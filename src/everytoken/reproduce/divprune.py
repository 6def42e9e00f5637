"""Accuracy against tokens kept, for every reducer that needs no training, on the tiny model of scenes.

One model answers the same questions with all 64 visual tokens and with 32, 16, 8 and 4 of them. DivPrune, random
tokens, an even grid and average pooling work at the language model's input, in original positions (the first two in
packed ones too); FastV cuts behind the first decoder layer; ToMe merges inside the encoder. The same is done on
cluttered scenes, where few patches are empty. Operations of the prefill and bytes of the cache are measured too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..core.charts import lines_svg
from .base import Arms, Claim, Context, Reproduction, Result, mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..core.results import Values
    from ..reduction.base import Reducer
    from ..training.datasets.scenes import SceneMaker

KEPT = (32, 16, 8, 4)
TOTAL = 64
ALL, DIVERSE, PACKED = "all tokens", "DivPrune", "DivPrune, packed"
RANDOM, RANDOM_PACKED, GRID = "random", "random, packed", "even grid"
POOL, FASTV, TOME = "average pool", "FastV", "ToMe"
BEDS = ("scenes", "cluttered scenes")
Make = Callable[[int], "Reducer | None"]
"""Tokens to keep -> the reducer; None where it cannot keep so many."""
WHY = "64 tokens of a model of 0.7M weights, and answers of one word; the paper's figure is CIDEr of captions by 7B"
WHY_FASTV = (
    "clean scenes have one patch to look at; the paper's redundancy around it and drift over layers are small here"
)


def metric(bed: str, kept: int) -> str:
    """The name of a measurement."""
    return f"{bed}: right answers, {kept} tokens"


def reducers() -> dict[str, tuple[Make, str]]:
    """Arm -> how its reducer is made, and its positions."""
    import dataclasses
    from typing import ClassVar

    import torch

    from ..reduction.base import Declaration, Reduction, ReductionContext, selection
    from ..reduction.baselines import RandomTokens
    from ..reduction.divprune import DivPrune
    from ..reduction.fastv import FastV
    from ..reduction.m3 import MatryoshkaPool, legal_scales
    from ..reduction.tome import ToMe

    @dataclasses.dataclass
    class EvenGrid:
        """Keeps every so many-th row and column, or every second of those."""

        count: int
        declares: ClassVar[Declaration] = Declaration(("model input",), "none", "select", "fixed share", ("grid",))

        def reduce(self, features: torch.Tensor, context: ReductionContext) -> Reduction:
            side, step = 8, max(1, int((TOTAL / self.count) ** 0.5))
            places = torch.arange(TOTAL).reshape(side, side)[step // 2 :: step, step // 2 :: step].flatten()
            every = len(places) // self.count
            return selection(features, places[every // 2 :: every][: self.count])

    def merging(kept: int) -> Reducer | None:
        away, rest = divmod(TOTAL - kept, 3)  # three layers, each can merge half of what it has
        return ToMe(r=away) if rest == 0 else None

    return {
        DIVERSE: (lambda kept: DivPrune(keep=kept / TOTAL), "original"),
        PACKED: (lambda kept: DivPrune(keep=kept / TOTAL), "packed"),
        FASTV: (lambda kept: FastV(layer=1, remove=1 - kept / TOTAL), "original"),
        TOME: (merging, "packed"),
        RANDOM: (lambda kept: RandomTokens(keep=kept / TOTAL), "original"),
        RANDOM_PACKED: (lambda kept: RandomTokens(keep=kept / TOTAL), "packed"),
        GRID: (EvenGrid, "original"),
        POOL: (lambda kept: MatryoshkaPool(kept) if kept in legal_scales(8) else None, "original"),
    }


@contextlib.contextmanager
def reduced(model: PreTrainedModel, reducer: Reducer | None, positions: str, seed: int) -> Iterator[Any]:
    """``reduce_tokens``, or nothing where there is no reducer; yields what it reports."""
    import torch

    from ..reduction.seam import reduce_tokens

    if reducer is None:
        yield None
        return
    generator = torch.Generator().manual_seed(seed)
    with reduce_tokens(model, reducer, positions, generator) as run:
        yield run


def run(context: Context) -> Arms:
    from ..core.vision import load_vlm
    from ..training.datasets.scenes import SceneMaker

    count, kept = (64, (16, 8)) if context.quick else (1000, KEPT)
    model = load_vlm(context.model, dtype="float32", device="cpu")
    makers: dict[str, SceneMaker] = {BEDS[0]: SceneMaker(), BEDS[1]: SceneMaker(clutter=24)}
    arms: Arms = {}
    for arm, (make, positions) in {ALL: (lambda _kept: None, "packed"), **reducers()}.items():

        def measured(arm: str = arm, make: Make = make, positions: str = positions) -> dict[str, Values]:
            return answered(model, makers, kept, count, context, arm, make, positions)

        arms[arm] = context.part(arm, measured)
    context.artifacts["cost"] = {
        f"{arm}, {number} tokens": cost(model, make(number), positions)
        for arm, (make, positions) in reducers().items()
        for number in kept
        if make(number) is not None
    } | {ALL: cost(model, None, "packed")}
    return arms


def answered(
    model: PreTrainedModel,
    makers: dict[str, SceneMaker],
    kept: tuple[int, ...],
    count: int,
    context: Context,
    arm: str,
    make: Make,
    positions: str,
) -> dict[str, Values]:
    """One arm's answers on both beds with every number of tokens."""
    from ..training.vision import held_out, right_answers

    found: dict[str, Values] = {}
    for bed, maker in makers.items():
        scenes, asked = held_out(count, context.seed, maker)
        if arm == ALL:  # the same for every number: what it is compared with
            found |= dict.fromkeys([metric(bed, number) for number in kept], right_answers(model, scenes, asked))  # type: ignore[arg-type]
            continue
        for number in kept:
            context.report(f"{arm} on {bed}, {number} tokens", 0, 0)
            if (reducer := make(number)) is None:
                continue
            with reduced(model, reducer, positions, context.seed):
                found[metric(bed, number)] = right_answers(model, scenes, asked)  # type: ignore[arg-type]
    return found


def cost(model: PreTrainedModel, reducer: Reducer | None, positions: str, batch: int = 16) -> dict[str, float]:
    """Measured, for each question: operations of the prefill (millions, matrix products), of which in the language
    model, and bytes of its cache.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ..training.datasets.scenes import question_batch
    from ..training.vision import held_out

    scenes, asked = held_out(batch, 0)
    inputs = question_batch(scenes, [[item] for item in asked], model.config.image_seq_length)
    del inputs["labels"]
    with torch.no_grad(), reduced(model, reducer, positions, 0), FlopCounterMode(display=False) as counter:
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    names = counter.get_flop_counts()
    language = sum(sum(found.values()) for name, found in names.items() if name.endswith(".language_model"))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return {
        "millions of operations": counter.get_total_flops() / batch / 1e6,
        "of which language model": language / batch / 1e6,
        "cache bytes": held / batch,
    }


def curve_svg(result: Result, bed: str = BEDS[0]) -> str:
    """Accuracy over tokens kept, a line an arm."""
    lines: dict[str, list[list[tuple[float, float]]]] = {}
    for arm in result["runs"][0]:
        lines[arm] = [
            [
                (float(kept), 100 * mean(found[arm][metric(bed, kept)]))
                for kept in KEPT
                if metric(bed, kept) in found[arm]
            ]
            for found in result["runs"]
        ]
    return lines_svg(lines, "visual tokens kept of 64", f"right answers on {bed}, percent")


def claims() -> list[Claim]:
    """What is claimed on each bed."""
    whole = "within 5 points of all tokens"
    attention = "COCO CIDEr 0.96 against 0.06 of FastV"
    found = [
        Claim(metric(BEDS[0], 8), DIVERSE, ALL, whole, "difference", threshold=-0.05, why=WHY),
        Claim(metric(BEDS[0], 16), DIVERSE, ALL, whole, "difference", threshold=-0.05, why=WHY),
        Claim(metric(BEDS[0], 8), PACKED, ALL, whole, "difference", threshold=-0.05, why=WHY),
        Claim(metric(BEDS[0], 8), PACKED, RANDOM_PACKED, "above random choice", "difference", why=WHY),
    ]
    for bed in BEDS:
        found += [
            Claim(metric(bed, 8), DIVERSE, RANDOM, "above random choice", "difference", why=WHY),
            Claim(metric(bed, 16), DIVERSE, GRID, "above a fixed grid", "difference", why=WHY),
            Claim(metric(bed, 8), DIVERSE, FASTV, attention, "difference", why=WHY_FASTV),
        ]
    return found


REPRODUCTION = Reproduction(
    name="divprune",
    summary="right answers of one model with all of its visual tokens and with fewer, by seven reducers",
    run=run,
    claims=claims(),
    extra=("vision", "PIL"),
)
