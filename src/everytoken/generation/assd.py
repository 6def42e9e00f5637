"""ASSD: any-subset speculative decoding (arXiv 2504.20456), exact samples from a model of two streams.

A two-stream model (``AnyOrderLM(streams=2)``, XLNet) gives many conditionals in one forward, in two ways. With n tokens
fixed, its draft ``q_j = p(x_{n+j} | the n fixed)`` is independent for each of the next k positions. Shown a filled-in
draft, its oracle ``p_j = p(x_{n+j} | all earlier ones)`` is the chain itself. A round draws ``x_j ~ q_j``, keeps each
while ``u < p_j(x_j) / q_j(x_j)``, and at the first refusal draws from ``max(p_j - q_j, 0)``. Its texts have exactly the
joint distribution of sampling one by one; since ``p_0 = q_0`` every round fixes two tokens or more with two forwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..core.errors import BadInputError, UnsupportedModelError
from ..core.noise import gumbel
from ..decoding.canvas.base import CanvasCall, CanvasSampler
from ..decoding.canvas.orders import order_mask, subset_order
from ..decoding.canvas.trajectory import Trajectory
from ..decoding.inputs import takes


@dataclass
class AnySubsetSpeculative(CanvasSampler):
    """ASSD's settings.

    Args:
        k: positions that a round drafts, at least 2.
        temperature: of draft and oracle alike; 0 takes the likeliest and keeps a draft where the oracle agrees.
        bonus: where all k drafts are kept, draw one more from the oracle, whose forward is paid already (an extension
            of ours).

    Raises:
        BadInputError: a k below 2, with which nothing is gained, or a negative temperature.
    """

    k: int = 5
    temperature: float = 1.0
    bonus: bool = False

    weights: ClassVar[str] = "sudoku-any-subset"
    writes_masks: ClassVar[bool] = False
    least: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < self.least:
            raise BadInputError(f"k must be at least 2, or every token costs two forwards; got {self.k}.")
        if self.temperature < 0:
            raise BadInputError(f"temperature is 0 or more; got {self.temperature}.")

    @classmethod
    def examples(cls) -> dict[str, CanvasSampler]:
        found: dict[str, CanvasSampler] = {f"k={k}": cls(k=k) for k in (2, 3, 8)}
        return found | {"greedy": cls(temperature=0.0), "bonus": cls(bonus=True)}

    def baseline(self) -> tuple[str, CanvasSampler]:
        shared = {"gen_length", "mask_id", "shift_logits", "check", "temperature"}
        return "one by one", AnySubsetSequential(**{name: getattr(self, name) for name in shared})

    def check_call(self, editable: torch.Tensor) -> None:
        if bool(editable.all(1).any()):
            raise BadInputError("A row knows no token, so its first one would have no context.", "Give a first token.")

    def _probs(
        self, call: CanvasCall, canvas: torch.Tensor, mask: torch.Tensor, where: torch.Tensor, real: torch.Tensor
    ) -> torch.Tensor:
        """``[B, K, V]`` probabilities at positions ``where [B, K]``, float64; any where ``real [B, K]`` is False."""
        # a position that is named twice would count twice: XLNet adds up the rows of its target mapping
        target = torch.nn.functional.one_hot(where, canvas.shape[1]) * real[..., None]
        target = target.float()
        inputs: dict[str, Any] = {"input_ids": canvas, "perm_mask": mask, "target_mapping": target}
        if not bool(call.attention.all()):
            inputs["attention_mask"] = call.attention.long()
        logits = call.model.model(**inputs).logits.double()
        call.model.forwards += 1
        logits[..., call.mask_id] = -torch.inf  # before the softmax, in draft and oracle alike
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
        found: torch.Tensor = (logits / self.temperature).softmax(-1)
        return found

    @staticmethod
    def _drawn(call: CanvasCall, probs: torch.Tensor) -> torch.Tensor:
        """``[B, K]`` samples of ``probs [B, K, V]``, each row's by its own generator."""
        rows = torch.arange(len(probs), device=probs.device).repeat_interleave(probs.shape[1])
        noise = call.uniform(rows, probs.shape[-1]).view_as(probs)
        return (probs.log() + gumbel(noise)).argmax(-1)

    def fill(self, call: CanvasCall) -> Trajectory:
        """Rounds until every row is full.

        Raises:
            UnsupportedModelError: a model of one stream.
        """
        if not takes(call.model.model, "perm_mask") or getattr(call.model.model.config, "streams", 2) != 2:
            raise UnsupportedModelError(
                f"{type(call.model.model).__name__} has one stream, and ASSD asks for a query stream.",
                "Take AnyOrderLM(streams=2), or XLNet.",
            )
        canvas, editable = call.canvas.clone(), call.editable
        rows, length = canvas.shape
        known = ~editable
        ranks = subset_order(known)
        order = ranks.argsort(1)
        done = known.sum(1)
        fix_step = torch.full_like(canvas, -1)
        prob = torch.zeros(canvas.shape, dtype=torch.float32, device=canvas.device)
        counts: list[torch.Tensor] = []
        ahead = torch.arange(self.k + self.bonus, device=canvas.device)
        while bool((done < length).any()):
            place = done[:, None] + ahead
            where = order.gather(1, place.clamp(max=length - 1))
            real = place < length
            drafts = (ahead < self.k) & real
            q = self._probs(call, canvas, order_mask(ranks, known, done), where[:, : self.k], real[:, : self.k])
            tokens = self._drawn(call, q)
            filled = canvas.clone()
            row, column = drafts[:, : self.k].nonzero(as_tuple=True)
            filled[row, where[row, column]] = tokens[row, column]
            p = q
            if bool((drafts.sum(1) > 1).any()):  # a last single token is as the oracle would draw it
                p = self._probs(call, filled, order_mask(ranks, known), where, real)
            token_p, token_q = (item[:, : self.k].gather(-1, tokens[..., None])[..., 0] for item in (p, q))
            lucky = call.uniform(torch.arange(rows, device=canvas.device).repeat_interleave(self.k)).view(rows, -1)
            kept = (lucky < token_p / token_q) | (ahead[: self.k] == 0)
            kept = (kept & drafts[:, : self.k]).long().cumprod(1).bool()
            accepted = kept.sum(1)
            first = accepted.clamp(max=p.shape[1] - 1)
            wanted = (accepted < drafts.sum(1)) | (self.bonus & (accepted == self.k) & (done + self.k < length))
            at = first[:, None, None].expand(-1, 1, p.shape[-1])
            rest = p.gather(1, at)
            refused = (accepted < drafts.sum(1))[:, None, None]
            behind = q.gather(1, at.clamp(max=self.k - 1))
            residual = torch.where(refused, (rest - behind).clamp(min=0), rest)
            residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, rest)
            extra = self._drawn(call, residual / residual.sum(-1, keepdim=True))[:, 0]
            step = len(counts)
            for mask, value, chance in (
                (kept, tokens, token_p),
                (
                    torch.nn.functional.one_hot(first, p.shape[1]).bool() & wanted[:, None],
                    extra[:, None].expand(-1, p.shape[1]),
                    rest[:, 0].gather(1, extra[:, None]).expand(-1, p.shape[1]),
                ),
            ):
                row, column = mask.nonzero(as_tuple=True)
                spot = where[row, column]
                canvas[row, spot], fix_step[row, spot] = value[row, column], step
                prob[row, spot] = chance[row, column].float()
            fixed = accepted + wanted
            counts.append(fixed)
            done = done + fixed
            call.draft(canvas)
        return Trajectory(canvas, editable, call.attention, fix_step, prob, torch.stack(counts, 1), call.mask_id)


@dataclass
class AnySubsetSequential(AnySubsetSpeculative):
    """The same order one token after the other, a forward each: what ASSD must equal in distribution.

    Args:
        temperature: 0 takes the likeliest.
    """

    k: int = field(default=1, init=False)
    bonus: bool = field(default=False, init=False)

    least: ClassVar[int] = 1

    @classmethod
    def examples(cls) -> dict[str, CanvasSampler]:
        return {"one by one": cls(), "greedy": cls(temperature=0.0)}


def forwards_by_row(found: Trajectory, k: int) -> list[int]:
    """How many forwards each row of a record would have cost alone: two a round, one for a single last token."""
    left = found.editable.sum(1, keepdim=True) - torch.cat([0 * found.counts[:, :1], found.counts.cumsum(1)[:, :-1]], 1)
    spent: list[int] = ((left > 0).long() + (left.clamp(max=k) > 1).long()).sum(1).tolist()
    return spent


@torch.no_grad()
def subset_logps(model: Any, ids: torch.Tensor, known: torch.Tensor, mask_id: int | None = None) -> torch.Tensor:
    """``[B, T]``, ``log p(x_i | known, open ones on the left)`` at the open positions, 0 elsewhere; one forward.

    Args:
        ids: ``[B, T]``.
        known: ``[B, T]`` bool.
        mask_id: a token that is never predicted.
    """
    every = torch.eye(ids.shape[1], device=ids.device).expand(len(ids), -1, -1)
    mask = order_mask(subset_order(known), known)
    logits = model(input_ids=ids, perm_mask=mask, target_mapping=every).logits.float()
    if mask_id is not None:
        logits[..., mask_id] = -torch.inf
    found: torch.Tensor = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0].masked_fill(known, 0.0)
    return found
