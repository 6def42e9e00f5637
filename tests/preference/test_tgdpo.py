"""TGDPO's equation, limits and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from everytoken.core.errors import BadInputError
from everytoken.preference.base import PairScores, PreferenceLoss
from everytoken.preference.dpo import DPOLoss
from everytoken.preference.tgdpo import TGDPOLoss

from .problems import evaluate, guide_logps, log_ratio, pairs, scores

SEEDS = st.integers(0, 200)


def problem(seed=0, guide_seed=7):
    policy, reference, labels, mask = pairs(seed=seed)
    return policy, reference, labels, mask, {"guide_logps": guide_logps(labels, mask, guide_seed)}


def test_contract():
    assert isinstance(TGDPOLoss(), PreferenceLoss)


@given(seed=SEEDS, beta=st.floats(0.01, 2))
@settings(max_examples=25, deadline=None)
def test_alpha_zero_is_dpo_in_value_and_gradient(seed, beta):
    work = problem(seed)
    ours, grad = evaluate(TGDPOLoss(beta=beta, alpha=0.0), *work)
    theirs, expected = evaluate(DPOLoss(beta=beta), *work[:4])
    assert torch.allclose(ours.losses, theirs.losses)
    assert torch.allclose(grad, expected)


@given(seed=SEEDS, alpha=st.floats(0, 5))
@settings(max_examples=25, deadline=None)
def test_a_guide_equal_to_the_reference_is_dpo(seed, alpha):
    policy, reference, labels, mask = pairs(seed=seed)
    columns = {"guide_logps": torch.log_softmax(reference, -1).gather(-1, labels[..., None])[..., 0]}
    ours, grad = evaluate(TGDPOLoss(alpha=alpha), policy, reference, labels, mask, columns)
    theirs, expected = evaluate(DPOLoss(), policy, reference, labels, mask)
    assert torch.allclose(ours.losses, theirs.losses)
    assert torch.allclose(grad, expected)


@given(seed=SEEDS, alpha=st.floats(0, 3), beta=st.floats(0.05, 1))
@settings(max_examples=25, deadline=None)
def test_equals_the_equation_and_weights_carry_no_gradient(seed, alpha, beta):
    policy, reference, labels, mask, columns = problem(seed)
    output, grad = evaluate(TGDPOLoss(beta=beta, alpha=alpha), policy, reference, labels, mask, columns)
    ref = torch.log_softmax(reference, -1).gather(-1, labels[..., None])[..., 0] * mask
    reward = beta * (columns["guide_logps"] - ref)
    u = log_ratio(policy, reference, labels, mask)
    z = (beta * (1 + alpha * reward[0]) * u[0]).sum(-1) - (beta * (1 - alpha * reward[1]) * u[1]).sum(-1)
    expected = -F.logsigmoid(z)
    assert torch.allclose(output.losses, expected.to(output.losses), atol=1e-5)
    (plain,) = torch.autograd.grad(expected.mean(), policy)
    assert torch.allclose(grad, plain, atol=1e-6)
    # a guide that could learn gets nothing
    guide = columns["guide_logps"].clone().requires_grad_(True)
    loss = TGDPOLoss(beta=beta, alpha=alpha)
    scored = scores(policy, reference, labels, mask, {"guide_logps": guide})
    value = loss(scored, scores(reference, reference, labels, mask)).losses.mean()
    assert torch.autograd.grad(value, guide, allow_unused=True)[0] is None


@given(seed=SEEDS, alpha=st.floats(0.1, 3))
@settings(max_examples=25, deadline=None)
def test_doubling_alpha_doubles_the_weights_distance_from_one(seed, alpha):
    policy, reference, labels, mask, columns = problem(seed)
    arguments = (scores(policy, reference, labels, mask, columns), scores(reference, reference, labels, mask))
    once, twice = TGDPOLoss(alpha=alpha).weights(*arguments), TGDPOLoss(alpha=2 * alpha).weights(*arguments)
    for one, two in zip(once, twice, strict=True):
        assert torch.allclose(2 * (one - 1), two - 1)
    assert (once[0][~mask[0]] == 1).all()


def test_one_token_responses_are_dpo_with_beta_scaled_by_the_weights():
    policy, reference, labels, mask, columns = problem(3)
    one = torch.zeros_like(mask)
    one[..., 2] = True
    columns = {"guide_logps": guide_logps(labels, one)}
    scored, ref = scores(policy, reference, labels, one, columns), scores(reference, reference, labels, one)
    loss = TGDPOLoss(beta=0.3, alpha=2.0)
    chosen, rejected = (weight[:, 2] for weight in loss.weights(scored, ref))
    u = log_ratio(policy, reference, labels, one)[..., 2]
    expected = -F.logsigmoid(0.3 * chosen * u[0] - 0.3 * rejected * u[1])
    assert torch.allclose(loss(scored, ref).losses, expected.float(), atol=1e-6)


def test_negative_weights_are_kept_counted_and_clamped_on_request():
    """By hand: two tokens a response; the guide takes 10 nats from one of each."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    zeros = torch.zeros(1, 2)
    columns = {"guide_logps": torch.tensor([[-10.0, 0.0]])}, {"guide_logps": torch.tensor([[10.0, 0.0]])}
    policy = PairScores(zeros + 1, zeros + 2, mask, mask, *columns)
    reference = PairScores(zeros, zeros, mask, mask)
    output = TGDPOLoss(beta=1.0, alpha=0.5)(policy, reference)  # weights 1 - 5 and 1; 1 - 5 and 1
    assert output.metrics["weights/negative"].item() == pytest.approx(0.5)
    assert output.losses.item() == pytest.approx(-F.logsigmoid(torch.tensor(-4.0 + 1 + 8 - 2)).item(), abs=1e-6)
    clamped = TGDPOLoss(beta=1.0, alpha=0.5, clamp=1.0)(policy, reference)  # 0 and 1; 0 and 1
    assert clamped.metrics["weights/negative"].item() == 0
    assert clamped.losses.item() == pytest.approx(-F.logsigmoid(torch.tensor(1.0 - 2)).item(), abs=1e-6)
    shaped = TGDPOLoss(beta=1.0, shape=torch.tanh)(policy, reference)
    assert shaped.metrics["weights/negative"].item() == 0


def test_bad_settings():
    for settings_ in (dict(beta=0), dict(alpha=-1), dict(clamp=-0.1)):
        with pytest.raises(BadInputError):
            TGDPOLoss(**settings_)
