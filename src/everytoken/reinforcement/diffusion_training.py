"""``everytoken train`` for methods whose models write in any order: sudokus, or prompts and a reward of the user's.

Without ``--model`` the small network that ships (``sudoku-any-order``) is trained, and without ``--data`` on sudokus of
four by four: a rollout is rewarded by 1 where its grid is right, else by 0. Prompts of your own may have open positions
(the tokenizer's mask token), which are filled in; behind others ``sample_tokens`` positions are written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core.errors import BadInputError
from ..core.loading import load_tokenizer
from ..core.weights import weights_folder
from ..decoding.canvas.base import CanvasSampler
from ..decoding.canvas.denoising import DenoisingSampler
from ..decoding.canvas.loading import load_denoiser
from ..decoding.canvas.model import mask_token
from ..training.base import TrainingContext, TrainingResult
from ..training.datasets import sudoku
from ..training.datasets.messages import row_prompt_ids
from ..training.session import TrainingSession
from .canvas_pictures import canvas_pictures
from .diffusion_trainer import DiffusionGRPOTrainer
from .rollout_training import RolloutTraining, Workshop, rows_and_reward, train_on_rollouts


@dataclass
class CanvasTraining(RolloutTraining):
    """Training of a masked diffusion model on its own rollouts.

    Args:
        task: ``sudoku`` for grids of four by four, or a task of reasoning_gym; ``items`` of them are made.
        holes: open cells of a sudoku.

    Raises:
        BadInputError: a value out of range.
    """

    lr: float = 1e-4
    task: str = "sudoku"
    holes: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.holes <= sudoku.CELLS:
            raise BadInputError(f"A sudoku has 1 to {sudoku.CELLS} open cells; got {self.holes}.")


def sudoku_reward(completions: Sequence[str], **columns: Any) -> list[float]:
    """1.0 for every grid of 16 digits that is right, else 0.0."""
    size = sudoku.CELLS
    rows = [[int(mark) if mark in "1234" else 0 for mark in text[:size].ljust(size, "0")] for text in completions]
    found = sudoku.is_solved(torch.tensor(rows).numpy() - 1)
    return [float(right and len(text) == size) for right, text in zip(found, completions, strict=True)]


def sudoku_rows(count: int, seed: int, holes: int, held: bool = False) -> list[dict[str, Any]]:
    """Puzzles as prompts."""
    tokenizer = sudoku.sudoku_tokenizer()
    puzzles = sudoku.puzzles(count, seed, held=held, holes=(holes, holes))
    return [{"prompt": text} for text in tokenizer.batch_decode(puzzles)]


def _rows(config: Any, context: TrainingContext) -> tuple[list[dict[str, Any]], Callable[..., Any]]:
    if context.data is None and config.task == "sudoku":
        if config.reward is not None:
            raise BadInputError("A sudoku is its own reward.", "Leave reward out, or give --data.")
        return sudoku_rows(config.items, config.seed, config.holes), sudoku_reward
    return rows_and_reward(config, context)


class CanvasSession(TrainingSession):
    """A session with a masked language model."""

    def load(self) -> Any:
        return load_denoiser(self.context.model).to(getattr(torch, self.config.dtype))

    def read(self) -> tuple[Any, Any]:
        if self.config.lora_r and self.context.model is None:
            raise BadInputError("The network that ships is small: all of it is trained.", "Leave lora_r out.")
        model = self.load()  # first: what it is becomes known to the Auto classes by this
        weights = str(weights_folder(CanvasSampler.weights))
        tokenizer = load_tokenizer(weights if self.context.model is None else self.context.model)
        if getattr(model.config, "mask_token_id", None) is None:
            model.config.mask_token_id = tokenizer.mask_token_id
        return model, tokenizer

    def write_texts(self, model: Any, rows: Sequence[Any]) -> list[str]:
        texts, mask = [], mask_token(model)
        for row in rows:
            ids = torch.tensor([row_prompt_ids(self.tokenizer, row)], device=model.device)
            open_ = ids == mask
            inside = bool(open_.any())
            sampler = DenoisingSampler(gen_length=None if inside else self.config.sample_tokens, mask_id=mask)
            found = sampler(model, ids, seeds=[self.config.seed], editable=open_ if inside else None)
            shown = found.final_ids[0, 0 if inside else ids.shape[1] :]
            texts.append(self.tokenizer.decode(shown, skip_special_tokens=True))
        return texts


def train_on_canvases(name: str, config: CanvasTraining, method: Any, context: TrainingContext) -> TrainingResult:
    """Trains and reports.

    Raises:
        BadInputError: bad rows, no reward for data of the user's, or a model without a mask token.
        UnsupportedModelError: a causal model.
    """
    workshop = Workshop(CanvasSession, _rows, DiffusionGRPOTrainer, canvas_pictures, "credit")
    return train_on_rollouts(name, config, method, context, workshop)
