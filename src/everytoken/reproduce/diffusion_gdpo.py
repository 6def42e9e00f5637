"""GDPO's claim: at equal forwards a bound by a quadrature over the mask level is less noisy than one by drawn levels.

Nothing is trained. The texts are sudokus that a masked diffusion model wrote, of ten tokens each. For every text the
model is asked for all 1,023 sets of masks. So the exact bound is known, and an estimate is a look-up that can be
repeated as often as one likes. Beside the paper's estimators stand the released one (a fixed count of masks that weighs
1/t), one that draws the count of masks, and diffu-GRPO's single step.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from .base import Arms, Claim, Context, Reproduction
from .beds.sudoku import HOLES, SudokuBed, questions

if TYPE_CHECKING:
    import torch

DRAWN, SEMI, RELEASED, OURS, COUNTS, ONE = (
    "levels and masks drawn",
    "quadrature, Bernoulli masks",
    "quadrature, fixed count, 1/t",
    "quadrature, fixed count, L/k",
    "counts drawn, L/k",
    "one step",
)
FORWARDS = (2, 3)
WHY = "texts of ten tokens by a network of 124,000 weights; there the number of masks is much of the noise that is left"
BED = SudokuBed()


def variance(forwards: int) -> str:
    return f"variance at {forwards} forwards, nats²"


def bias(forwards: int) -> str:
    return f"distance of the mean from the bound at {forwards} forwards, nats"


def all_sets(model: object, ids: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """``f(S)`` of every set of masks, ``[2^L, B]``; bit i of the index says that the i-th scored token is masked."""
    import torch

    from ..reinforcement.likelihoods import masked_logps

    length = int(scored[0].sum())
    places = scored.nonzero()[:, 1].view(len(ids), length)
    bits = torch.arange(2**length)[:, None] >> torch.arange(length) & 1
    masked = torch.zeros(2**length, *ids.shape, dtype=torch.bool)
    masked.scatter_(2, places.expand(len(bits), -1, -1), bits.bool()[:, None].expand(-1, len(ids), -1))
    found = [masked_logps(model, ids, part).sum(-1) for part in masked[1:].split(64)]
    return torch.cat([torch.zeros(1, len(ids)), *found])


def exact(table: torch.Tensor) -> torch.Tensor:
    """The bound ``[B]``: ``sum_k 1/k mean_{|S|=k} f(S)``."""
    import torch

    sizes = torch.tensor([bin(index).count("1") for index in range(len(table))])
    length = int(sizes.max())
    total = [table[sizes == size].mean(0) / size for size in range(1, length + 1)]
    return torch.stack(total).sum(0)


def repeated(table: torch.Tensor, repeats: int, seed: int, **settings: str) -> torch.Tensor:
    """Estimates ``[B, repeats]`` of one estimator; see ``likelihoods.elbo_masks``."""
    import torch

    from ..reinforcement.likelihoods import elbo_masks

    length, rows = HOLES, table.shape[1]
    every = torch.ones(rows * repeats, length, dtype=torch.bool)
    seeds = torch.arange(rows * repeats) + seed * rows * repeats
    sets, weights = elbo_masks(every, seeds, **settings)  # type: ignore[arg-type]
    index = (sets.long() << torch.arange(length)).sum(-1)  # [N, rows * repeats]
    text = torch.arange(rows).repeat_interleave(repeats)
    return (weights * table[index, text]).sum(0).view(rows, repeats)


def run(context: Context) -> Arms:
    import torch

    from ..decoding.canvas.denoising import DenoisingSampler
    from ..training.datasets.sudoku import OPEN

    texts, repeats = (12, 200) if context.quick else (64, 1000)

    def every() -> Arms:
        model, _ = BED.start(context)
        ids = questions(context)[:texts]
        found = DenoisingSampler(temperature=1.0)(model, ids, editable=ids == OPEN, seeds=range(texts))
        context.report("all sets of masks", 0, 0)
        with torch.no_grad():
            table = all_sets(model, found.final_ids, found.editable)
        bound = exact(table)
        estimators: dict[str, dict[int, dict[str, object]]] = {
            DRAWN: {n: dict(rule="mc", masks=n, count="bernoulli", weight="1/t") for n in FORWARDS},
            SEMI: {n: dict(rule=f"gauss-{n}", count="bernoulli", weight="1/t") for n in FORWARDS},
            RELEASED: {n: dict(rule=f"gauss-{n}", weight="1/t") for n in FORWARDS},
            OURS: {n: dict(rule=f"gauss-{n}") for n in FORWARDS},
            COUNTS: {n: dict(rule="mc", masks=n) for n in FORWARDS},
        }
        arms: Arms = {name: {} for name in (*estimators, ONE)}
        for (name, versions), number in itertools.product(estimators.items(), FORWARDS):
            context.report(f"{name}, {number} forwards", 0, 0)
            drawn = repeated(table, repeats, context.seed, **versions[number])  # type: ignore[arg-type]
            arms[name][variance(number)] = drawn.var(1).tolist()
            arms[name][bias(number)] = (drawn.mean(1) - bound).abs().tolist()
        for number in FORWARDS:  # one forward, and no noise: more forwards would say the same
            arms[ONE][variance(number)] = [0.0] * texts
            arms[ONE][bias(number)] = (table[-1] - bound).abs().tolist()
        context.artifacts["exact bound, mean in nats"] = float(bound.mean())
        return arms

    return context.part("arms", every)


REPRODUCTION = Reproduction(
    name="gdpo",
    summary="likelihood bounds of masked diffusion at equal forwards: how noisy, and how far off",
    run=run,
    claims=[
        *(
            Claim(variance(n), SEMI, DRAWN, "most of the variance is gone", higher_is_better=False, why=WHY)
            for n in FORWARDS
        ),
        *(Claim(variance(n), COUNTS, SEMI, "(not in the paper)", higher_is_better=False, why=WHY) for n in FORWARDS),
        *(Claim(bias(n), OURS, ONE, "one step is biased", higher_is_better=False, why=WHY) for n in FORWARDS),
        Claim(bias(2), OURS, RELEASED, "(the released weights)", higher_is_better=False, why=WHY),
    ],
    bed="sudoku",
)
