"""What all trainers of this station share on top of TRL's GRPOTrainer: rewards as they were given, a batch of rollouts
as plain tensors, and errors that leave the batch behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from trl import GRPOTrainer

from ..core.errors import BadInputError, EverytokenError
from ..training.checkpoints import ResumingMixin
from ..training.distributed import LaunchedMixin
from ..training.finite_check import save_batch, stopped
from .base import RolloutBatch

if TYPE_CHECKING:
    from datasets import Dataset


class RewardError(EverytokenError, RuntimeError):
    """A reward function failed; the batch that it failed on is saved."""


class Rollouts(NamedTuple):
    """This process's rollouts.

    Attributes:
        ids, attention: ``[B, P + T]``, prompt and completion.
        mask: ``[B, T]`` bool, the tokens that the policy chose.
    """

    ids: torch.Tensor
    attention: torch.Tensor
    mask: torch.Tensor

    @property
    def length(self) -> int:
        return self.mask.shape[1]


def rollouts_of(batch: dict[str, Any]) -> Rollouts:
    """The rollouts in a batch of TRL's."""
    mask = batch["completion_mask"].bool()
    if "tool_mask" in batch:
        mask = mask & batch["tool_mask"].bool()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    return Rollouts(ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1), mask)


Row = dict[str, Any]
"""A row of the data."""


@dataclass
class Writer:
    """What a piece writes rollouts with.

    Attributes:
        tokenize: rows -> ids of their prompts.
        write: ids of texts and a number of tokens -> what the policy adds to each, to its end token at most.
        score: prompts and completions -> log-probabilities of every completion's tokens, as the loss has them.
        count, data: how many rows the data have, and index -> row, with its prompt as the recipe makes it.
        limit: tokens of a completion at most.
        group: completions of one prompt.
        ends: end tokens.
        step: optimiser steps done.
    """

    tokenize: Callable[[Sequence[Row]], list[list[int]]]
    write: Callable[[list[list[int]], int], list[list[int]]]
    score: Callable[[list[list[int]], list[list[int]]], list[list[float]]]
    count: int
    data: Callable[[int], Row]
    limit: int
    group: int
    ends: frozenset[int]
    step: int


class Written(NamedTuple):
    """What a piece wrote, as many rows as it was given and groups of one prompt side by side.

    Attributes:
        rows: of the data.
        completions: their ids.
        logps: of their tokens under the policy that wrote them, or None: then the policy as it is now is taken.
    """

    rows: list[Row]
    completions: list[list[int]]
    logps: list[list[float]] | None = None


@dataclass
class Watch:
    """What a trainer sees of the rollouts while one watches it.

    Attributes:
        batch: the rollouts, where pieces decide about them once a batch.
        columns: name -> ``[B, T]``: ``weight`` and ``kept`` of the batch; ``entropy``, the clip bounds ``low`` and
            ``high`` and ``ratio_weight`` of the update.
    """

    batch: RolloutBatch | None = None
    columns: dict[str, torch.Tensor] = field(default_factory=dict)


def check_columns(trainer: str, dataset: Dataset) -> set[str]:
    """The columns of the data.

    Raises:
        BadInputError: a column of tools, which no rollout would see.
    """
    columns = set(getattr(dataset, "column_names", None) or ())
    if "tools" in columns:
        raise BadInputError(
            "Rollouts are written without the tools of a data column: TRL does not read it.",
            f"Give functions that can be called, {trainer}(tools=...), and leave the column out.",
        )
    return columns


class RolloutTrainer(ResumingMixin, LaunchedMixin, GRPOTrainer):
    """GRPOTrainer that keeps the rewards of a batch, and saves a batch on which it must stop.

    Raises:
        RewardError: while training: a reward function raised, or gave an infinite reward.
        NonFiniteLossError: while training. In both cases the batch is in ``output_dir/bad_batch.json``, and training
            can go on from the last checkpoint.
    """

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, *args: Any, **kwargs: Any) -> Any:
        rows = [{"prompt": p, "completion": c} for p, c in zip(prompts, completions, strict=True)]
        hint = "Mend the reward function and train again: it goes on from the last checkpoint."
        try:
            self._rewards: torch.Tensor = super()._calculate_rewards(inputs, prompts, completions, *args, **kwargs)
        except EverytokenError:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            path = save_batch(self, rows, error=why)
            raise RewardError(f"A reward function failed ({why}); the batch is saved in {path}.", hint) from error
        if (infinite := self._rewards.isinf().any(0)).any():
            name = self.reward_func_names[int(infinite.nonzero()[0])]
            path = save_batch(self, rows, error=f"{name} gave an infinite reward")
            raise RewardError(f"{name} gave an infinite reward; the batch is saved in {path}.", hint)
        return self._rewards

    def sequence_rewards(self) -> torch.Tensor:
        """The weighted rewards of the last batch, ``[N]`` of all processes; NaN where no function scored a row."""
        summed = (self._rewards * self.reward_weights.to(self._rewards.device)).nansum(1)
        return summed.masked_fill(self._rewards.isnan().all(1), float("nan"))

    def own_rows(self, values: torch.Tensor, rows: int) -> torch.Tensor:
        """This process's part of values of all processes, each of which has as many rows."""
        first = self.accelerator.process_index * rows
        return values[first : first + rows]

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        if not torch.isfinite(loss):
            texts = [self.processing_class.batch_decode(inputs[name]) for name in ("prompt_ids", "completion_ids")]
            rows = zip(*texts, inputs["advantages"].tolist(), strict=True)
            raise stopped(self, loss.item(), [{"prompt": p, "completion": c, "advantages": a} for p, c, a in rows])
        return loss

    def _keep_state(self, name: str, state: Any, trial: Any) -> None:
        """Writes a file into the checkpoint that is about to be saved."""
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(state, folder / name)

    def _kept_state(self, checkpoint: str, name: str, what: str, hint: str) -> Any:
        """What ``_keep_state`` wrote.

        Raises:
            BadInputError: the checkpoint has no such file; ``what`` goes on after its name.
        """
        path = Path(checkpoint) / name
        if not path.is_file():
            raise BadInputError(f"{path.parent} has no {name}{what}.", hint)
        return torch.load(path, map_location="cpu", weights_only=True)

    def _log(self, name: str, values: torch.Tensor, mode: str) -> None:
        self._metrics[mode][name].append(self.accelerator.gather(values.float()).mean().item())
