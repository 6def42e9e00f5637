"""The station's contract: a PreferenceLoss.

A loss maps per-token statistics of policy and reference over pairs to one loss a pair and two logged rewards::

    loss(policy, reference) -> PreferenceOutput(losses [B], chosen_rewards [B], rejected_rewards [B])

It is a dataclass of its settings, sees no model and no trainer, and says in ``needs`` what must be computed besides the
log-probabilities (``"forward_kl"``: KL(reference || policy) per position; ``"reverse_kl"``; ``"entropy"``), and in ``columns`` which constant per-token
values of the pairs it takes (a guide's log-probabilities, a criticality): dataset columns ``chosen_NAME`` and ``rejected_NAME``,
which ``columns.precompute`` makes from a ``TokenAnnotator``. ``PreferenceTrainer`` computes everything once, in one chunked pass,
whatever the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

NEEDS = ("entropy", "forward_kl", "reverse_kl")


@dataclass
class PairScores:
    """Per-token statistics of B pairs under one model; everything ``[B, T]`` and 0 outside the masks.

    Attributes:
        chosen_logps, rejected_logps: log-probabilities of the response tokens.
        chosen_mask, rejected_mask: bool, True on response tokens (the prompt and padding are False).
        chosen, rejected: further statistics by name (``"forward_kl"``, ...), as the loss's ``needs`` and ``columns`` asked.
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
    columns: ClassVar[frozenset[str]]

    def __call__(self, policy: PairScores, reference: PairScores) -> PreferenceOutput: ...


@dataclass
class Example:
    """One response to annotate.

    Attributes:
        prompt: as the dataset has it: text, or a list of messages.
        prompt_ids, response_ids: as the policy reads them.
    """

    prompt: Any
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]


@runtime_checkable
class TokenAnnotator(Protocol):
    """A constant value for every response token: ``annotate(examples) -> one [len(response_ids)] tensor each``.

    ``column`` is the name that losses know the values by; ``fingerprint()`` identifies the annotator's models and settings, so that
    values can be kept and used again.
    """

    column: str

    def annotate(self, examples: Sequence[Example], report: Callable[[int, int], None] = ...) -> list[torch.Tensor]: ...

    def fingerprint(self) -> str: ...


def weighted_log_ratios(
    policy: PairScores, reference: PairScores, chosen_weight: torch.Tensor, rejected_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``sum_t m_t w_t (log pi - log ref)`` of chosen and rejected: two ``[B]`` tensors; the weights are ``[B, T]`` constants."""
    from ..core.logprobs import masked_sum

    chosen = chosen_weight.detach() * (policy.chosen_logps - reference.chosen_logps)
    rejected = rejected_weight.detach() * (policy.rejected_logps - reference.rejected_logps)
    return masked_sum(chosen, policy.chosen_mask), masked_sum(rejected, policy.rejected_mask)


def log_ratios(policy: PairScores, reference: PairScores) -> tuple[torch.Tensor, torch.Tensor]:
    """``u(y) = sum_t m_t (log pi - log ref)`` of chosen and rejected: two ``[B]`` tensors; 0 for an empty response."""
    from ..core.logprobs import masked_sum

    return (
        masked_sum(policy.chosen_logps - reference.chosen_logps, policy.chosen_mask),
        masked_sum(policy.rejected_logps - reference.rejected_logps, policy.rejected_mask),
    )
