"""The adapter inside verl's own registries and against its own functions; `make test-verl` installs verl for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

core = pytest.importorskip("verl.trainer.ppo.core_algos")

from everytoken.core.errors import BadInputError
from everytoken.integrations.verl import policy_loss, register, register_loss
from everytoken.reinforcement.base import Recipe
from everytoken.reinforcement.d3s import LinearSchedule, MaxVarianceRollouts
from everytoken.reinforcement.hapo import HAPO, EntropyClip
from everytoken.reinforcement.tempo import TEMPO

pytestmark = pytest.mark.slow


def problem(seed=0, rows=12, length=7):
    draw = torch.Generator().manual_seed(seed)
    mask = (torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=draw)).long()
    rewards = torch.zeros(rows, length)
    rewards[torch.arange(rows), mask.sum(1) - 1] = torch.rand(rows, generator=draw)
    uids = np.array(["a", "b", "c", "a"] * (rows // 4), dtype=object)
    return rewards, mask, uids, torch.randint(0, 3, (rows, length), generator=draw)


def test_without_pieces_it_is_verls_own_grpo():
    rewards, mask, uids, _ = problem()
    register("everytoken_grpo", Recipe())
    ours = core.get_adv_estimator_fn("everytoken_grpo")(
        token_level_rewards=rewards, response_mask=mask, index=uids, config=None
    )
    for name in ("grpo", "grpo_vectorized"):
        theirs = core.get_adv_estimator_fn(name)(
            token_level_rewards=rewards, response_mask=mask, index=uids, config=None
        )
        for one, other in zip(ours, theirs, strict=True):
            assert torch.allclose(one, other, atol=1e-5)


def test_pieces_around_verls_own_advantages():
    """TEMPO without its change of value is GRPO; a weight and a selection change verl's [B, T] as they say."""

    class Half:
        kind = "token_weight"

        def __call__(self, batch, advantages):
            return torch.where(batch.positions < 2, 1.0, 0.5)

    rewards, mask, uids, ids = problem(3)
    arguments = dict(token_level_rewards=rewards, response_mask=mask, index=uids, config=None)
    grpo = core.get_adv_estimator_fn("grpo")(**arguments)[0]
    register("everytoken_td0", TEMPO(td_coef=0.0).recipe())
    plain = core.get_adv_estimator_fn("everytoken_td0")(**arguments, batch={"responses": ids})[0]
    assert torch.allclose(plain, grpo, atol=1e-4)
    register("everytoken_tree", TEMPO().recipe())
    tree = core.get_adv_estimator_fn("everytoken_tree")(**arguments, batch={"responses": ids})[0]
    assert not torch.allclose(tree, grpo, atol=0.1)
    chosen = MaxVarianceRollouts(LinearSchedule(0.5, 0.5), divisor="all")
    register("everytoken_half", Recipe(Half(), chosen), steps=10)
    found = core.get_adv_estimator_fn("everytoken_half")(**arguments)[0]
    kept = found.any(1)
    assert kept.sum() == 6
    assert torch.allclose(found[kept], (grpo * torch.where(torch.arange(7) < 2, 1.0, 0.5))[kept], atol=1e-5)


def actor(**changes):
    from verl.workers.config import ActorConfig

    return ActorConfig(strategy="fsdp", rollout_n=2, ppo_micro_batch_size_per_gpu=2, **changes)


def loss_problem(seed=1, shape=(4, 6)):
    draw = torch.Generator().manual_seed(seed)
    old = -torch.rand(shape, generator=draw)
    new = (old + 0.5 * torch.randn(shape, generator=draw)).requires_grad_(True)
    mask = (torch.arange(shape[1]) < torch.tensor([6, 3, 5, 1])[:, None]).long()
    return old, new, torch.randn(shape, generator=draw), mask


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_a_loss_without_pieces_is_verls_own(mode):
    old, new, advantages, mask = loss_problem()
    found = []
    register_loss("everytoken_plain", Recipe())
    for name in ("everytoken_plain", "vanilla"):
        loss, metrics = core.get_policy_loss_fn(name)(old, new, advantages, mask, mode, actor(clip_ratio_high=0.28))
        found.append((loss, torch.autograd.grad(loss, new)[0], metrics))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


def test_bounds_and_weights_of_a_recipe():
    """By hand, value and gradient; the dual clip stays verl's."""

    class Wide:
        kind = "clip"

        def __call__(self, update, low, high):
            return 2 * low, torch.where(update.logps < -0.5, 3 * high, high)

    class Moved:
        kind = "ratio_weight"

        def __call__(self, update, low, high):
            return torch.where((update.ratio - 1).abs() > 0.3, 2.0, 1.0)

    old, new, advantages, mask = loss_problem()
    loss, _ = policy_loss(Recipe(Wide(), Moved()))(
        old, new, advantages, mask, "token-mean", actor(clip_ratio_low=0.1, clip_ratio_high=0.1)
    )
    ratio = (new - old).exp()
    high = torch.where(new.detach() < -0.5, 0.3, 0.1)
    weighted = advantages * torch.where((ratio.detach() - 1).abs() > 0.3, 2.0, 1.0)
    worse = torch.maximum(-weighted * ratio, -weighted * ratio.clamp(torch.full_like(high, 0.8), 1 + high))
    worse = torch.where(weighted < 0, torch.minimum(worse, -3.0 * weighted), worse)
    expected = (worse * mask).sum() / mask.sum()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.allclose(torch.autograd.grad(loss, new)[0], torch.autograd.grad(expected, new)[0], atol=1e-6)


def test_what_a_loss_cannot_have():
    old, new, advantages, mask = loss_problem()
    with pytest.raises(BadInputError, match="entropies"):
        policy_loss(Recipe(EntropyClip()))(old, new, advantages, mask, "token-mean", actor())
    with pytest.raises(BadInputError, match="EntropyTemperature sets the temperature"):
        policy_loss(HAPO().recipe())
