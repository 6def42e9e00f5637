"""Pieces of MDPO, GDPO and CJ-GRPO: numbers of the released code, limits and gradients."""

from __future__ import annotations

import pytest
import torch

from everytoken.core.errors import BadInputError, UnknownNameError
from everytoken.decoding.canvas.denoising import DenoisingSampler, StepInfo
from everytoken.reinforcement.cj_grpo import (
    AscendingSteps,
    EosEarlyRejection,
    ascending_counts,
    cj_grpo_loss,
    step_mean_weights,
)
from everytoken.reinforcement.diffusion_gdpo import diffusion_gdpo_loss, mean_advantages
from everytoken.reinforcement.likelihoods import LikelihoodEstimate, elbo, trajectory_logps
from everytoken.reinforcement.mdpo import mdpo_step_loss, select_steps, step_advantages, step_values, step_weights
from everytoken.testing.canvas import MASK, TinyDenoiser

REWARDS = torch.tensor([[0.0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


# -- MDPO --------------------------------------------------------------------------------------------------------------
def test_step_advantages_of_the_released_code():
    expected = [[1.6667, 2.5, 1, 0], [1.6667, 2, 3, 2], [1, 1, 1, 1], [3, 2, 2, 2]]
    torch.testing.assert_close(step_values(REWARDS), torch.tensor(expected), rtol=0, atol=1e-4)
    wanted = [
        [-0.1987, 0.9932, -0.7833, -1.3054], [-0.1987, 0.1986, 1.3054, 0.7833],
        [-0.9933, -1.3905, -0.7833, -0.2611], [1.3906, 0.1986, 0.2611, 0.7833],
    ]  # fmt: skip
    found = step_advantages(REWARDS)
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.abs().sum(0), torch.tensor([2.7812, 2.7811, 3.1331, 3.1331]), rtol=0, atol=2e-4)
    assert select_steps(found, 2) == [2, 3] and select_steps(torch.zeros(4, 3), 2) == []
    one = step_advantages(torch.tensor([[1.0], [0], [0], [1]]))
    assert one[:, 0].tolist() == pytest.approx([0.8660, -0.8660, -0.8660, 0.8660], abs=1e-3)


def test_equal_rewards_have_no_advantage():
    """Also where a third of their sum is no float: seven tenths, three times."""
    found = step_advantages(torch.full((3, 5), 0.7))
    assert not found.any() and select_steps(found, 2) == []


@pytest.mark.parametrize("remasking", ["low_confidence", "margin", "entropy", "random"])
def test_a_guess_weighs_its_probability_whatever_positions_are_ranked_by(remasking):
    sampler = DenoisingSampler(steps=2, gen_length=4, remasking=remasking, record_guesses=True, temperature=1.0)
    found = sampler(TinyDenoiser(), IDS, seeds=[0, 1])
    weights = step_weights(found, 0, time_weight=False)[:, 3:]
    logits = TinyDenoiser()(input_ids=found.state(0)).logits.log_softmax(-1).exp()
    chances = logits.gather(-1, found.guesses[:, 0, :, None])[:, 3:, 0]
    torch.testing.assert_close(weights * (4 + 1e-4), chances, rtol=1e-3, atol=1e-4)


def test_end_tokens_that_are_ranked_by_entropy_are_held_back_too():
    rule = EosEarlyRejection(2, 0.4)
    held = rule(
        torch.tensor([-2.0, -2.0]), torch.tensor([2, 1]), StepInfo(*torch.tensor([[0, 0], [4, 4], [0, 0], [4, 4]]))
    )
    assert held[0] < held[1] == -2.0


def test_groups_and_modes():
    both = step_advantages(torch.cat([REWARDS, 5 * REWARDS.flip(0)]), groups=torch.arange(8) // 4)
    torch.testing.assert_close(both[:4], step_advantages(REWARDS))
    assert torch.equal(step_values(REWARDS, "step"), REWARDS)
    assert torch.equal(step_values(REWARDS, "final"), REWARDS[:, 3:].expand(4, 4))
    assert step_values(REWARDS, "future")[0].tolist() == pytest.approx([2 / 3, 0.5, 0, 0])
    with pytest.raises(UnknownNameError, match="future"):
        step_advantages(REWARDS, "futur")
    with pytest.raises(BadInputError, match="one rollout"):
        step_advantages(REWARDS, groups=torch.arange(4))
    with pytest.raises(BadInputError, match="At least one"):
        select_steps(REWARDS, 0)


def test_the_loss_of_a_step_and_its_gradient():
    """L = 4, M = 1, 0, 1, 1, C = .5, .9, .8, .2, A = 1.3, rho = 1: -0.8666."""
    masked, sure = torch.tensor([[1.0, 0, 1, 1]]), torch.tensor([[0.5, 0.9, 0.8, 0.2]])
    weights = masked * sure * (4 / 3) / (3 + 1e-4)
    logps = torch.randn(1, 4, requires_grad=True)
    loss = mdpo_step_loss(logps, logps.detach(), weights, torch.tensor([1.3]))
    assert loss.item() == pytest.approx(-0.8666, abs=1e-4)
    loss.sum().backward()
    torch.testing.assert_close(logps.grad, -1.3 * (4 / 3) * sure * masked / 3, rtol=1e-4, atol=1e-5)
    far = mdpo_step_loss(logps + 1, logps.detach(), weights, torch.tensor([1.3]))
    assert far.item() == pytest.approx(1.2 * loss.item(), rel=1e-5)  # clipped
    kept = mdpo_step_loss(logps, logps.detach(), weights, torch.tensor([0.0]), ref_logps=logps - 2, beta=0.5)
    assert kept.item() == pytest.approx(float((weights * 1.0).sum()), rel=1e-5)


def test_weights_come_from_the_record():
    model = TinyDenoiser()
    found = DenoisingSampler(gen_length=8, steps=4, record_guesses=True)(model, IDS)
    weights = step_weights(found, 2)
    open_ = (found.state(2) == MASK) & found.editable
    wanted = open_ * found.confidence[:, 2] * (8 / 4) / (4 + 1e-4)
    torch.testing.assert_close(weights, wanted)
    plain = step_weights(found, 2, weight=None, time_weight=False)
    torch.testing.assert_close(plain.sum(1), torch.full((2,), 4 / (4 + 1e-4)))
    with pytest.raises(BadInputError, match="record_guesses"):
        step_weights(DenoisingSampler(gen_length=8)(model, IDS), 0)


# -- EOSER and ASS -----------------------------------------------------------------------------------------------------
def test_eoser_by_the_released_numbers():
    probs = torch.tensor([[2.0, 0, 1], [0, 1, 3]]).softmax(-1)
    tokens, raw = torch.tensor([0, 2]), probs[[0, 1], [0, 2]]
    assert raw.tolist() == pytest.approx([0.6652, 0.8438], abs=1e-4)
    for rule, expected in (
        (EosEarlyRejection(2, 0.4), [0.3375, 0.5063, 0.6750, 0.8438]),
        (EosEarlyRejection((2,), 0.01, ascending=True), [0.0606, 0.1651, 0.3739, 0.7916]),
        (EosEarlyRejection(2, 1.0), [0.8438] * 4),
    ):
        for step, wanted in enumerate(expected):
            four, here = torch.tensor([4, 4]), torch.tensor([step, step])
            found = rule(raw, tokens, StepInfo(here, four, here, four))
            assert found.tolist() == pytest.approx([0.6652, wanted], abs=1e-4)
    one = torch.tensor([1])
    for ascending in (False, True):
        rule = EosEarlyRejection(2, 0.1, ascending=ascending)
        assert rule.factor(StepInfo(one - 1, one, one - 1, one)).item() == 1.0
    with pytest.raises(BadInputError, match="g_min"):
        EosEarlyRejection(2, 0.9, 0.5)


def test_eoser_changes_neither_counts_nor_a_run_without_ends():
    model = TinyDenoiser()
    plain = DenoisingSampler(gen_length=12, steps=4)(model, IDS)
    for rule in (EosEarlyRejection(2, 1.0, 1.0), EosEarlyRejection(99, 0.0)):
        same = DenoisingSampler(gen_length=12, steps=4, transform=rule)(model, IDS)
        assert torch.equal(same.final_ids, plain.final_ids) and torch.equal(same.fix_step, plain.fix_step)
    common = int(plain.final_ids[:, 3:].flatten().mode().values)
    held = DenoisingSampler(gen_length=12, steps=4, transform=EosEarlyRejection(common, 0.01))(model, IDS)
    assert torch.equal(held.counts, plain.counts)
    late = [found.fix_step[found.final_ids == common].float().mean() for found in (plain, held)]
    assert late[1] > late[0]


@pytest.mark.parametrize(
    ("length", "open_before"),
    [(128, [128, 127, 125, 121, 113, 97, 65]), (16, [16, 15, 13, 9]), (32, [32, 31, 29, 25, 17])],
)
def test_ass_by_the_released_numbers(length, open_before):
    counts = ascending_counts(length)
    assert [length - sum(counts[:step]) for step in range(len(counts))] == open_before
    assert sum(ascending_counts(length, "tight")) == length


def test_ass_in_blocks_and_in_a_sampler():
    assert ascending_counts(256) == [1, 2, 4, 8, 16, 32, 64, 129]
    assert [sum(block) for block in AscendingSteps().plan(16, None, 2)] == [7, 9]
    assert [sum(block) for block in AscendingSteps().plan(128, None, 4)] == [15, 16, 32, 65]
    assert ascending_counts(1) == [1] and ascending_counts(2) == [2] and ascending_counts(100)[-1] == 69
    assert ascending_counts(127) == [1, 2, 4, 8, 16, 96] and ascending_counts(127, "tight")[-1] == 64
    sampler = DenoisingSampler(gen_length=16, schedule=AscendingSteps())
    found = sampler(TinyDenoiser(), IDS)
    assert found.counts.tolist() == [[1, 2, 4, 9]] * 2 and sampler.stats.target_forwards == 4
    for arguments in ((16, 5, 1), (16, None, 8)):
        with pytest.raises(BadInputError):
            AscendingSteps().plan(*arguments)
    with pytest.raises(BadInputError, match="official or tight"):
        ascending_counts(0)


# -- CJ-GRPO -----------------------------------------------------------------------------------------------------------
def test_the_loss_over_a_trajectory():
    model, advantages = TinyDenoiser(), torch.tensor([0.7, -0.3])
    found = DenoisingSampler(gen_length=16, schedule=AscendingSteps(), temperature=1.0)(model, IDS, seeds=[0, 1])
    logps = trajectory_logps(model, found).per_position
    weights = step_mean_weights(found)
    loss = cj_grpo_loss(logps, logps.detach(), advantages, weights)
    by_hand = 0.0
    for step in range(4):
        fixed = found.fix_step == step
        by_hand += -(advantages[:, None].expand_as(logps)[fixed]).sum() / fixed.sum() / 4
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    joint = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    for step in range(4):  # one graph at a time
        part = trajectory_logps(model, found, steps=[step]).per_position
        cj_grpo_loss(part, part.detach(), advantages, weights * (found.fix_step == step)).backward()
    for whole, weight in zip(joint, model.parameters(), strict=True):
        torch.testing.assert_close(whole, weight.grad, rtol=1e-4, atol=1e-6)
    centred = cj_grpo_loss(logps, logps.detach(), torch.tensor([0.5, -0.5]), weights)
    assert centred.item() == pytest.approx(0, abs=1e-6)
    shifted = cj_grpo_loss(logps, logps.detach(), torch.zeros(2), weights, ref_logps=logps - 1, beta=1.0)
    assert shifted.item() == pytest.approx(float(torch.tensor(-1.0).exp()), rel=1e-4)


def test_one_token_a_step_weighs_every_token_alike():
    found = DenoisingSampler(gen_length=8)(TinyDenoiser(), IDS[:1])
    torch.testing.assert_close(step_mean_weights(found)[found.editable], torch.full((8,), 1 / 8))


# -- GDPO --------------------------------------------------------------------------------------------------------------
def test_gdpo_at_the_old_policy_follows_the_bound():
    """rho = 1 exactly, and the gradient is -A / L times that of the bound."""
    model, rewards = TinyDenoiser(), torch.tensor([1.0, 0, 0, 1])
    ids = torch.randint(MASK, (4, 8), generator=torch.Generator().manual_seed(0))
    scored = torch.arange(8).expand(4, -1) >= 2
    advantages = mean_advantages(rewards)
    assert advantages.tolist() == [0.5, -0.5, -0.5, 0.5]
    assert mean_advantages(torch.tensor([1.0, 0, 3, 5]), torch.tensor([0, 0, 1, 1])).tolist() == [0.5, -0.5, -1, 1]
    estimate = elbo(model, ids, scored, seeds=range(4))
    with torch.no_grad():
        old = elbo(model, ids, scored, seeds=range(4))
    loss = diffusion_gdpo_loss(estimate, old, advantages, scored.sum(1))
    assert loss.item() == pytest.approx(0, abs=1e-6)
    loss.backward()
    ours = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    (-(advantages * elbo(model, ids, scored, seeds=range(4)).sequence / 6).mean()).backward()
    for one, weight in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(one, weight.grad, rtol=1e-4, atol=1e-6)


def test_gdpo_clips_and_bounds_its_kl():
    per, zero = torch.full((2, 3), 0.4), torch.zeros(2, 3)
    new, old = LikelihoodEstimate(per, 2), LikelihoodEstimate(zero, 2)
    gain = torch.tensor([1.0, -1.0])
    ratio = torch.tensor(1.2 / 3).exp()
    loss = diffusion_gdpo_loss(new, old, gain, torch.tensor([3, 3]))
    assert loss.item() == pytest.approx(float((-1.2 + ratio) / 2), rel=1e-5)
    far = LikelihoodEstimate(torch.full((2, 3), 100.0), 2)
    for kl in ("k3", "k2"):
        found = diffusion_gdpo_loss(new, new, 0 * gain, torch.tensor([3, 3]), ref=far, beta=0.1, kl=kl)
        assert torch.isfinite(found)
    for arguments in ({"kl": "k1"}, {"beta": 0.1}):
        with pytest.raises(BadInputError):
            diffusion_gdpo_loss(new, old, gain, torch.tensor([3, 3]), **arguments)
    with pytest.raises(BadInputError, match="same texts"):
        diffusion_gdpo_loss(new, old, gain[:1], torch.tensor([3, 3]))
