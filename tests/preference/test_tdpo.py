"""TDPO's equations, limits and gradients, and the trainer that feeds it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from everytoken.core.errors import BadInputError
from everytoken.core.logprobs import token_stats
from everytoken.preference.base import PreferenceLoss
from everytoken.preference.dpo import DPOLoss
from everytoken.preference.tdpo import TDPOLoss

from .problems import VOCAB, evaluate, pairs, scores


def test_contract():
    assert isinstance(TDPOLoss(), PreferenceLoss)
    assert isinstance(DPOLoss(), PreferenceLoss)


@given(seed=st.integers(0, 200), beta=st.floats(0.01, 2))
@settings(max_examples=30, deadline=None)
def test_alpha_zero_is_dpo_in_value_and_gradient(seed, beta):
    problem = pairs(seed=seed)
    ours, our_grad = evaluate(TDPOLoss(beta=beta, alpha=0.0), *problem)
    theirs, their_grad = evaluate(DPOLoss(beta=beta), *problem)
    assert torch.allclose(ours.losses, theirs.losses)
    assert torch.allclose(our_grad, their_grad)


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_policy_equal_to_reference(variant):
    problem = pairs(same=True)
    output, grad = evaluate(TDPOLoss(variant=variant), *problem)
    assert torch.allclose(output.losses, torch.full_like(output.losses, math.log(2)))
    assert all(abs(value.item()) < 1e-9 for value in output.metrics.values())
    assert torch.allclose(grad, evaluate(DPOLoss(), *problem)[1])  # the KL is at its minimum there


@given(seed=st.integers(0, 200))
@settings(max_examples=30, deadline=None)
def test_tdpo1_and_tdpo2_differ_only_by_the_stopped_gradient(seed):
    policy, reference, labels, mask = pairs(seed=seed)
    beta = 0.3
    one, grad_one = evaluate(TDPOLoss(beta=beta, variant="tdpo1"), policy, reference, labels, mask)
    two, grad_two = evaluate(TDPOLoss(beta=beta, alpha=1.0), policy, reference, labels, mask)
    assert torch.allclose(one.losses, two.losses)
    # loss = -log sigmoid(beta z) and z contains + d(y_w): d loss = -beta sigmoid(-beta z) d d(y_w)
    policy_scores = scores(policy, reference, labels, mask)
    weight = -beta * (1 - torch.exp(-one.losses.detach()))  # sigmoid(-beta z) = 1 - exp(-loss)
    (expected,) = torch.autograd.grad((weight * policy_scores.chosen["forward_kl"].sum(-1)).mean(), policy)
    assert torch.allclose(grad_one - grad_two, expected, atol=1e-7)


def test_kl_by_brute_force_and_never_negative():
    policy, reference, labels, mask = pairs(seed=3)
    output, _ = evaluate(TDPOLoss(), policy, reference, labels, mask)
    p, q = torch.softmax(policy.detach(), -1), torch.softmax(reference, -1)
    totals = []
    for side, row in itertools.product(range(2), range(3)):
        total = 0.0
        for t in range(6):
            if mask[side, row, t]:
                total += sum(
                    q[side, row, t, v] * math.log(q[side, row, t, v] / p[side, row, t, v]) for v in range(VOCAB)
                )
        assert total >= 0
        totals.append(float(total))
    assert output.metrics["kl/chosen"].item() == pytest.approx(sum(totals[:3]) / 3, abs=1e-6)
    assert output.metrics["kl/rejected"].item() == pytest.approx(sum(totals[3:]) / 3, abs=1e-6)


def test_value_by_hand():
    """One pair, one token each: every term written out."""
    policy = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 1.0]]]], dtype=torch.float64, requires_grad=True)
    reference = torch.zeros(2, 1, 1, 2, dtype=torch.float64)
    labels, mask = torch.zeros(2, 1, 1, dtype=torch.long), torch.ones(2, 1, 1, dtype=torch.bool)
    hit, miss = math.log(1 / (1 + math.exp(-1))), math.log(1 / (1 + math.e))
    u_w, u_l = hit - math.log(0.5), miss - math.log(0.5)
    d = 0.5 * (math.log(0.5) - hit) + 0.5 * (math.log(0.5) - miss)
    output, _ = evaluate(TDPOLoss(beta=0.1, alpha=0.5), policy, reference, labels, mask)
    z = (u_w - u_l) - 0.5 * (d - d)
    assert output.losses.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.1 * z))), abs=1e-6)
    assert output.chosen_rewards.item() == pytest.approx(0.1 * (u_w + d), abs=1e-6)
    assert output.rejected_rewards.item() == pytest.approx(0.1 * (u_l + d), abs=1e-6)


def test_permutation_and_padding():
    policy, reference, labels, mask = pairs(seed=4)
    base, _ = evaluate(TDPOLoss(), policy, reference, labels, mask)
    order = torch.tensor([2, 0, 1])
    shuffled, _ = evaluate(
        TDPOLoss(),
        *[
            x[:, order].detach().requires_grad_(x is policy)
            for x in (policy, reference, labels.double(), mask.double())
        ][:2],
        labels[:, order],
        mask[:, order],
    )
    assert torch.allclose(shuffled.losses, base.losses[order])
    pad = [F.pad(x, (0, 0, 0, 4)) for x in (policy.detach(), reference)]
    padded, _ = evaluate(TDPOLoss(), pad[0].requires_grad_(True), pad[1], F.pad(labels, (0, 4)), F.pad(mask, (0, 4)))
    assert torch.allclose(padded.losses, base.losses)


def test_empty_response_gives_no_nan():
    policy, reference, labels, mask = pairs(seed=5)
    mask = mask.clone()
    mask[0, 1] = False
    output, grad = evaluate(TDPOLoss(), policy, reference, labels, mask)
    assert torch.isfinite(output.losses).all()
    assert torch.isfinite(grad).all()
    assert output.chosen_rewards[1] == 0


def test_chunked_kl_agrees_with_unchunked():
    torch.manual_seed(0)
    hidden, ref = torch.randn(33, 16), torch.randn(33, 16)
    weight, ref_weight, labels = torch.randn(97, 16), torch.randn(97, 16), torch.randint(0, 97, (33,))
    arguments = dict(ref_hidden=ref, ref_weight=ref_weight, forward_kl=True)
    one = token_stats(hidden, weight, labels, chunk_size=33, **arguments)
    many = token_stats(hidden, weight, labels, chunk_size=4, **arguments)
    assert torch.allclose(one.forward_kl, many.forward_kl, atol=1e-6)


def test_bad_settings():
    for bad in (dict(variant="tdpo3"), dict(beta=0.0), dict(alpha=-1.0)):
        with pytest.raises(BadInputError):
            TDPOLoss(**bad)
