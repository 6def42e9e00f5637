"""What a canvas sampler leaves behind: enough to rebuild every canvas that the model saw, without a copy of each."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...core.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Trajectory:
    """The record of one call, ``B`` canvases of ``T`` positions and ``S`` steps.

    Attributes:
        final_ids: ``[B, T]``, the prompt included.
        editable: ``[B, T]`` bool, the positions that the sampler wrote.
        attention: ``[B, T]`` bool, False where a row is padded.
        fix_step: ``[B, T]``, the step that placed the final token; -1 outside of ``editable``.
        choice_prob: ``[B, T]`` float32, the probability of that token when it was chosen; 0 outside.
        counts: ``[B, S]``, how many positions each step left fixed that were open before it.
        mask_id: what stands where nothing is written yet.
        events: ``[N, 5]`` of (step, row, position, old id, new id), in the order of steps, where tokens could be taken
            back; None where every token was placed once.
        guesses: ``[B, S, T]``, each step's guess of the whole text, where it was asked for.
        confidence: ``[B, S, T]`` float32, the confidence in the guess at open positions, 0 elsewhere; with ``guesses``.
        forwards: forward passes that the model made for it.
    """

    final_ids: torch.Tensor
    editable: torch.Tensor
    attention: torch.Tensor
    fix_step: torch.Tensor
    choice_prob: torch.Tensor
    counts: torch.Tensor
    mask_id: int
    events: torch.Tensor | None = None
    guesses: torch.Tensor | None = None
    confidence: torch.Tensor | None = None
    forwards: int = 0

    grows: ClassVar[bool] = False
    """Whether an open position is not there at all, so that the text grows, rather than a mask that the model reads."""

    def __post_init__(self) -> None:
        shape = tuple(self.final_ids.shape)
        if self.final_ids.dim() != 2:
            raise BadInputError(f"final_ids must be [B, T]; got {list(shape)}.")
        for name in ("editable", "attention", "fix_step", "choice_prob"):
            if tuple(getattr(self, name).shape) != shape:
                found = list(getattr(self, name).shape)
                raise BadInputError(f"{name} has the shape {found}, and final_ids {list(shape)}.")
        if self.counts.dim() != 2 or len(self.counts) != shape[0]:
            raise BadInputError(f"counts must be [B, S] with B={shape[0]}; got {list(self.counts.shape)}.")
        for name in ("guesses", "confidence"):
            value, wanted = getattr(self, name), (shape[0], self.steps, shape[1])
            if value is not None and tuple(value.shape) != wanted:
                raise BadInputError(f"{name} must be [B, S, T], {list(wanted)}; got {list(value.shape)}.")

    def __len__(self) -> int:
        return len(self.final_ids)

    @property
    def steps(self) -> int:
        """S."""
        return int(self.counts.shape[1])

    def state(self, step: int) -> torch.Tensor:
        """The canvas ``[B, T]`` that the model read at a step; ``state(S)`` is the final text.

        Raises:
            BadInputError: no such step.
        """
        if not 0 <= step <= self.steps:
            raise BadInputError(f"There are {self.steps} steps; step {step} is none of them.", f"0 to {self.steps}.")
        if self.events is None:
            return self.final_ids.masked_fill(self.editable & (self.fix_step >= step), self.mask_id)
        canvas = self.final_ids.masked_fill(self.editable, self.mask_id)
        for number in range(step):  # a later change of a position wins over an earlier one
            _, row, position, _, new = self.events[self.events[:, 0] == number].unbind(1)
            canvas[row, position] = new
        return canvas

    def states(self) -> Iterator[torch.Tensor]:
        """``state(0)`` to ``state(S)``."""
        canvas = self.state(0)
        yield canvas
        for number in range(self.steps):
            if self.events is None:
                canvas = self.state(number + 1)
            else:
                _, row, position, _, new = self.events[self.events[:, 0] == number].unbind(1)
                canvas = canvas.clone()
                canvas[row, position] = new
            yield canvas

    @property
    def revisions(self) -> torch.Tensor:
        """``[B, T]``, how often a token was taken back at each position."""
        found = torch.zeros_like(self.fix_step)
        if self.events is not None:
            _, row, position, old, _ = self.events[self.events[:, 3] != self.mask_id].unbind(1)
            found.index_put_((row, position), torch.ones_like(old), accumulate=True)
        return found

    def new_ids(self, row: int) -> list[int]:
        """The ids that were written in a row, from left to right."""
        found: list[int] = self.final_ids[row][self.editable[row]].tolist()
        return found

    def rows(self, chosen: slice | torch.Tensor) -> Trajectory:
        """The same record of some of the rows."""
        index = torch.arange(len(self), device=self.final_ids.device)[chosen]
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and name != "events":
                values[name] = value[index]
        if self.events is not None:
            place = torch.full((len(self),), -1, device=index.device)
            place[index] = torch.arange(len(index), device=index.device)
            kept = self.events[place[self.events[:, 1]] >= 0].clone()
            kept[:, 1] = place[kept[:, 1]]
            values["events"] = kept
        return type(self)(**values)


@dataclass
class GrownText(Trajectory):
    """The record of a sampler that inserts. Positions are those of the final text; one that is open at a step was not
    there yet, and ``text`` leaves it out.

    Attributes:
        stopped: ``[B]`` bool, rows that ended by themselves; the others reached their length.
        stop_prob: ``[B, S + 1]`` float32, the probability that nothing is missing, at each text; 0 after a row's end.
    """

    stopped: torch.Tensor | None = None
    stop_prob: torch.Tensor | None = None
    grows: ClassVar[bool] = True

    def text(self, row: int, step: int | None = None) -> list[int]:
        """The ids of a row that the model read at a step; the whole text for None."""
        there = self.attention[row] & (self.fix_step[row] < (self.steps if step is None else step))
        found: list[int] = self.final_ids[row][there].tolist()
        return found
