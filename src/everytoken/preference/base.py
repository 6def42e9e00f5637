"""The station's contract: a PreferenceLoss.

A loss maps per-token statistics of policy and reference over pairs to one loss a pair and two logged rewards::

    loss(policy, reference) -> PreferenceOutput(losses [B], chosen_rewards [B], rejected_rewards [B])

It is a dataclass of its settings, sees no model and no trainer, and says in ``needs`` what must be computed besides the
log-probabilities (``"forward_kl"``: KL(reference || policy) per position; ``"reverse_kl"``; ``"entropy"``).
``PreferenceTrainer`` computes everything once, in one chunked pass, whatever the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

NEEDS = ("entropy", "forward_kl", "reverse_kl")


@dataclass
class PairScores:
    """Per-token statistics of B pairs under one model; everything ``[B, T]`` and 0 outside the masks.

    Attributes:
        chosen_logps, rejected_logps: log-probabilities of the response tokens.
        chosen_mask, rejected_mask: bool, True on response tokens (the prompt and padding are False).
        chosen, rejected: further statistics by name (``"forward_kl"``, ...), as the loss's ``needs`` asked.
    """

    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    chosen_mask: torch.Tensor
    rejected_mask: torch.Tensor
    chosen: dict[str, torch.Tensor] = field(default_factory=dict)
    rejected: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class PreferenceOutput:
    """What a loss returns.

    Attributes:
        losses: ``[B]``, with gradient; the trainer takes the mean.
        chosen_rewards, rejected_rewards: ``[B]``, detached.
        metrics: further scalars to log, detached.
    """

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


@runtime_checkable
class PreferenceLoss(Protocol):
    """``(policy, reference) -> PreferenceOutput``; see the module's docstring."""

    needs: ClassVar[frozenset[str]]

    def __call__(self, policy: PairScores, reference: PairScores) -> PreferenceOutput: ...


def log_ratios(policy: PairScores, reference: PairScores) -> tuple[torch.Tensor, torch.Tensor]:
    """``u(y) = sum_t m_t (log pi - log ref)`` of chosen and rejected: two ``[B]`` tensors; 0 for an empty response."""
    from ..core.logprobs import masked_sum

    return (
        masked_sum(policy.chosen_logps - reference.chosen_logps, policy.chosen_mask),
        masked_sum(policy.rejected_logps - reference.rejected_logps, policy.rejected_mask),
    )
