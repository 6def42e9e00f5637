"""Masked diffusion: all open positions begin as masks, and each step fixes those that the model is surest of.

One step reads the canvas, chooses a token for every mask, ranks the choices and fixes the best as the schedule says::

    z = model(canvas)        y_i = argmax(z_i / T + g_i)        c_i = confidence(z_i, y_i)        canvas[top_n(c)] = y

with Gumbel noise g in float64 (T = 0: none). What varies between methods are small parts: the schedule, the confidence,
a transform of it, and a rule that takes tokens back.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

import torch

from ...core.errors import BadInputError, UnknownNameError
from ...core.noise import gumbel
from .base import CanvasCall, CanvasSampler
from .schedules import CURVES, Schedule, Timetable, make_plan
from .trajectory import Trajectory

RANKS = ("low_confidence", "margin", "entropy", "random")
"""What open positions are ranked by: the choice's probability, its lead over the second token, minus the entropy, or
nothing."""


@dataclass
class StepInfo:
    """Where a step stands; ``[N]`` each, one a ranked position.

    Attributes:
        step, steps: in the whole text.
        block_step, block_steps: in the position's block.
    """

    step: torch.Tensor
    steps: torch.Tensor
    block_step: torch.Tensor
    block_steps: torch.Tensor


class Transform(Protocol):
    """Changes confidences before they are ranked."""

    def __call__(self, confidence: torch.Tensor, tokens: torch.Tensor, at: StepInfo) -> torch.Tensor:
        """``[N]`` confidences of the tokens ``[N]``."""
        ...


@dataclass
class RemaskState:
    """What a rule that takes tokens back sees, after all masks up to the end of each row's block were filled.

    Attributes:
        confidence: ``[B, T]``, that of each position's token when it was chosen; minus infinity where nothing is
            written or the position is not editable.
        in_block: ``[B, T]`` bool, the written positions of the row's present block.
        remaining: ``[B]``, how many of them the schedule leaves open.
    """

    confidence: torch.Tensor
    in_block: torch.Tensor
    remaining: torch.Tensor


class RemaskRule(Protocol):
    """Says which of the written positions are opened again."""

    def __call__(self, state: RemaskState) -> torch.Tensor:
        """``[B, T]`` bool."""
        ...


def top(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """``[B, T]`` bool, the ``counts [B]`` best positions of each row; of equal ones those on the left. Positions of
    minus infinity are never among them.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(1, order, torch.arange(scores.shape[1], device=scores.device) < counts[:, None])
    return chosen & (scores > -torch.inf)


def ranked(logits: torch.Tensor, tokens: torch.Tensor, rank: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The probability of each token and its confidence, float32 ``[N]``.

    Args:
        logits: ``[N, V]`` float32.
        rank: of ``RANKS``; ``random`` gives zeros, which the caller fills.
    """
    total = logits.logsumexp(-1)
    prob = (logits.gather(-1, tokens[:, None])[:, 0] - total).exp()
    if rank == "low_confidence":
        return prob, prob
    if rank == "margin":
        best = (logits.topk(2, -1).values - total[:, None]).exp()
        return prob, best[:, 0] - best[:, 1]
    if rank == "entropy":
        logp = logits - total[:, None]
        return prob, (logp.exp() * logp.clamp(min=-1e30)).sum(-1)
    return prob, torch.zeros_like(prob)


@dataclass
class DenoisingSampler(CanvasSampler):
    """Writes a canvas of masks by confidence.

    Args:
        steps: forward passes for the whole text; None fixes one position a step.
        block_length: the text is written in blocks of so many positions from left to right; None is one block.
        temperature: of the choice of tokens; 0 takes the likeliest.
        remasking: what positions are ranked by, of ``RANKS``.
        schedule: of ``schedules.CURVES``, or an object that plans blocks and steps.
        cfg_scale: weight of guidance against the canvas without its prompt; each step costs two forwards where above 0.
        rank_temperature: of the probabilities that are ranked and recorded; 1 leaves the model's as they are.
        transform: changes confidences before they are ranked.
        remask: takes tokens back; None fixes every token once.
        record_guesses: keep each step's guess of the whole text in the trajectory.

    Raises:
        BadInputError, UnknownNameError: a setting out of range.
    """

    steps: int | None = None
    block_length: int | None = None
    temperature: float = 0.0
    remasking: str = "low_confidence"
    schedule: str | Schedule = field(default="even", metadata={"text": (str,)})
    cfg_scale: float = 0.0
    rank_temperature: float = 1.0
    transform: Transform | None = None
    remask: RemaskRule | None = None
    record_guesses: bool = field(default=False, kw_only=True)

    guided: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remasking not in RANKS:
            raise UnknownNameError("remasking", self.remasking, RANKS)
        if isinstance(self.schedule, str) and self.schedule not in CURVES:
            raise UnknownNameError("schedule", self.schedule, CURVES)
        if self.temperature < 0 or self.cfg_scale < 0 or self.rank_temperature <= 0:
            raise BadInputError("temperature and cfg_scale are 0 or more, and rank_temperature is above 0.")
        if self.gen_length is not None:
            make_plan(self.schedule, self.gen_length, self.steps, self.block_length)

    @classmethod
    def examples(cls) -> dict[str, CanvasSampler]:
        return {
            "one token a step": cls(),
            "blocks": cls(steps=6, block_length=4),
            "random order": cls(steps=6, remasking="random"),
            "margin": cls(steps=6, remasking="margin"),
            "sampled": cls(steps=4, temperature=1.0, remasking="entropy"),
            "guided": cls(steps=4, cfg_scale=0.5),
        }

    def baseline(self) -> tuple[str, CanvasSampler]:
        shared = {item.name for item in fields(DenoisingSampler) if item.init} - {"remask", "transform"}
        return "confidence order", DenoisingSampler(**{name: getattr(self, name) for name in shared})

    # -- a call --------------------------------------------------------------------------------------------------------
    def check_call(self, editable: torch.Tensor) -> None:
        self._plans(editable)

    def _plans(self, editable: torch.Tensor) -> list[Any]:
        lengths = editable.sum(1).tolist()
        known = {n: make_plan(self.schedule, n, self.steps, self.block_length) for n in set(lengths)}
        return [known[n] for n in lengths]

    def fill(self, call: CanvasCall) -> Trajectory:
        table = Timetable.of(self._plans(call.editable), call.canvas.device)
        canvas, editable = call.canvas.clone(), call.editable
        place = editable.long().cumsum(1) - 1  # which open position of its row, from the left
        masked = editable.clone()
        fix_step = torch.full_like(canvas, -1)
        prob = torch.zeros(canvas.shape, dtype=torch.float32, device=canvas.device)
        running = torch.full_like(prob, -torch.inf)
        counts = torch.zeros_like(table.counts)
        events: list[torch.Tensor] = []
        guesses: list[torch.Tensor] = []
        confidences: list[torch.Tensor] = []
        for step in range(table.counts.shape[1]):
            limit = table.limit[:, step]
            open_ = masked & (place < limit[:, None])
            if self.remask is None:
                open_ &= table.counts[:, step, None] > 0  # a row that fixes nothing now draws nothing: seeds are rows'
            wanted = masked if self.record_guesses else open_
            if not bool(wanted.any()):
                if self.record_guesses:
                    guesses.append(canvas.clone())
                    confidences.append(torch.zeros_like(prob))
                continue
            tokens, chance, sure = self._choices(call, canvas, wanted, table, step)
            if self.record_guesses:
                guesses.append(torch.where(wanted, tokens, canvas))
                confidences.append(chance.masked_fill(~wanted, 0.0))  # whatever positions are ranked by
            if self.remask is None:
                placed = top(sure.masked_fill(~open_, -torch.inf), table.counts[:, step])
                after = masked & ~placed
            else:
                written = editable & ~masked
                running = torch.where(open_, sure, running)
                block = (place >= table.first[:, step, None]) & (place < limit[:, None]) & editable
                state = RemaskState(running, block, table.remaining[:, step])
                reopened = self.remask(state) & (open_ | written)
                after = (masked & ~open_) | reopened
                placed = open_ & ~reopened
                running = running.masked_fill(after, -torch.inf)
                self._note(events, step, canvas, torch.where(after, call.mask_id, torch.where(placed, tokens, canvas)))
            counts[:, step] = masked.sum(1) - after.sum(1)
            canvas = torch.where(after & editable, call.mask_id, torch.where(placed, tokens, canvas))
            fix_step = torch.where(placed, step, fix_step.masked_fill(after, -1))
            prob = torch.where(placed, chance, prob.masked_fill(after, 0.0))
            masked = after
            call.draft(canvas)
        return Trajectory(
            canvas,
            editable,
            call.attention,
            fix_step,
            prob,
            counts,
            call.mask_id,
            None if self.remask is None else torch.cat(events) if events else canvas.new_zeros(0, 5),
            torch.stack(guesses, 1) if guesses else None,
            torch.stack(confidences, 1) if confidences else None,
        )

    @staticmethod
    def _note(events: list[torch.Tensor], step: int, before: torch.Tensor, after: torch.Tensor) -> None:
        row, position = (before != after).nonzero(as_tuple=True)
        events.append(
            torch.stack([torch.full_like(row, step), row, position, before[row, position], after[row, position]], 1)
        )

    def _choices(
        self, call: CanvasCall, canvas: torch.Tensor, wanted: torch.Tensor, table: Timetable, step: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token, its probability and its confidence at the wanted positions, ``[B, T]`` each."""
        rows = wanted.nonzero(as_tuple=True)[0]
        logits = call.model.logits(canvas, call.attention, wanted)
        if self.cfg_scale:
            bare = torch.where(call.attention, call.mask_id, canvas)
            bare = torch.where(call.editable, canvas, bare)
            without = call.model.logits(bare, call.attention, wanted)
            logits = torch.where(logits == -torch.inf, logits, without + (1 + self.cfg_scale) * (logits - without))
        if self.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            noise = gumbel(call.uniform(rows, logits.shape[-1]))
            tokens = (logits.double() / self.temperature + noise).argmax(-1)
        shown = logits if self.rank_temperature == 1 else logits / self.rank_temperature
        chance, sure = ranked(shown, tokens, self.remasking)
        if self.remasking == "random":
            sure = call.uniform(rows).float()
        if self.transform is not None:
            at = StepInfo(
                torch.full_like(rows, step),
                table.steps[rows],
                table.block_step[rows, step],
                table.block_steps[rows, step],
            )
            sure = self.transform(sure, tokens, at)
        found = torch.zeros_like(canvas)
        found[wanted] = tokens
        both = torch.zeros(2, *canvas.shape, dtype=torch.float32, device=canvas.device)
        both[0][wanted], both[1][wanted] = chance, sure
        return found, both[0], both[1]
