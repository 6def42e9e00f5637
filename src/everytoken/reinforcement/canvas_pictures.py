"""What a recipe decides about a group of rollouts that were written in any order: credit of every token, and steps."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..core.trace import TokenTrace
from ..decoding.canvas.replay import replay_html
from ..decoding.canvas.trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .diffusion_trainer import DiffusionGRPOTrainer
    from .rollouts import Row

COLUMNS = ("credit", "step", "probability", "logp")
"""Of a trace."""


@dataclass
class Judged:
    """A group of rollouts as training would make and judge them.

    Attributes:
        found: the record.
        rewards: ``[B]``.
        credit: ``[B, C]``, how much a rise of the token's log-probability lowers the loss of its rollout: its advantage
            over the number of tokens in the mean, summed over the steps that are trained.
        logps: ``[B, C]``, the recipe's log-likelihoods of the tokens; a mean over the steps that are trained.
        logp: its mean over tokens.
        loss: of the group.
        forwards: passes over the rows of the group that a loss takes, once for every row.
    """

    found: Trajectory
    rewards: torch.Tensor
    credit: torch.Tensor
    logps: torch.Tensor
    logp: float
    loss: float
    forwards: float


def judged(trainer: DiffusionGRPOTrainer, row: Row) -> Judged:
    """Rollouts of one prompt; nothing is trained."""
    logged = {key: list(values) for key, values in trainer._metrics["train"].items()}
    if not hasattr(trainer, "current_gradient_accumulation_steps"):  # no step was left to train
        trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    try:
        with torch.no_grad():
            batch = trainer._generate_and_score_completions([copy.copy(row) for _ in range(trainer.num_generations)])
            loss = float(trainer._compute_loss(trainer.model, batch))
            rows = trainer._canvas_rows(batch)
            estimate = trainer._piece("likelihood")(trainer._bare(trainer.model), rows, trainer.temperature)
    finally:
        trainer._metrics["train"].clear()
        trainer._metrics["train"].update(logged)
    found = trainer._found
    assert found is not None
    mask, advantages = batch["tool_mask"].float(), batch["advantages"]
    advantages = advantages if advantages.dim() == 2 else advantages[:, None]
    share = advantages * mask / mask.sum(1, keepdim=True).clamp(min=1)
    credit = torch.zeros(found.final_ids.shape, device=share.device)
    credit[:, trainer._width :].index_add_(0, batch["rollout"], share)
    logps = torch.zeros_like(credit).index_add_(0, batch["rollout"], estimate.per_position)
    count = torch.zeros_like(credit).index_add_(0, batch["rollout"], rows.scored.float())
    logp = float(estimate.per_position.sum() / rows.scored.sum())
    per_row = len(batch["rollout"]) / len(found)
    return Judged(
        found, trainer.sequence_rewards(), credit, logps / count.clamp(min=1), logp, loss, estimate.forwards * per_row
    )


def canvas_traces(group: Judged, tokenizer: PreTrainedTokenizerBase, name: str = "") -> list[TokenTrace]:
    """A trace a rollout of the tokens that were written: ``credit``, the ``step`` that wrote each, its ``probability``
    then, and the recipe's log-likelihood ``logp``.
    """
    traces = []
    values_of = (group.credit, group.found.fix_step, group.found.choice_prob, group.logps)
    for number, reward in enumerate(group.rewards.tolist()):
        own = group.found.editable[number]
        title = f"{name}{', ' if name else ''}rollout {number + 1}, reward {reward:.4g}"
        trace = TokenTrace(group.found.new_ids(number), title=title[:1].upper() + title[1:], station="reinforcement")
        for column, values in zip(COLUMNS, values_of, strict=True):
            trace.add(column, values[number][own].cpu())
        traces.append(trace.with_text(tokenizer))
    return traces


def canvas_pictures(
    trainer: DiffusionGRPOTrainer, row: Row, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[TokenTrace], dict[str, str]]:
    """Rollouts of one prompt with the credit of every token, and every step of the first of them.

    Args:
        row: of the data.

    Returns:
        A trace a rollout, and title -> HTML.
    """
    group = judged(trainer, row)
    picture = replay_html(group.found, 0, tokenizer)
    return canvas_traces(group, tokenizer), {"The first rollout, step by step": picture}
