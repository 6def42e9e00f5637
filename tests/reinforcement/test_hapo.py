"""HAPO's signal, its four parts, and that each part left out changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.core.errors import BadInputError
from everytoken.reinforcement.base import UpdateBatch
from everytoken.reinforcement.hapo import (
    HAPO,
    EntropyClip,
    EntropyRedistribution,
    EntropyTemperature,
    entropy_signal,
    entropy_statistics,
    token_level_advantages,
)

from .common import batch_of, distance, made, stock, weights

SEEDS = st.integers(0, 300)


def signal(entropies, mask, pivot=0.8, **more):
    return entropy_signal(entropies, entropy_statistics(entropies, mask, pivot), **more)


@given(seed=SEEDS, pivot=st.sampled_from([0.2, 0.5, 0.8]))
@settings(max_examples=40)
def test_the_signal(seed, pivot):
    generator = torch.Generator().manual_seed(seed)
    entropies = 0.01 + 3 * torch.rand(4, 6, generator=generator)
    mask = torch.rand(4, 6, generator=generator) < 0.8
    mask[0, :3] = True
    found, valid = signal(entropies, mask, pivot)[mask], entropies[mask]
    order = valid.argsort()
    assert found.min() >= -1 - 1e-6 and found.max() <= 1 + 1e-6
    assert (found[order].diff() >= 0).all()
    assert found[order[round(pivot * (len(valid) - 1))]] == 0
    if 0 < round(pivot * (len(valid) - 1)) < len(valid) - 1:
        assert found[order[-1]].item() == pytest.approx(1) and found[order[0]].item() == pytest.approx(-1)
    for other in (0.5 * entropies, entropies**2):
        assert torch.allclose(signal(other, mask, pivot)[mask], found, atol=1e-4)
    assert torch.equal(signal(entropies, mask, pivot, released_sign=True)[mask], found.abs())
    junk = torch.where(mask, entropies, 1e4)
    assert torch.equal(signal(junk, mask, pivot)[mask], found)


def test_a_signal_without_spread_is_zero():
    for entropies in (torch.full((2, 3), 0.7), torch.zeros(2, 3)):
        assert not signal(entropies, torch.ones(2, 3).bool()).any()
    assert not signal(torch.rand(2, 3), torch.zeros(2, 3).bool()).any()
    assert not signal(torch.rand(1, 1), torch.ones(1, 1).bool()).any()


def lengths_to_mask(lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def test_token_level_advantages():
    groups = torch.zeros(3)
    found = token_level_advantages(torch.tensor([1.0, 0, 0]), lengths_to_mask([4, 2, 3]), groups)
    assert found.tolist() == pytest.approx([1.1180, -0.8944, -0.8944], abs=1e-4)
    rewards, lengths = torch.tensor([1.0, 0.3, 0.0]), [5, 1, 3]
    found = token_level_advantages(rewards, lengths_to_mask(lengths), groups)
    assert (found * torch.tensor(lengths)).sum().item() == pytest.approx(0, abs=1e-5)
    even = token_level_advantages(rewards, lengths_to_mask([4, 4, 4]), groups)
    sample = (rewards - rewards.mean()) / rewards.std()
    assert torch.allclose(even, sample * math.sqrt(3 / 2), atol=1e-4)
    assert not token_level_advantages(torch.ones(3), lengths_to_mask([1, 2, 3]), groups).any()
    assert not token_level_advantages(torch.full((3,), float("nan")), lengths_to_mask([1, 2, 3]), groups).any()


@pytest.mark.parametrize(("wrong", "falls_back"), [(25, False), (26, True)])
def test_a_group_with_a_huge_advantage_falls_back(wrong, falls_back):
    rewards = torch.tensor([1.0, 0.0])
    found = token_level_advantages(rewards, lengths_to_mask([1, wrong]), torch.zeros(2))
    expected = (0.5 / math.sqrt(0.5)) if falls_back else math.sqrt(25)
    assert found[0].item() == pytest.approx(expected, abs=1e-3)


def update(seed=0, ratio=None):
    generator = torch.Generator().manual_seed(seed)
    entropies = 0.01 + torch.rand(4, 6, generator=generator)
    mask = torch.ones(4, 6).bool()
    mask[1, 3:] = False
    ratio = torch.ones(4, 6) if ratio is None else ratio
    return UpdateBatch(ratio, torch.zeros(4, 6), entropies, mask, torch.ones(4, 6))


def test_bounds_widen_on_one_side():
    one = update()
    low, high = torch.full((4, 6), 0.2), torch.full((4, 6), 0.28)
    found = EntropyClip()(one, low, high)
    h = torch.where(one.mask, signal(one.entropies, one.mask), 0.0)
    assert torch.allclose(found[0], torch.where(h <= 0, 0.2 * (1 - h), 0.2))
    assert torch.allclose(found[1], torch.where(h > 0, 0.28 * (1 + h), 0.28))
    assert found[0].max() <= 0.4 + 1e-6 and found[1].max() <= 0.56 + 1e-6
    assert not ((found[0] > 0.2 + 1e-6) & (found[1] > 0.28 + 1e-6)).any()


def test_redistribution():
    """Uncertain tokens that moved are amplified, certain ones that did not are damped."""
    low, high = torch.full((4, 6), 0.2), torch.full((4, 6), 0.28)
    still = update()
    h = torch.where(still.mask, signal(still.entropies, still.mask), 0.0)
    found = EntropyRedistribution()(still, low, high)
    assert torch.allclose(found, torch.where(h > 0, 1.0, 1 + h))
    lowest = torch.where(still.mask, still.entropies, 9.0).argmin()
    assert found.flatten()[lowest].item() == pytest.approx(0, abs=1e-6)
    for ratio in (0.85, 1.2):  # outside (0.9, 1.14)
        moved = EntropyRedistribution()(update(ratio=torch.full((4, 6), ratio)), low, high)
        assert torch.allclose(moved, torch.where(h > 0, 1 + h, 1.0))


def test_statistics_of_the_batch():
    """Bounds and weights by the entropies of the whole batch of rollouts, however small the micro-batch is."""
    whole = batch_of([0.0, 0.0], entropies=torch.tensor([[0.1, 0.5, 1.5], [0.2, 0.7, 1.0]]))
    piece, micro = EntropyClip(stats="batch"), EntropyClip()
    assert piece.needs == {"entropies"} and not micro.needs
    one = update()
    bounds = torch.full((4, 6), 0.2), torch.full((4, 6), 0.28)
    assert torch.equal(piece(one, *bounds)[0], bounds[0])  # nothing is known yet
    piece.observe(whole)
    statistics = entropy_statistics(whole.entropies, whole.mask)
    h = torch.where(one.mask, entropy_signal(one.entropies, statistics).clamp(-1, 1), 0.0)
    assert torch.allclose(piece(one, *bounds)[0], torch.where(h <= 0, 0.2 * (1 - h), 0.2))
    again = EntropyRedistribution(stats="batch")
    again.observe(whole)
    assert torch.allclose(again(one, *bounds), torch.where(h > 0, 1.0, 1 + h))


def test_the_temperature():
    """Higher where entropy is high, by the statistics of the batch before; the argmax stays."""
    piece = EntropyTemperature(tau=0.5, pivot=0.5)
    flat, peaked = torch.tensor([[0.1, 0.0, 0.05, 0.0, 0.0]]), torch.tensor([[9.0, 0.0, 0.0, 0.0, 0.0]])
    scores = torch.cat([flat, peaked])
    assert torch.equal(piece.processor()(None, scores), scores)  # nothing is known yet
    piece.observe(batch_of([0.0, 0.0], entropies=torch.tensor([[0.01, 0.5, 1.5], [0.1, 0.5, 1.0]])))
    found = piece.processor()(None, scores)
    factors = (scores / found)[:, 0]
    assert factors[0].item() == pytest.approx(1.5) and 0.5 <= factors[1] < 1
    assert torch.equal(found.argmax(-1), scores.argmax(-1))
    again = EntropyTemperature(tau=0.5, pivot=0.5)
    again.load_state_dict(piece.state_dict())
    assert torch.equal(again.processor()(None, scores), found)
    plain = EntropyTemperature(tau=0.1, pivot=0.5, scaled=False)
    plain.statistics = piece.statistics
    entropy = torch.distributions.Categorical(logits=flat[0]).entropy()
    z = (entropy.log() - piece.statistics.pivot) / piece.statistics.spread
    assert (flat / plain.processor()(None, flat))[0, 0].item() == pytest.approx(1 + 0.1 * z.item(), abs=1e-5)


def test_samples_follow_the_temperature():
    piece = EntropyTemperature(tau=1.0, pivot=0.5)
    piece.observe(batch_of([0.0], length=3, entropies=torch.tensor([[0.2, 0.5, 1.2]])))
    logits = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0])
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    h = min(1.0, ((entropy.log() - math.log(0.5)) / (math.log(1.2) - math.log(0.5))).item())
    expected = torch.softmax(logits / (1 + h), -1)
    probabilities = torch.softmax(piece.processor()(None, logits[None].expand(4000, -1)), -1)
    drawn = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    counts = torch.bincount(drawn, minlength=5)
    chi_square = ((counts - 4000 * expected).square() / (4000 * expected)).sum()
    assert chi_square < 18.5  # 0.1% of a chi-square with 4 degrees of freedom


@pytest.mark.slow
def test_all_parts_left_out_is_dapo(tmp_path):
    nothing = HAPO(temperature_tau=0.0, token_average=False, adv_beta=0.0, clip_alpha=0.0)
    assert not nothing.recipe().pieces
    zero = [EntropyTemperature(0.0), EntropyRedistribution(0.0), EntropyClip(0.0)]
    ours, theirs = made(tmp_path, *zero, **nothing.arguments()), stock(tmp_path, **nothing.arguments())
    for trainer in (ours, theirs):
        torch.manual_seed(3)
        trainer.train()
    assert distance(weights(ours), weights(theirs)) == 0.0


def test_the_dual_clip_stops_the_gradient(tmp_path):
    """A negative advantage and a ratio above c: the loss is c|A| and nothing moves."""
    trainer = made(tmp_path, **HAPO(clip_ratio_c=1.5).arguments(), steps_per_generation=1)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    batch["advantages"] = torch.full_like(batch["advantages"], -1.0)
    batch["old_per_token_logps"] = batch["old_per_token_logps"] - 2.0  # ratio e^2
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(1.5)
    assert trainer.model.lm_head.weight.grad.abs().max() == 0
    assert HAPO().arguments()["delta"] == 10.0
    assert HAPO(clip_ratio_c=None).arguments()["delta"] is None  # GRPOConfig's own: no dual clip


@pytest.mark.slow
def test_all_parts_train_and_resume(tmp_path):
    method = HAPO(temperature_tau=0.5, stats="batch")
    changes = dict(max_steps=4, num_iterations=1, steps_per_generation=1, **method.arguments())
    whole = made(tmp_path / "a", *method.recipe().pieces, save_strategy="steps", save_steps=2, **changes)
    whole.train()
    again = made(tmp_path / "b", *method.recipe().pieces, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert distance(weights(whole), weights(again)) == 0.0
    assert whole.recipe.one("temperature").statistics is not None


def test_bad_settings():
    for changes, name in (({"adv_beta": 2.0}, "adv_beta"), ({"entropy_pivot": -0.1}, "entropy_pivot"),
                          ({"clip_ratio_c": 1.1}, "clip_ratio_c"), ({"stats": "all"}, "stats")):  # fmt: skip
        with pytest.raises(BadInputError, match=name):
            HAPO(**changes)
