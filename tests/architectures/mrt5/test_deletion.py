"""MrT5's gate, attention, compaction and controller, by hand."""

from __future__ import annotations

import pytest
import torch

from everytoken.architectures.mrt5.deletion import (
    DeleteGate,
    DeletionController,
    compacted,
    eager_softmax_1,
    sdpa_softmax_1,
    softmax_1,
)
from everytoken.core.errors import BadInputError


def test_the_gate_by_hand():
    gate = DeleteGate(4, scale=-10.0)
    with torch.no_grad():
        gate.linear.weight.copy_(torch.tensor([[1.0, -1.0, 0.5, 0.0]]))
        gate.linear.bias.fill_(1.0)
    hidden = torch.tensor([[[1.0, 2, 3, 4], [0, 0, 1, 0], [2, -2, 0, 1], [5, 5, 5, 5]]])
    found = gate(hidden, torch.tensor([[True, True, True, False]]))
    torch.testing.assert_close(found, torch.tensor([[-2.3459, -1.1920, -0.2492, -10.0]]), rtol=0, atol=1e-4)


def test_softmax_1_by_hand_and_with_one_more_score():
    found = softmax_1(torch.tensor([1.0, 2.0, -1e9]))
    torch.testing.assert_close(found, torch.tensor([0.24473, 0.66524, 0.0]), rtol=0, atol=1e-5)
    assert torch.equal(softmax_1(torch.tensor([-1e9, -1e9])), torch.zeros(2))
    assert torch.equal(softmax_1(torch.full((3,), -torch.inf)), torch.zeros(3))
    scores = torch.randn(4, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    more = torch.cat([scores, torch.zeros(4, 1)], -1).softmax(-1)[:, :-1]
    torch.testing.assert_close(softmax_1(scores), more)
    (ours,), (theirs,) = (torch.autograd.grad((x * x).sum(), scores) for x in (softmax_1(scores), more))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("masked", [None, "bool", "float"])
@pytest.mark.parametrize("causal", [False, True])
def test_both_attentions_are_softmax_1(masked, causal):
    module = torch.nn.Module()
    module.is_causal = causal
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 3, 5, 4, generator=generator) for _ in range(3))
    bias = torch.randn(1, 3, 5, 5, generator=generator)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[1, ..., 3:] = False
    lowest = torch.finfo(torch.float32).min
    given = {None: None, "bool": mask, "float": torch.where(mask, 0.0, lowest)}[masked]
    scores = query @ key.transpose(2, 3) + bias
    if given is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif causal:  # where a mask is given it carries causality
        scores = scores.masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    wanted = (softmax_1(scores) @ value).transpose(1, 2)
    for function in (eager_softmax_1, sdpa_softmax_1):
        found = function(module, query, key, value, given, position_bias=bias)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_compaction_by_hand():
    gate = torch.tensor([[-1.0, -9, -2, -9, -1], [-9, -9, -9, -1, -9], [-9, -9, -9, -9, -9]])
    kept = compacted(gate, torch.ones(3, 5, dtype=torch.bool), -5.0)
    assert kept.positions.tolist() == [[0, 2, 4], [3, -1, -1], [0, -1, -1]]
    assert kept.mask.tolist() == [[True] * 3, [True, False, False], [True, False, False]]
    states = torch.arange(30.0).reshape(3, 5, 2)
    assert kept.hidden(states)[0].tolist() == states[0, [0, 2, 4]].tolist()
    bias = torch.randn(1, 2, 5, 5)
    for row, positions in enumerate(kept.positions.clamp_min(0).tolist()):
        assert torch.equal(kept.bias(bias)[row], bias[0][:, positions][:, :, positions])


def test_a_row_that_would_lose_everything_keeps_its_highest_gate_and_padding_never_stays():
    gate = torch.tensor([[-9.0, -7, -8, -1], [-1.0, -1, -1, -1]])
    mask = torch.tensor([[True, True, True, False], [False] * 4])
    kept = compacted(gate, mask, -5.0)
    assert kept.positions.tolist() == [[1], [-1]]
    assert kept.mask.tolist() == [[True], [False]]


def test_the_controller_by_hand():
    control = DeletionController(target=0.5)
    found = [control.update(share) for share in (0, 0.2, 0.5, 0.7, 0.9)]
    assert found == pytest.approx([0.025005, 0.037508, 0.033758, 0.020381, 0.0], abs=5e-7)
    again = DeletionController.from_state(control.state())
    assert (again.proportional, again.integral) == (control.proportional, control.integral)
    assert again.update(0.1) == control.update(0.1)


def test_the_controller_reaches_its_target():
    """A toy gate that deletes more the larger alpha is, and answers slowly."""
    control, share = DeletionController(target=0.4, k_p=0.5, k_i=1e-2), 0.0
    for _ in range(3000):
        alpha = control.update(share)
        share += 0.05 * (min(1.0, 2 * alpha) - share)
    assert share == pytest.approx(0.4, abs=0.01)


def test_bad_settings_of_the_controller():
    for settings in ({"target": 0.0}, {"target": 1.0}, {"k_p": -1.0}, {"k_i": -1.0}):
        with pytest.raises(BadInputError):
            DeletionController(**settings)
