"""THR: Token Hidden Reward (arXiv 2510.03669).

To first order in the output matrix, a step on one token changes the likelihood of a group's correct responses P by::

    THR_{j,t} = (2 r_j - 1) sum_{i in P} 1/|y_i| sum_k <g_{i,k}, g_{j,t}> <h_{i,k}, h_{j,t}>

with last hidden states h and prediction errors g = onehot(y) - p. Tokens of small |THR| are left out, and one knob p
steers the others, towards exploitation (p > 0) or exploration (p < 0)::

    A'_{j,t} = 1[|THR| > tau] (1 + sign(THR) p) A_j

With M = sum_{i in P} 1/|y_i| sum_k g h^T, THR is g^T M h: two matrix products. The paper takes tau from its predecessor
NTHR; that it is the smallest mean THR of a correct response here is our reading.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..core.errors import BadInputError, UnsupportedModelError, check_choices
from ..core.scoring import base_model, output_head
from .base import Recipe, RolloutBatch


def thr_scores(
    hidden: torch.Tensor,
    logits: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
    correct: torch.Tensor,
    vocab: str = "group",
    by_length: bool = True,
) -> torch.Tensor:
    """THR of every token of one group, ``[G, T]``, 0 outside ``mask``.

    Args:
        hidden: ``[G, T, D]``, the head's input at the position that predicts each token.
        logits: ``[G, T, V]``, as the loss uses them.
        ids, mask: ``[G, T]``.
        correct: ``[G]`` bool.
        vocab: ``"full"`` is exact; ``"group"`` leaves out the errors at tokens that no response of the group holds.
        by_length: divide by the lengths of the correct responses; NTHR does not.
    """
    lengths = mask.sum(1)
    columns = ids[mask].unique() if vocab == "group" else torch.arange(logits.shape[-1], device=ids.device)
    shares = (correct & (lengths > 0)).to(hidden.dtype)
    if by_length:
        shares = shares / lengths.clamp(min=1)
    matrix = hidden.new_zeros(len(columns), hidden.shape[-1])

    def errors(row: int) -> torch.Tensor:
        """``[T, V*]``; one row at a time, so that no second tensor of the size of the logits is made."""
        found = -torch.softmax(logits[row].to(hidden.dtype), -1)[:, columns]
        place = torch.searchsorted(columns, ids[row].clamp(columns[0], columns[-1]))
        found.scatter_add_(1, place[:, None], torch.ones_like(found[:, :1]))
        return found * mask[row][:, None]

    if not mask.any():
        return hidden.new_zeros(mask.shape)
    for row in range(len(ids)):
        matrix += shares[row] * (errors(row).T @ hidden[row])
    scores = torch.stack([((errors(row) @ matrix) * hidden[row]).sum(-1) for row in range(len(ids))])
    return torch.where(correct, 1.0, -1.0).to(scores.dtype)[:, None] * scores * mask


def threshold(scores: torch.Tensor, mask: torch.Tensor, correct: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """``scale`` times the smallest mean THR of a correct response, at least 0."""
    means = scores.sum(1) / mask.sum(1).clamp(min=1)
    return (
        scale * means[correct & mask.any(1)].min().clamp(min=0)
        if (correct & mask.any(1)).any()
        else means.new_zeros(())
    )


def negative_weights(scores: torch.Tensor, correct: torch.Tensor, tau: torch.Tensor | float) -> torch.Tensor:
    """NTHR's weights ``[G, T]``: ``2 |1/2 - N+ / G|`` for tokens of wrong responses that lower the likelihood of
    correct ones by more than tau when they are punished, 1 for all others.

    Args:
        scores: ``[G, T]``, negative for such tokens, as ``thr_scores`` has them.
        correct: ``[G]`` bool.
    """
    eta = 2 * (0.5 - correct.double().mean()).abs().to(scores.dtype)
    return torch.where(~correct[:, None] & (-scores > tau), eta, 1.0)


@dataclass
class HiddenRewardWeights:
    """``1[|THR| > tau] (1 + sign(THR) p)`` as a piece, or NTHR's weight.

    Groups without a correct or without a wrong response teach nothing and keep weight 1.
    """

    kind: ClassVar[str] = "token_weight"
    needs: ClassVar[frozenset[str]] = frozenset({"distributions"})
    p: float = 0.1
    tau: float | None = None
    tau_scale: float = 1.0
    vocab: str = "group"
    correct_above: float = 0.5
    variant: str = "thr"
    constant: bool = field(default=False, init=False)
    metrics: dict[str, float] = field(default_factory=dict, init=False)

    def check_model(self, model: Any) -> None:
        """Refuses a head whose logits are no linear function of the hidden state."""
        head = output_head(base_model(model))
        if head.rule.softcap is not None:
            raise UnsupportedModelError("THR needs logits that are linear in the hidden state; these are capped.")
        self.constant = head.bias is not None  # a bias is the weight of a feature that is always 1

    def __call__(self, batch: RolloutBatch, advantages: torch.Tensor) -> torch.Tensor:
        assert batch.distributions is not None
        weight = torch.ones_like(advantages)
        dropped = total = 0
        for rows in batch.group_rows():
            correct = batch.rewards[rows] > self.correct_above  # False for NaN
            if not correct.any() or correct.all():
                continue
            hidden, logits = batch.distributions(rows)
            if self.constant:
                hidden = torch.cat([hidden, torch.ones_like(hidden[..., :1])], -1)
            mask = batch.mask[rows]
            thr = self.variant == "thr"
            scores = thr_scores(hidden, logits, batch.ids[rows], mask, correct, self.vocab, by_length=thr)
            tau = threshold(scores, mask, correct, self.tau_scale) if self.tau is None else self.tau
            if not thr:
                weight[rows] = negative_weights(scores, correct, tau).to(weight.dtype)
                continue
            kept = scores.abs() > tau
            weight[rows] = (kept * (1 + scores.sign() * self.p)).to(weight.dtype)
            dropped, total = dropped + int((mask & ~kept).sum()), total + int(mask.sum())
        self.metrics = {"tokens_below_tau": dropped / total} if total else {}
        return weight


@dataclass
class THR:
    """THR's settings.

    Args:
        p: above 0 exploits, below 0 explores, 0 only leaves out tokens that move little; in [-1, 1].
        tau: the smallest |THR| that counts; None takes it from the correct responses, below 0 keeps all tokens.
        tau_scale: times that.
        vocab: ``"group"``, the tokens of the group's responses, or ``"full"``, which is exact.
        correct_above: a response is correct above this reward.
        variant: ``"thr"``, or ``"nthr"``, its predecessor ("On the Effect of Negative Gradient in GRPO"): only
            tokens of wrong responses whose punishment would lower the likelihood of correct ones are weakened; p is not
            used.

    Raises:
        BadInputError: p outside [-1, 1], or an unknown vocab.
    """

    p: float = 0.1
    tau: float | None = None
    tau_scale: float = 1.0
    vocab: str = "group"
    correct_above: float = 0.5
    variant: str = "thr"

    def __post_init__(self) -> None:
        check_choices(self, variant=("thr", "nthr"), vocab=("group", "full"))
        if not -1 <= self.p <= 1:
            raise BadInputError(f"p lies in [-1, 1], or an advantage would change its sign; got {self.p}.")
        if self.tau_scale < 0:
            raise BadInputError(f"tau_scale must not be negative; got {self.tau_scale}.")

    def recipe(self) -> Recipe:
        """The weight."""
        return Recipe(
            HiddenRewardWeights(self.p, self.tau, self.tau_scale, self.vocab, self.correct_above, self.variant)
        )

    def arguments(self) -> dict[str, Any]:
        """Settings of GRPOConfig: a small KL, which the weight leaves alone."""
        return {"epsilon": 0.2, "beta": 1e-4}
