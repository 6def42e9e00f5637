"""ILM's sampler: one token a step, inserted anywhere, until the stop head says that nothing is missing.

From what is there, one softmax scores all pairs of a gap and a token (arXiv 2505.05755)::

    p(k, v | z) = softmax over all open gaps k and tokens v of s[k, v]        stop where softmax(stop)[0] >= threshold

The first token of a row (CLS) carries the stop head; behind it nothing is ever inserted. A training that fits is
``any_order.losses.insertion_loss`` on ``AnyOrderLM(stop_head=True)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...core.errors import BadInputError, UnsupportedModelError, check_choices
from ...core.noise import gumbel, open_uniform, row_generators
from ...decoding.canvas.model import evaluating
from ..any_order.losses import insertion_logps


@dataclass
class Inserted:
    """What a sampler wrote, ``B`` rows padded on the right to ``Z`` tokens.

    Attributes:
        ids: ``[B, Z]``.
        attention: ``[B, Z]`` bool.
        step: ``[B, Z]``, the step that inserted a token; -1 where it was given.
        prob: ``[B, Z]`` float32, the probability of that insertion among all of its step; 0 where given.
        stopped: ``[B]`` bool, rows that the stop head ended; the others reached ``max_new_tokens``.
        forwards: forward passes.
    """

    ids: torch.Tensor
    attention: torch.Tensor
    step: torch.Tensor
    prob: torch.Tensor
    stopped: torch.Tensor
    forwards: int

    def row(self, number: int) -> list[int]:
        """A row's ids without padding."""
        found: list[int] = self.ids[number][self.attention[number]].tolist()
        return found


@dataclass
class InsertionSampler:
    """Settings of the sampler.

    Args:
        max_new_tokens: insertions of a row at most; enforced, unlike in the released code.
        order: ``joint`` draws gap and token together, ``gap-first`` the gap and then its token: the same distribution
            at a temperature of 1.
        temperature: of all draws; 0 takes the likeliest.
        stop_threshold: a row ends, for good, where the stop probability reaches it.
        forbidden: ids that are never inserted (padding, CLS, BOS, masks).

    Raises:
        BadInputError: a setting out of range.
    """

    max_new_tokens: int = 32
    order: str = "joint"
    temperature: float = 1.0
    stop_threshold: float = 0.9
    forbidden: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_choices(self, order=("joint", "gap-first"))
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.stop_threshold <= 1:
            raise BadInputError("max_new_tokens is 1 or more, temperature 0 or more, stop_threshold in (0, 1].")

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        seeds: Sequence[int] | torch.Tensor,
        closed_gaps: torch.Tensor | None = None,
    ) -> Inserted:
        """Inserts until every row ends.

        Args:
            model: with ``.logits [B, Z, V]`` and ``.stop_logits [B, 2]``.
            input_ids: ``[B, Z]``, a CLS token first, padded on the right.
            seeds: one a row.
            closed_gaps: ``[B, Z]`` bool, tokens behind which nothing is inserted; CLS is one of them anyway.

        Raises:
            BadInputError: shapes that do not fit, padding elsewhere, or a row whose gaps are all closed.
            UnsupportedModelError: a model without a stop head.
        """
        ids = input_ids.clone()
        there = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        closed = torch.zeros_like(there) if closed_gaps is None else closed_gaps.bool()
        if there.shape != ids.shape or closed.shape != ids.shape:
            raise BadInputError(f"attention_mask and closed_gaps must be as input_ids, {list(ids.shape)}.")
        if bool((there.int().diff(dim=1) > 0).any()):
            raise BadInputError("Padding must be on the right: a text grows inside.")
        closed = closed.clone()
        closed[:, 0] = True
        if bool((~(there & ~closed).any(1)).any()):
            raise BadInputError("A row has no open gap.", "Leave one token open; a BOS token behind CLS will do.")
        generators = row_generators(seeds, len(ids), ids.device)
        step_of = torch.full_like(ids, -1)
        prob = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        stopped = torch.zeros_like(running)
        forwards = 0
        with evaluating(model):
            for number in range(self.max_new_tokens + 1):
                output = model(input_ids=ids, attention_mask=there.long())
                forwards += 1
                if output.stop_logits is None:
                    raise UnsupportedModelError(
                        f"{type(model).__name__} has no stop head.", "Make it with stop_head=True."
                    )
                ends = output.stop_logits.float().softmax(-1)[:, 0] >= self.stop_threshold
                stopped |= running & ends
                running = running & ~ends
                if number == self.max_new_tokens or not bool(running.any()):
                    break
                anchor, token, chance = self._chosen(output.logits, there & ~closed, running, generators)
                place = torch.arange(ids.shape[1] + 1, device=ids.device).expand(len(ids), -1)
                # rows that ended keep their tokens: nothing moves in front of a place that they do not reach
                at = torch.where(running, anchor, ids.shape[1])[:, None]
                source = torch.where(place <= at, place, place - 1).clamp(max=ids.shape[1] - 1)
                new = (place == at + 1) & running[:, None]
                beyond = (place == ids.shape[1]) & ~running[:, None]
                ids = torch.where(new, token[:, None], ids.gather(1, source))
                there = (there.gather(1, source) | new) & ~beyond
                closed = closed.gather(1, source) & ~new
                step_of = torch.where(new, number, step_of.gather(1, source)).masked_fill(~there, -1)
                prob = torch.where(new, chance[:, None], prob.gather(1, source)).masked_fill(~there, 0.0)
                longest = int(there.sum(1).max())
                ids, there, closed, step_of, prob = (x[:, :longest] for x in (ids, there, closed, step_of, prob))
        return Inserted(ids, there, step_of, prob, stopped, forwards)

    def _chosen(
        self, logits: torch.Tensor, gaps: torch.Tensor, running: torch.Tensor, generators: list[torch.Generator]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Anchor, token and probability of each row's insertion, ``[B]``."""
        vocab = logits.shape[-1]
        closed = torch.zeros(vocab, dtype=torch.bool, device=logits.device)
        closed[list(self.forbidden)] = True
        logps = insertion_logps(logits, gaps, closed)
        if self.order == "joint":
            pair = self._drawn(logps.flatten(1), running, generators)
            anchor, token = pair // vocab, pair % vocab
        else:
            anchor = self._drawn(logps.logsumexp(-1), running, generators)
            inside = logps.gather(1, anchor[:, None, None].expand(-1, 1, vocab))[:, 0]
            token = self._drawn(inside, running, generators)
        flat = (anchor * vocab + token)[:, None]
        return anchor, token, logps.flatten(1).gather(1, flat)[:, 0].exp()

    def _drawn(self, logps: torch.Tensor, running: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """``[B]`` samples of ``logps [B, N]``; a row's noise counts its own gaps alone, whatever it is padded to."""
        if self.temperature == 0:
            return logps.argmax(-1)
        noise = torch.full(logps.shape, 0.5, dtype=torch.float64, device=logps.device)
        for row, generator in enumerate(generators):
            if bool(running[row]):
                open_ = logps[row] > -torch.inf
                noise[row, open_] = open_uniform(int(open_.sum()), generator=generator, device=logps.device)
        return (logps.double() / self.temperature + gumbel(noise)).argmax(-1)
