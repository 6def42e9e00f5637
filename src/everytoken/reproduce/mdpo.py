"""MDPO's claim on sudokus of four by four: better answers than diffu-GRPO after equally many updates.

Ten open cells are filled in four forwards, which costs the start many right answers. All arms learn from equally many
rollouts of four steps, each with the best of its learning rates on puzzles of their own. MDPO with the last reward
alone is beside it: it trains the same canvases, but judges a step by what came of it in the end.
"""

from __future__ import annotations

from .base import Arms, Claim, Context, Reproduction
from .beds.canvas_rollouts import LOST, trained
from .beds.sudoku import SudokuBed

STEPS = 4
SOLVED = f"sudokus solved, {STEPS} forwards"
PLAIN, OURS, LAST = "diffu-GRPO", "MDPO", "MDPO, last reward alone"
BED = SudokuBed()
WHY = "a network of 124,000 weights and 120 updates; the paper trains 8B weights for 30 hours"


def run(context: Context) -> Arms:
    from ..decoding.canvas.denoising import DenoisingSampler
    from ..reinforcement.canvas_pieces import DiffuGRPO
    from ..reinforcement.mdpo import MDPO

    methods = {
        PLAIN: DiffuGRPO(denoising_steps=STEPS),
        OURS: MDPO(denoising_steps=STEPS, trained_steps=STEPS),
        LAST: MDPO(denoising_steps=STEPS, trained_steps=STEPS, advantage="final"),
    }
    arms: Arms = dict(trained(context, BED, methods, lambda: DenoisingSampler(steps=STEPS), SOLVED))
    return arms


REPRODUCTION = Reproduction(
    name="mdpo",
    summary="masked diffusion learns sudokus in few forwards: rewards of every step, and of the last one",
    run=run,
    claims=[
        Claim(SOLVED, OURS, PLAIN, "+9.6% on MATH500, +54.2% on Countdown", "difference", why=WHY),
        Claim(SOLVED, OURS, LAST, "(no such ablation was found)", "difference", why=WHY),
        Claim(LOST, OURS, "start", "answers that were right and are lost become fewer", "difference", False, why=WHY),
        Claim(SOLVED, PLAIN, "start", "(positive control: diffu-GRPO learns here)", "difference", why="Of the bed."),
    ],
    extra=("train", "trl"),
    bed="sudoku",
)
