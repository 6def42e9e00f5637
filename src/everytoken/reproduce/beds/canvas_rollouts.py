"""Training a masked diffusion model on its own rollouts inside an experiment: sudokus, one start, equal rollouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ...core.results import mean
from ...core.rng import derive_seed
from ..base import Context
from .rollouts import Learner, Size, learnt
from .sudoku import HOLES, SudokuBed, questions, solved

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...core.results import Values
    from ...decoding.canvas.base import CanvasSampler
    from ...reinforcement.canvas_pieces import CanvasMethod
    from ..files import Scale

LOST = "right at an earlier step, wrong at the end"
SIZES: dict[Scale, Size] = {
    "quick": Size(hidden=64, layers=3, warmup=0, updates=2, batch=32, test=128, rates=(1e-3,)),
    "cpu": Size(hidden=64, layers=3, warmup=0, updates=120, batch=64, test=512, rates=(1e-4, 3e-4, 1e-3)),
}
"""The network is the bed's."""


def trained(
    context: Context,
    bed: SudokuBed,
    methods: Mapping[str, CanvasMethod],
    sampler: Callable[[], CanvasSampler],
    metric: str,
) -> dict[str, dict[str, Values]]:
    """The start, and every method after its training with the best of its learning rates.

    Args:
        sampler: makes the one that sudokus are measured with.
        metric: the name of the share that it solves.

    Returns:
        Arm -> ``metric`` and ``LOST``, one value a held-out puzzle.
    """
    from ...reinforcement.diffusion_trainer import DiffusionGRPOTrainer
    from ...reinforcement.diffusion_training import sudoku_reward, sudoku_rows
    from ...training.datasets.sudoku import puzzles

    size = SIZES[context.scale]
    start, tokenizer = bed.start(context)
    rows = sudoku_rows(32 if context.quick else 1024, derive_seed(context.seed, "rows"), HOLES)
    other = puzzles(64 if context.quick else 256, derive_seed(context.seed, "tuning"), held=False, holes=(HOLES, HOLES))

    def learner(arm: str) -> Learner:
        method = methods[arm]
        return Learner(method.recipe(), sudoku_reward, method.arguments(), DiffusionGRPOTrainer)

    def tuned(arm: str, policy: PreTrainedModel) -> float:
        return mean(solved(context, policy, sampler(), other))

    def kept(arm: str, policy: PreTrainedModel, logs: dict[str, list[float]]) -> dict[str, Any]:
        return measured(context, policy, sampler(), metric)

    found = {"start": context.part("start, measured", lambda: measured(context, start, sampler(), metric))}
    return found | learnt(context, size, start, tokenizer, rows, 1, methods, learner, tuned, kept)


def measured(context: Context, model: PreTrainedModel, sampler: Any, metric: str) -> dict[str, Values]:
    """Whether each held-out puzzle is solved, and whether an earlier guess was right and the last one is not."""
    import dataclasses

    from ...training.datasets.sudoku import OPEN
    from ...training.datasets.sudoku import solved as graded

    ids = questions(context)
    found = dataclasses.replace(sampler, record_guesses=True)(model, ids, editable=ids == OPEN, seeds=range(len(ids)))
    steps = [graded(found.guesses[:, step]) for step in range(found.steps)]
    last = graded(found.final_ids)
    once = [max(values) for values in zip(*steps, strict=True)]
    return {metric: last, LOST: [float(a > b) for a, b in zip(once, last, strict=True)]}
