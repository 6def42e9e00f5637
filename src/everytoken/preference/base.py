"""The station's contract: a PreferenceLoss.

A loss maps per-token statistics of policy and reference over pairs to one loss a pair and two logged rewards::

    loss(policy, reference) -> PreferenceOutput(losses [B], chosen_rewards [B], rejected_rewards [B])

It is a dataclass of its settings and sees no model and no trainer. What it takes besides the log-probabilities it
declares, each where it has any (``declared`` reads them):

- ``needs``: statistics that the trainer computes with the log-probabilities (``"forward_kl"``: KL(reference || policy)
  per position; ``"reverse_kl"``; ``"entropy"``);
- ``data_columns``: constant per-token values of the pairs (a guide's log-probabilities, a criticality), name -> the
  class of their maker. They are the dataset columns ``chosen_NAME`` and ``rejected_NAME``; ``training.column_makers``
  says what a maker is, and None stands for a column that only the dataset can bring;
- ``trace_columns(policy, reference)``: what traces show of every token besides the implicit reward, name -> (chosen,
  rejected), ``[B, T]``.

``PreferenceTrainer`` computes everything once, in one chunked pass, whatever the loss.
``everytoken.testing.preference_loss`` checks a loss against all of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ..core.errors import BadInputError
from ..core.logprobs import STATISTICS, masked_sum
from ..training.column_makers import ColumnMaker, Example, TokenAnnotator

if TYPE_CHECKING:
    import torch

__all__ = [
    "ColumnMaker",
    "DeclaredInputs",
    "Example",
    "PairScores",
    "PreferenceLoss",
    "PreferenceOutput",
    "TokenAnnotator",
    "declared",
    "log_ratios",
    "trace_columns",
    "weighted_log_ratios",
]


@dataclass
class PairScores:
    """Per-token statistics of B pairs under one model; everything ``[B, T]`` and 0 outside the masks.

    Attributes:
        chosen_logps, rejected_logps: log-probabilities of the response tokens.
        chosen_mask, rejected_mask: bool, True on response tokens (the prompt and padding are False).
        chosen, rejected: further values by name, as the loss's ``needs`` and ``data_columns`` asked.
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

    def __call__(self, policy: PairScores, reference: PairScores) -> PreferenceOutput: ...


@dataclass(frozen=True)
class DeclaredInputs:
    """What a loss takes besides log-probabilities.

    Attributes:
        needs: names of statistics.
        data_columns: column -> the class of its maker, or None.
    """

    needs: frozenset[str]
    data_columns: Mapping[str, type[ColumnMaker] | None]


def declared(loss: PreferenceLoss | type[PreferenceLoss]) -> DeclaredInputs:
    """What a loss, or its class, declares; nothing where it says nothing.

    Raises:
        BadInputError: a statistic that nobody computes, a column named as a statistic, or columns under the name that
            0.1 read (``columns``).
    """
    name = loss.__name__ if isinstance(loss, type) else type(loss).__name__
    needs = frozenset(getattr(loss, "needs", ()))
    columns: Any = getattr(loss, "data_columns", {})
    if unknown := sorted(needs - set(STATISTICS)):
        raise BadInputError(f"{name} needs {unknown[0]!r}, which is not computed.", f"Known: {', '.join(STATISTICS)}.")
    if not isinstance(columns, Mapping):
        raise BadInputError(
            f"data_columns of {name} must map each column to the class of its maker.",
            "None stands for a column without one.",
        )
    old: Any = getattr(loss, "columns", None)
    if not columns and isinstance(old, (set, frozenset)) and old:
        raise BadInputError(
            f"{name} declares columns, which is called data_columns now.",
            'For example: data_columns = {"guide_logps": None}, with the class of its maker where it has one.',
        )
    if taken := sorted(set(columns) & {*STATISTICS, "ref_logps"}):
        raise BadInputError(f"{name} takes a data column {taken[0]!r}, which names a statistic.", "Rename it.")
    return DeclaredInputs(needs, columns)


def trace_columns(
    loss: PreferenceLoss, policy: PairScores, reference: PairScores
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What a loss shows of every token, name -> (chosen, rejected), each ``[B, T]``; nothing where it has no
    ``trace_columns``.
    """
    shown = getattr(loss, "trace_columns", None)
    return {} if shown is None else dict(shown(policy, reference))


def weighted_log_ratios(
    policy: PairScores, reference: PairScores, chosen_weight: torch.Tensor, rejected_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``sum_t m_t w_t (log pi - log ref)`` of chosen and rejected: two ``[B]`` tensors; the weights are ``[B, T]``
    constants.
    """
    chosen = chosen_weight.detach() * (policy.chosen_logps - reference.chosen_logps)
    rejected = rejected_weight.detach() * (policy.rejected_logps - reference.rejected_logps)
    return masked_sum(chosen, policy.chosen_mask), masked_sum(rejected, policy.rejected_mask)


def log_ratios(policy: PairScores, reference: PairScores) -> tuple[torch.Tensor, torch.Tensor]:
    """``u(y) = sum_t m_t (log pi - log ref)`` of chosen and rejected: two ``[B]`` tensors; 0 for an empty response."""
    return (
        masked_sum(policy.chosen_logps - reference.chosen_logps, policy.chosen_mask),
        masked_sum(policy.rejected_logps - reference.rejected_logps, policy.rejected_mask),
    )
