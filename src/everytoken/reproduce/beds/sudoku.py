"""A test bed for text in any order: a small masked diffusion model fills sudokus of four by four.

It solves most of them with one cell a step in confidence order, fewer with several cells a step, and fewer still in
random order: there is a gap that better orders, second thoughts and training can close.

The positive control is more of what the start learnt from.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, ClassVar

from ...core.results import Values
from ...core.rng import derive_seed
from ..base import Context

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...decoding.canvas.base import CanvasSampler

HOLES = 10


def solved(
    context: Context, model: PreTrainedModel, sampler: CanvasSampler, ids: torch.Tensor | None = None
) -> list[float]:
    """1.0 for each held-out puzzle of ten open cells that a sampler solves, else 0.0."""
    from ...training.datasets.sudoku import OPEN
    from ...training.datasets.sudoku import solved as graded

    ids = questions(context) if ids is None else ids
    found = sampler(model, ids, editable=ids == OPEN, seeds=range(len(ids)))
    return graded(found.final_ids)


def questions(context: Context) -> torch.Tensor:
    """The held-out puzzles of a seed."""
    from ...training.datasets.sudoku import puzzles

    return puzzles(128 if context.quick else 512, derive_seed(context.seed, "test"), holes=(HOLES, HOLES))


class SudokuBed:
    """Sudokus by a network of 124,000 weights that is right in most of them."""

    name: ClassVar[str] = "sudoku"
    summary: ClassVar[str] = "a small masked diffusion model fills sudokus of four by four"
    metric: ClassVar[str] = "sudokus solved"
    bounds: ClassVar[tuple[float, float]] = (0.05, 0.98)

    def __init__(self) -> None:
        self._starts: dict[tuple[int, str], PreTrainedModel] = {}

    def start(self, context: Context) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The network that ships for a quick run; else one that is trained with the run's seed."""
        from ...decoding.canvas.loading import load_denoiser
        from ...training.datasets.sudoku import sudoku_tokenizer

        key = context.seed, context.scale
        if key not in self._starts:
            self._starts[key] = load_denoiser() if context.quick else self._trained(context, None, 1500, "base model")
        return copy.deepcopy(self._starts[key]), sudoku_tokenizer()

    def _trained(self, context: Context, model: PreTrainedModel | None, steps: int, name: str) -> PreTrainedModel:
        import torch

        from ...architectures.any_order.modeling_any_order import AnyOrderLM
        from ...architectures.any_order.training import DiffusionTraining, learn, source_of

        config = DiffusionTraining(task="sudoku", steps=steps, seed=derive_seed(context.seed, name))
        source = source_of(config, None)
        if model is None:
            torch.manual_seed(config.seed)
            model = AnyOrderLM(source.config)
        learn(model, source, config, report=context.report, name=name)
        return model.eval()

    def rows(self, context: Context) -> list[list[int]]:
        """Puzzles to learn from, with the grids of training."""
        from ...training.datasets.sudoku import puzzles

        count = 32 if context.quick else 256
        found: list[list[int]] = puzzles(count, derive_seed(context.seed, "rows"), held=False).tolist()
        return found

    def measure(self, context: Context, model: PreTrainedModel) -> dict[str, Values]:
        from ...decoding.canvas.denoising import DenoisingSampler

        return {
            self.metric: solved(context, model, DenoisingSampler()),
            "solved in three steps": solved(context, model, DenoisingSampler(steps=3)),
        }

    def positive_control(self, context: Context) -> PreTrainedModel:
        model, _ = self.start(context)
        return self._trained(context, model, 40 if context.quick else 1500, "positive control")
