"""RCR's claim on sudokus of four by four: better answers at the same number of forwards, without training.

Ten open cells are filled in three to ten forwards, in confidence order and with running confidence, by the same model
on the same puzzles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Arms, Claim, Context, Reproduction
from .beds.sudoku import HOLES, SudokuBed, solved

if TYPE_CHECKING:
    from ..core.results import Values

PLAIN, OURS, RANDOM = "confidence order", "RCR", "random order"
STEPS = (3, 4, 6, HOLES)
WHY = "a network of 124,000 weights on ten open cells; the paper's has 8B and answers of 256 tokens and more"
BED = SudokuBed()


def metric(steps: int) -> str:
    return f"sudokus solved, {steps} forwards"


def run(context: Context) -> Arms:
    from ..decoding.canvas.denoising import DenoisingSampler
    from ..generation.rcr import RCR

    def every() -> Arms:
        model, _ = BED.start(context)
        made = {
            PLAIN: lambda steps: DenoisingSampler(steps=steps),
            OURS: lambda steps: RCR(steps=steps),
            RANDOM: lambda steps: DenoisingSampler(steps=steps, remasking="random"),
        }
        arms: Arms = {}
        for name, make in made.items():
            found: dict[str, Values] = {}
            for number, steps in enumerate(STEPS):
                context.report(f"{name}: steps", number + 1, len(STEPS))
                sampler = make(steps)
                found[metric(steps)] = solved(context, model, sampler)
                if name == OURS:
                    context.artifacts[f"tokens taken back a puzzle, {steps} forwards"] = sampler.stats.revised / len(
                        found[metric(steps)]  # type: ignore[arg-type]
                    )
            arms[name] = found
        return arms

    return context.part("arms", every)


REPRODUCTION = Reproduction(
    name="rcr",
    summary="masked diffusion fills sudokus in few forwards, with and without second thoughts",
    run=run,
    claims=[
        *(Claim(metric(steps), OURS, PLAIN, "consistent gains", "difference", why=WHY) for steps in STEPS),
        Claim(metric(HOLES), PLAIN, RANDOM, "the order matters", "difference", why=WHY),
    ],
    bed="sudoku",
)
