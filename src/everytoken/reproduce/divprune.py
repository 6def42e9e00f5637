"""Accuracy against tokens kept, for every reducer of the station, on the tiny model of scenes.

One model answers the same questions with all 64 visual tokens and with 32, 16, 8 and 4 of them. At the language model's
input, in original positions: DivPrune, the first step of CATP (coverage and agreement with the text), the choice of
token correlation, the policy of token reduction, random tokens, an even grid and average pooling; DivPrune and random
tokens in packed positions too. FastV cuts behind the first decoder layer, ToMe merges inside the encoder. M3 and
TokenPacker answer with the weights that ship for them. The same is done on cluttered scenes, where few patches are
empty. Operations of the prefill and bytes of the cache are measured too, and how many tokens stayed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.charts import lines_svg
from .base import Arms, Claim, Context, Reproduction, Result, mean
from .beds.scenes import cost, reduced

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..core.results import Values
    from ..reduction.base import Reducer
    from ..training.datasets.scenes import SceneMaker

KEPT, CLUTTERED = (32, 16, 8, 4), (16, 8)
"""Tokens to keep on scenes, and on cluttered ones."""
TOTAL = 64
ALL, DIVERSE, PACKED = "all tokens", "DivPrune", "DivPrune, packed"
RANDOM, RANDOM_PACKED, GRID = "random", "random, packed", "even grid"
POOL, FASTV, TOME = "average pool", "FastV", "ToMe"
COVER, CORRELATION, POLICY = "CATP, first step", "token correlation", "policy"
NESTED, PACKER = "M3, trained", "TokenPacker, trained"
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


@dataclass(frozen=True)
class Way:
    """How an arm answers.

    Attributes:
        make: its reducer by the tokens to keep.
        positions: of ``reduce_tokens``.
        weights: shipped weights that the model has instead of the plain ones.
        packs: it has TokenPacker's projector, which makes 16 tokens.
    """

    make: Make
    positions: str = "original"
    weights: str = ""
    packs: bool = False

    def able(self, kept: int) -> bool:
        """Whether it can keep so many."""
        return kept == 16 if self.packs else self.make(kept) is not None

    def model(self, plain: PreTrainedModel) -> PreTrainedModel:
        """What answers."""
        from ..core.vision import load_vlm
        from ..core.weights import weights_folder

        return load_vlm(weights_folder(self.weights), dtype="float32", device="cpu") if self.weights else plain

    def inside(self, model: PreTrainedModel, kept: int, seed: int) -> AbstractContextManager[Any]:
        """The block in which the model answers."""
        from ..reduction.tokenpacker.packing import TokenPacker, packed

        if self.packs:
            return packed(model, TokenPacker(scale=2))
        return reduced(model, self.make(kept), self.positions, seed)


def ways() -> dict[str, Way]:
    """Arm -> how it answers."""
    import dataclasses
    from typing import ClassVar

    import torch

    from ..reduction.arithmetic import cosines
    from ..reduction.base import Declaration, Reduction, ReductionContext, selection
    from ..reduction.baselines import RandomTokens
    from ..reduction.catp import CATP, facility_location
    from ..reduction.divprune import DivPrune
    from ..reduction.fastv import FastV
    from ..reduction.m3 import MatryoshkaPool, legal_scales
    from ..reduction.policy_reducer import PolicyReducer
    from ..reduction.token_correlation import CorrelationCompressor
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

    @dataclasses.dataclass
    class Cover:
        """CATP's first step with a budget of its own: there it may drop half of the tokens at most."""

        count: int
        declares: ClassVar[Declaration] = Declaration(("model input",), "coverage", "select", "fixed share", ("text",))

        def reduce(self, features: torch.Tensor, context: ReductionContext) -> Reduction:
            assert context.text is not None
            points, text = features.detach(), context.text.mean(0, keepdim=True)
            alike, agreement = (1 + cosines(points, points)) / 2, (1 + cosines(points, text)[:, 0]) / 2
            return selection(features, facility_location(alike, self.count, CATP.align_weight * agreement))

    def merging(kept: int) -> Reducer | None:
        away, rest = divmod(TOTAL - kept, 3)  # three layers, each can merge half of what it has
        return ToMe(r=away) if rest == 0 else None

    def correlated(kept: int) -> Reducer:
        # every patch counts as redundant, so that the choice alone is compared and not its budget
        return CorrelationCompressor(threshold=-1.0, min_keep=kept / TOTAL)

    def pooled(kept: int) -> Reducer | None:
        return MatryoshkaPool(kept) if kept in legal_scales(8) else None

    return {
        DIVERSE: Way(lambda kept: DivPrune(keep=kept / TOTAL)),
        PACKED: Way(lambda kept: DivPrune(keep=kept / TOTAL), "packed"),
        COVER: Way(Cover),
        CORRELATION: Way(correlated),
        POLICY: Way(lambda kept: PolicyReducer(keep=kept / TOTAL)),
        FASTV: Way(lambda kept: FastV(layer=1, remove=1 - kept / TOTAL)),
        TOME: Way(merging, "packed"),
        RANDOM: Way(lambda kept: RandomTokens(keep=kept / TOTAL)),
        RANDOM_PACKED: Way(lambda kept: RandomTokens(keep=kept / TOTAL), "packed"),
        GRID: Way(EvenGrid),
        POOL: Way(pooled),
        NESTED: Way(pooled, "packed", weights="scenes-vlm-m3"),
        PACKER: Way(lambda _kept: None, packs=True),
    }


def run(context: Context) -> Arms:
    from ..core.vision import load_vlm
    from ..training.datasets.scenes import SceneMaker

    count, kept = (64, (16, 8)) if context.quick else (400, KEPT)
    plain = load_vlm(context.model, dtype="float32", device="cpu")
    makers: dict[str, SceneMaker] = {BEDS[0]: SceneMaker(), BEDS[1]: SceneMaker(clutter=24)}
    arms: Arms = {ALL: context.part(ALL, lambda: full(plain, makers, kept, count, context))}
    costs = {ALL: cost(plain, None, "packed")}
    for arm, way in ways().items():
        model = way.model(plain)

        def measured(arm: str = arm, way: Way = way, model: PreTrainedModel = model) -> dict[str, Values]:
            return answered(model, makers, kept, count, context, arm, way)

        arms[arm] = context.part(arm, measured)
        for number in kept:
            if way.able(number):
                with way.inside(model, number, 0) if way.packs else contextlib.nullcontext():
                    costs[f"{arm}, {number} tokens"] = cost(model, way.make(number), way.positions)
    context.artifacts["cost"] = costs
    return arms


def full(
    model: PreTrainedModel, makers: dict[str, SceneMaker], kept: tuple[int, ...], count: int, context: Context
) -> dict[str, Values]:
    """Answers with all tokens: the same for every number, what it is compared with."""
    from ..training.vision import held_out, right_answers

    found: dict[str, Values] = {}
    for bed, maker in makers.items():
        right = right_answers(model, *held_out(count, context.seed, maker))  # type: ignore[arg-type]
        found |= dict.fromkeys([metric(bed, number) for number in kept], right)
    return found


def answered(
    model: PreTrainedModel,
    makers: dict[str, SceneMaker],
    kept: tuple[int, ...],
    count: int,
    context: Context,
    arm: str,
    way: Way,
) -> dict[str, Values]:
    """One arm's answers on both beds with every number of tokens that it can keep."""
    from ..training.vision import held_out, right_answers

    found: dict[str, Values] = {}
    for bed, maker in makers.items():
        scenes, asked = held_out(count, context.seed, maker)
        for number in kept:
            context.report(f"{arm} on {bed}, {number} tokens", 0, 0)
            if way.able(number) and (bed == BEDS[0] or number in CLUTTERED):
                with way.inside(model, number, context.seed):
                    found[metric(bed, number)] = right_answers(model, scenes, asked)  # type: ignore[arg-type]
    return found


def kept_table(result: Result) -> str:
    """Percent of right answers of every arm by tokens kept, with intervals, and a prompt's cost, as Markdown."""
    from ..core.results import Claim as Level
    from ..core.results import measure

    heads = ["reducer", *[f"{kept} tokens" for kept in KEPT], *[f"cluttered, {kept}" for kept in CLUTTERED]]
    heads += ["tokens left at 16", "million operations at 16", "cache bytes at 16"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    costs = result["artifacts"]["0"]["cost"]
    for arm in result["runs"][0]:
        cells = []
        for bed, kept in [*[(BEDS[0], kept) for kept in KEPT], *[(BEDS[1], kept) for kept in CLUTTERED]]:
            name = metric(bed, kept)
            if name not in result["runs"][0][arm]:
                cells.append("")
                continue
            found = measure(Level(name, arm, "", "", "value", threshold=0.5), result["runs"])
            assert found["value"] is not None
            ends = [f"{100 * end:.0f}" for end in found["interval"] or () if end is not None]
            cells.append(f"{100 * found['value']:.1f}" + (f" ({' to '.join(ends)})" if len(ends) == 2 else ""))
        spent = costs[ALL] if arm == ALL else costs.get(f"{arm}, 16 tokens")
        if spent is None:
            cells += ["", "", ""]
        else:
            cells += [f"{spent['visual tokens at the end']:.1f}", f"{spent['millions of operations']:.1f}"]
            cells.append(f"{spent['cache bytes']:,.0f}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
    summary="right answers of one model with all of its visual tokens and with fewer, by every reducer",
    run=run,
    claims=claims(),
    extra=("vision", "PIL"),
)
