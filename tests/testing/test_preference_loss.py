"""The battery for preference losses: every check finds the fault that it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch.nn import functional as F

from everytoken.core.logprobs import masked_sum
from everytoken.preference.base import PreferenceOutput, log_ratios
from everytoken.preference.dpo import DPOLoss
from everytoken.testing import preference_loss
from everytoken.testing.preference_loss import CHECKS, check_preference_loss


def test_the_battery_is_whole():
    every = {value for name, value in vars(preference_loss).items() if name.startswith("check_")}
    assert every - {check_preference_loss} == set(CHECKS)


# -- faults
# --------------------------------------------------------------------------------------------------------------
@dataclass
class Plain(DPOLoss):
    """DPO, to be spoilt."""

    def __call__(self, policy, reference):
        return self.output(*log_ratios(policy, reference))

    def output(self, chosen, rejected):
        losses = -F.logsigmoid(self.beta * (chosen - rejected))
        return PreferenceOutput(losses, self.beta * chosen.detach(), self.beta * rejected.detach())


@dataclass
class NotFinite(Plain):
    def __call__(self, policy, reference):
        output = super().__call__(policy, reference)
        return PreferenceOutput(output.losses / 0, output.chosen_rewards, output.rejected_rewards)


@dataclass
class MeanOverNothing(Plain):
    def __call__(self, policy, reference):
        chosen, rejected = log_ratios(policy, reference)
        return self.output(chosen / policy.chosen_mask.sum(-1), rejected / policy.rejected_mask.sum(-1))


@dataclass
class Unmasked(Plain):
    def __call__(self, policy, reference):
        chosen = (policy.chosen_logps - 0.9 * reference.chosen_logps).sum(-1)
        return self.output(chosen, log_ratios(policy, reference)[1])


@dataclass
class ByWidth(Plain):
    def __call__(self, policy, reference):
        width = policy.chosen_mask.shape[1]
        chosen, rejected = log_ratios(policy, reference)
        return self.output(chosen / width, rejected / width)


@dataclass
class Batched(Plain):
    def __call__(self, policy, reference):
        chosen, rejected = log_ratios(policy, reference)
        return self.output(chosen - chosen.mean().detach(), rejected)


@dataclass
class Swapped(Plain):
    def __call__(self, policy, reference):
        return super().__call__(reference, policy)


@dataclass
class Attached(Plain):
    def output(self, chosen, rejected):
        output = super().output(chosen, rejected)
        return PreferenceOutput(output.losses, self.beta * chosen, output.rejected_rewards)


@dataclass
class Margin(Plain):
    def output(self, chosen, rejected):
        return super().output(chosen - 1, rejected)


@dataclass
class Half(Plain):
    def __call__(self, policy, reference):
        gaps = [
            (torch.where(mask, a - b, torch.zeros((), dtype=a.dtype))).sum(-1)
            for a, b, mask in (
                (policy.chosen_logps, reference.chosen_logps, policy.chosen_mask),
                (policy.rejected_logps, reference.rejected_logps, policy.rejected_mask),
            )
        ]
        return self.output(*gaps)


@dataclass
class Undeclared(Plain):
    def __call__(self, policy, reference):
        output = super().__call__(policy, reference)
        output.metrics["entropy"] = masked_sum(policy.chosen["entropy"], policy.chosen_mask).mean().detach()
        return output


@dataclass
class Idle(Plain):
    needs: ClassVar[frozenset[str]] = frozenset({"reverse_kl"})


@dataclass
class ColumnWithGradient(Plain):
    data_columns: ClassVar[Mapping[str, None]] = {"weight": None}

    def __call__(self, policy, reference):
        chosen = masked_sum(
            policy.chosen["weight"] * (policy.chosen_logps - reference.chosen_logps), policy.chosen_mask
        )
        return self.output(chosen, log_ratios(policy, reference)[1])


@dataclass
class Sums(Plain):
    def trace_columns(self, policy, reference):
        return {"gap": log_ratios(policy, reference)}


@dataclass
class Forgets(Plain):
    scale: str = field(default=" wide ")


FAULTS = [
    (NotFinite, "check_value_and_gradient", "not finite"),
    (MeanOverNothing, "check_empty_response", "empty response"),
    (Unmasked, "check_masked_positions", "outside the masks"),
    (ByWidth, "check_padding", "Padding changes"),
    (Batched, "check_batch_size", "depend on the pairs beside"),
    (Swapped, "check_conventions", "must lower the loss"),
    (Attached, "check_detached", "chosen_rewards carries a gradient"),
    (ColumnWithGradient, "check_detached", "data column weight"),
    (Margin, "check_start", "loss_at_start"),
    (Half, "check_dtypes", "give losses in"),
    (Undeclared, "check_declared_inputs", "add it to needs"),
    (Idle, "check_declared_inputs", "does not read it"),
    (Sums, "check_trace_columns", "has the shape"),
    (Forgets, "check_settings", "after being written and read"),
]


def test_the_loss_that_is_spoilt_is_sound():
    check_preference_loss(Plain())


@pytest.mark.parametrize(("kind", "check", "message"), FAULTS, ids=[kind.__name__ for kind, *_ in FAULTS])
def test_every_check_finds_its_fault(kind, check, message):
    with pytest.raises(AssertionError, match=message):
        getattr(preference_loss, check)(kind())


def test_every_check_has_a_fault():
    assert {check.__name__ for check in CHECKS} == {check for _, check, _ in FAULTS}


def test_a_loss_of_another_family_says_so():
    @dataclass
    class Other(Margin):
        loss_at_start: ClassVar[float | None] = None

    check_preference_loss(Other())
