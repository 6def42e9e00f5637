"""ILM's sampler: one token a step, inserted anywhere, until the stop head says that nothing is missing.

From what is there, one softmax scores all pairs of a gap and a token (arXiv 2505.05755)::

    p(k, v | z) = softmax over all open gaps k and tokens v of s[k, v]        stop where softmax(stop)[0] >= threshold

The sampler is called as every canvas sampler is, and leaves a record from which each text on the way can be read again.
The model is an ``InsertionLM``, or any with ``.logits [B, Z, V]`` and ``.stop_logits [B, 2]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from ...core.errors import BadInputError, UnsupportedModelError, check_choices
from ...core.noise import gumbel, open_uniform
from ...core.trace import TokenTrace
from ...decoding.canvas.base import CanvasCall, CanvasSampler
from ...decoding.canvas.trajectory import GrownText, Trajectory
from ...decoding.checks import check_not_empty
from ..any_order.losses import insertion_logps

if TYPE_CHECKING:
    from transformers import GenerationConfig

ORDERS = ("joint", "gap-first", "left-to-right")


def gaps_of(model: Any, ids: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """``[B, Z]`` bool, gaps that a model fills: its own ``open_gaps``, or all but that behind a row's first token."""
    own = getattr(model, "open_gaps", None)
    found: torch.Tensor = own(ids, attention) if own is not None else attention & (attention.cumsum(1) > 1)
    return found


class _Rows(NamedTuple):
    """Texts on the way, ``[B, Z]`` each, padded on the right: ids, what is there, open gaps, the step that inserted a
    token (-1 where given), and the probability of that insertion.
    """

    ids: torch.Tensor
    there: torch.Tensor
    gaps: torch.Tensor
    step: torch.Tensor
    prob: torch.Tensor

    def inserted(
        self, number: int, running: torch.Tensor, anchor: torch.Tensor, token: torch.Tensor, chance: torch.Tensor
    ) -> _Rows:
        """With one more token in each running row, right behind its anchor; ``[B]`` each."""
        ids, there, gaps, step, prob = self
        place = torch.arange(ids.shape[1] + 1, device=ids.device).expand(len(ids), -1)
        # rows that ended keep their tokens: nothing moves in front of a place that they do not reach
        at = torch.where(running, anchor, ids.shape[1])[:, None]
        source = torch.where(place <= at, place, place - 1).clamp(max=ids.shape[1] - 1)
        new = (place == at + 1) & running[:, None]
        beyond = (place == ids.shape[1]) & ~running[:, None]
        there = (there.gather(1, source) | new) & ~beyond
        moved = _Rows(
            torch.where(new, token[:, None], ids.gather(1, source)),
            there,
            (gaps.gather(1, source) | new) & there,
            torch.where(new, number, step.gather(1, source)).masked_fill(~there, -1),
            torch.where(new, chance[:, None], prob.gather(1, source)).masked_fill(~there, 0.0),
        )
        longest = int(there.sum(1).max())
        return _Rows(*(part[:, :longest] for part in moved))


@dataclass
class InsertionSampler(CanvasSampler):
    """Settings of the sampler; ``gen_length`` (or ``max_new_tokens`` of ``generate``) bounds the insertions of a row.

    ``editable [B, P]`` of a call names open gaps, by the tokens on their left; None opens all that the model fills.

    Args:
        order: ``joint`` draws gap and token together, ``gap-first`` the gap and then its token: the same distribution
            where nothing is cut. ``left-to-right`` fills the last open gap alone, for comparison.
        temperature: of all draws; 0 takes the likeliest.
        gap_temperature: of the draw of a gap, for ``gap-first``; None takes ``temperature``.
        top_p: tokens of a gap that are drawn from: the likeliest until their share reaches it; for ``gap-first`` and
            ``left-to-right``.
        stop_threshold: a row ends, for good, where the stop probability reaches it; None draws the end from the head.
        forbidden: ids that are never inserted; None asks the model (padding, CLS, BOS, masks).

    Raises:
        BadInputError: a setting out of range.
    """

    order: str = "joint"
    temperature: float = 1.0
    gap_temperature: float | None = None
    top_p: float = 1.0
    stop_threshold: float | None = 0.9
    forbidden: tuple[int, ...] | None = None

    weights: ClassVar[str] = "star-graphs-ilm"
    writes_masks: ClassVar[bool] = False
    trace_columns: ClassVar[tuple[str, ...]] = ("step", "confidence", "gap")
    station: ClassVar[str] = "architectures"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, order=ORDERS)
        if self.temperature < 0 or (self.gap_temperature or 0) < 0 or not 0 < self.top_p <= 1:
            raise BadInputError("Temperatures are 0 or more, and top_p lies in (0, 1].")
        if self.stop_threshold is not None and not 0 < self.stop_threshold <= 1:
            raise BadInputError(f"stop_threshold lies in (0, 1]; got {self.stop_threshold}.")
        if self.order == "joint" and (self.top_p < 1 or self.gap_temperature is not None):
            raise BadInputError("top_p and gap_temperature need a gap first.", "Set order='gap-first'.")

    # -- a call --------------------------------------------------------------------------------------------------------
    def _canvas(
        self,
        ids: torch.Tensor,
        editable: torch.Tensor | None,
        config: GenerationConfig | None,
        model_kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attention = self._attention(ids, model_kwargs)
        if self._length(config, ids.shape[1]) is None:
            raise BadInputError(
                f"{type(self).__name__} does not know how many tokens it may insert.", "Give gen_length."
            )
        check_not_empty(ids.shape[1])
        runs = attention[:, 0].long() + (attention.int().diff(dim=1) > 0).sum(1)
        if bool((runs > 1).any()):
            raise BadInputError("Padding must be on one side of a text, not inside.")
        return ids, attention, attention if editable is None else self._named(ids, attention, editable)

    def _check_ids(
        self,
        model: Any,
        ids: torch.Tensor,
        attention: torch.Tensor,
        editable: torch.Tensor,
        mask_id: int,
        streamer: Any,
    ) -> None:
        config = model.config.get_text_config()
        if not getattr(config, "stop_head", True):
            raise UnsupportedModelError(f"{type(model).__name__} has no stop head.", "Make it with stop_head=True.")
        self._check_fixed(config, ids[attention], mask_id)
        gaps = gaps_of(model, ids, attention)
        if bool((editable != attention).any()) and bool((editable & ~gaps).any()):
            row, place = (editable & ~gaps).nonzero()[0].tolist()
            raise BadInputError(
                f"The gap behind place {place} of row {row} is one that this model does not fill.",
                "Nothing goes behind the first token, nor into a question unless config.prefix_gaps says so.",
            )
        if not bool((editable & gaps).any(1).all()):
            raise BadInputError("A row has no open gap.", "Leave one open; a BOS token behind CLS will do.")
        self._check_room(config, ids.shape[1], len(ids), streamer)

    def open_positions(self, ids: torch.Tensor, editable: torch.Tensor, mask_id: int) -> torch.Tensor:
        return ids

    def fill(self, call: CanvasCall) -> GrownText:
        assert call.length is not None
        model, device = call.model.model, call.canvas.device
        config = model.config.get_text_config()
        pad = getattr(config, "pad_token_id", None) or 0
        front = (~call.attention).long().argsort(dim=1, stable=True)  # a text grows to the right: padding goes there
        there = call.attention.gather(1, front)
        ids = call.canvas.gather(1, front).masked_fill(~there, pad)
        gaps = (call.editable & gaps_of(model, call.canvas, call.attention)).gather(1, front)
        rows = _Rows(ids, there, gaps, torch.full_like(ids, -1), torch.zeros(ids.shape, device=device))
        running = torch.ones(len(ids), dtype=torch.bool, device=device)
        stopped, counts, chances = torch.zeros_like(running), [], []
        longest = getattr(config, "max_position_embeddings", None)
        for number in range(call.length + 1):
            output = model(input_ids=rows.ids, attention_mask=rows.there.long())
            call.model.forwards += 1
            if getattr(output, "stop_logits", None) is None:
                raise UnsupportedModelError(f"{type(model).__name__} has no stop head.", "Make it with stop_head=True.")
            chance = output.stop_logits.float().softmax(-1)[:, 0]
            chances.append(chance.masked_fill(~running, 0.0))
            ends = running & self._ends(call, chance, running)
            stopped |= ends
            running = running & ~ends
            if isinstance(longest, int) and longest > 0:
                running = running & (rows.there.sum(1) < longest)
            if number == call.length or not bool(running.any()):
                break
            chosen = self._chosen(output.logits, rows.gaps, running, call)
            rows = rows.inserted(number, running, *chosen)
            counts.append(running.long())
            self._draft(call, rows)
        return GrownText(
            final_ids=rows.ids.masked_fill(~rows.there, pad),
            editable=rows.step >= 0,
            attention=rows.there,
            fix_step=rows.step,
            choice_prob=rows.prob,
            counts=torch.stack(counts, 1) if counts else ids.new_zeros(len(ids), 0),
            mask_id=call.mask_id,
            stopped=stopped,
            stop_prob=torch.stack(chances, 1),
        )

    def _draft(self, call: CanvasCall, rows: _Rows) -> None:
        if call.streamer is not None and hasattr(call.streamer, "put_draft"):
            call.streamer.put_draft(rows.ids[0][rows.step[0] >= 0].cpu())

    # -- draws ---------------------------------------------------------------------------------------------------------
    def _ends(self, call: CanvasCall, chance: torch.Tensor, running: torch.Tensor) -> torch.Tensor:
        if self.stop_threshold is not None:
            return chance >= self.stop_threshold
        drawn = torch.ones_like(chance, dtype=torch.float64)
        drawn[running] = call.uniform(running.nonzero()[:, 0])
        return drawn < chance

    def _chosen(
        self, logits: torch.Tensor, gaps: torch.Tensor, running: torch.Tensor, call: CanvasCall
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Anchor, token and probability of each row's insertion, ``[B]``."""
        vocab = logits.shape[-1]
        if self.order == "left-to-right":
            gaps = gaps & (gaps.flip(1).cumsum(1).flip(1) == 1)
        logps = insertion_logps(logits, gaps, self._forbidden(call, vocab, logits.device))
        if self.order == "joint":
            pair = self._drawn(logps.flatten(1), running, call, self.temperature)
            anchor, token = pair // vocab, pair % vocab
        else:
            level = self.temperature if self.gap_temperature is None else self.gap_temperature
            anchor = self._drawn(logps.logsumexp(-1), running, call, level)
            inside = logps.gather(1, anchor[:, None, None].expand(-1, 1, vocab))[:, 0]
            token = self._drawn(self._likeliest(inside), running, call, self.temperature)
        flat = (anchor * vocab + token)[:, None]
        return anchor, token, logps.flatten(1).gather(1, flat)[:, 0].exp()

    def _forbidden(self, call: CanvasCall, vocab: int, device: torch.device) -> torch.Tensor:
        """``[V]`` bool."""
        named = self.forbidden
        if named is None:
            named = getattr(call.model.model.config.get_text_config(), "never_inserted", (call.mask_id,))
        closed = torch.zeros(vocab, dtype=torch.bool, device=device)
        closed[list(named)] = True
        return closed

    def _likeliest(self, logps: torch.Tensor) -> torch.Tensor:
        """``[B, V]`` with minus infinity behind ``top_p``; the likeliest token always stays."""
        if self.top_p == 1:
            return logps
        values, order = logps.log_softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = values.exp().cumsum(-1) - values.exp()
        cut = torch.zeros_like(logps, dtype=torch.bool).scatter(1, order, before >= self.top_p)
        return logps.masked_fill(cut, -torch.inf)

    @staticmethod
    def _drawn(logps: torch.Tensor, running: torch.Tensor, call: CanvasCall, temperature: float) -> torch.Tensor:
        """``[B]`` samples of ``logps [B, N]``; a row's noise counts its own gaps alone, whatever it is padded to."""
        if temperature == 0:
            return logps.argmax(-1)
        noise = torch.full(logps.shape, 0.5, dtype=torch.float64, device=logps.device)
        for row, generator in enumerate(call.generators):
            if bool(running[row]):
                open_ = logps[row] > -torch.inf
                noise[row, open_] = open_uniform(int(open_.sum()), generator=generator, device=logps.device)
        return (logps.double() / temperature + gumbel(noise)).argmax(-1)

    # -- what users see ------------------------------------------------------------------------------------------------
    def traces(self, found: Trajectory) -> list[TokenTrace]:
        """A trace a row of what was inserted: its step, its probability, and how many new tokens stood on its left."""
        traces = []
        for row in range(len(found)):
            steps = found.fix_step[row][found.editable[row]]
            left = (steps[None] < steps[:, None]).tril(-1).sum(1)
            columns = {
                "step": steps.tolist(),
                "confidence": found.choice_prob[row][found.editable[row]].tolist(),
                "gap": left.tolist(),
            }
            traces.append(TokenTrace(found.new_ids(row), columns, station=self.station))
        return traces

    def baseline(self) -> tuple[str, CanvasSampler]:
        return "from left to right", type(self)(order="left-to-right", temperature=self.temperature)

    @classmethod
    def examples(cls) -> dict[str, CanvasSampler]:
        return {"joint": cls(), "the likeliest": cls(temperature=0.0), "gap first": cls(order="gap-first")}
