"""The adapter to verl by the calls that verl's documentation shows, against the trainer's own stages; verl itself need
not be installed.
"""

from __future__ import annotations

import importlib.util
import sys
import types

import numpy as np
import pytest
import torch

from everytoken.core.errors import BadInputError, MissingExtraError
from everytoken.integrations.verl import advantage_estimator, policy_loss, register, register_loss
from everytoken.reinforcement.base import Recipe
from everytoken.reinforcement.d3s import LinearSchedule, MaxVarianceRollouts
from everytoken.reinforcement.hapo import HAPO, TokenLevelAverage, token_level_advantages
from everytoken.reinforcement.tempo import TEMPO
from everytoken.reinforcement.ulorl import TruncatedIsWrong

IDS = torch.tensor([[5, 6, 7, 2], [5, 6, 8, 2], [5, 9, 2, 0], [4, 1, 2, 0]])
MASK = (torch.arange(4) < torch.tensor([4, 4, 3, 3])[:, None]).long()
REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.0])
AT_END = torch.zeros(4, 4).scatter_(1, MASK.sum(1, keepdim=True) - 1, REWARDS[:, None])
UIDS = np.array(["a"] * 4, dtype=object)


def called(estimator, rewards=AT_END, mask=MASK, index=UIDS, **more):
    return estimator(token_level_rewards=rewards, response_mask=mask, index=index, config=None, **more)


def test_tempos_printed_case():
    advantages, returns = called(advantage_estimator(TEMPO().recipe()), batch={"responses": IDS})
    expected = [
        [1.1547, 0.5773, 1.7320, 0.8660], [-0.5773, -1.1547, -1.7320, -0.8660],
        [1.1547, 1.4434, 0.8660, 0], [-1.7320, -0.8660, -0.8660, 0],
    ]  # fmt: skip
    assert torch.allclose(advantages, torch.tensor(expected), atol=1e-4)
    assert torch.equal(advantages, returns)
    with pytest.raises(BadInputError, match="needs the responses' ids"):
        called(advantage_estimator(TEMPO().recipe()))


def test_groups_may_be_mixed_and_the_rest_is_grpo():
    rewards = torch.cat([AT_END, AT_END.flip(0)])
    mask = torch.cat([MASK, MASK.flip(0)])
    index = np.array(["x", "y", "x", "y", "y", "x", "x", "y"], dtype=object)
    found, _ = called(advantage_estimator(Recipe()), rewards, mask, index)
    for name in ("x", "y"):
        rows = torch.tensor([uid == name for uid in index])
        r = rewards[rows].sum(1)
        expected = ((r - r.mean()) / (r.std() + 1e-6))[:, None] * mask[rows]
        assert torch.allclose(found[rows], expected)
    lone, _ = called(advantage_estimator(Recipe()), AT_END[:1], MASK[:1], UIDS[:1])
    assert not lone.any()


def test_hapos_token_average_and_pieces_in_the_trainers_order():
    class Half:
        kind = "token_weight"

        def __call__(self, batch, advantages):
            return torch.where(batch.positions < 2, 1.0, 0.5)

    found, _ = called(advantage_estimator(Recipe(TokenLevelAverage(), Half())))
    whole = token_level_advantages(REWARDS, MASK.bool(), torch.zeros(4, dtype=torch.long))[:, None] * MASK
    assert torch.allclose(found, whole * torch.tensor([1.0, 1.0, 0.5, 0.5]))


def test_progress_is_counted_where_the_steps_are_known():
    piece = MaxVarianceRollouts(LinearSchedule(0.5, 1.0), divisor="all")
    with pytest.raises(BadInputError, match="steps="):
        called(advantage_estimator(Recipe(piece)))
    estimator = advantage_estimator(Recipe(piece), steps=2)
    kept = [(called(estimator)[0] != 0).any(1).sum().item() for _ in range(3)]
    assert kept == [2, 3, 4]
    assert (called(advantage_estimator(Recipe(piece), steps=2, first_step=2))[0] != 0).any(1).sum() == 4


def test_what_verl_cannot_serve_is_refused_by_name():
    with pytest.raises(BadInputError, match="EntropyTemperature sets the temperature"):
        advantage_estimator(HAPO().recipe())
    with pytest.raises(BadInputError, match="keeps"):
        advantage_estimator(Recipe(MaxVarianceRollouts(LinearSchedule(0.5, 1.0))))
    from everytoken.reinforcement.tw_grpo import TWGRPO

    with pytest.raises(BadInputError, match="needs distributions"):
        advantage_estimator(TWGRPO().recipe())
    with pytest.raises(BadInputError, match="which responses were cut"):
        called(advantage_estimator(Recipe(TruncatedIsWrong())))


def test_a_policy_loss_has_no_other_pieces():
    with pytest.raises(BadInputError, match="TokenLevelAverage sets the group advantage, which is no part"):
        policy_loss(Recipe(TokenLevelAverage()))
    if importlib.util.find_spec("verl") is None:
        with pytest.raises(MissingExtraError, match="verl"):
            register_loss("everytoken_plain", Recipe())


def test_registration(monkeypatch):
    """With verl's own registry where it is installed; else by the decorator's documented form."""
    if importlib.util.find_spec("verl") is None:
        with pytest.raises(MissingExtraError, match="verl"):
            register("everytoken_tempo", TEMPO().recipe())
        registry = {}
        names = ("verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos")
        modules = {name: types.ModuleType(name) for name in names}
        modules["verl"].__spec__ = importlib.util.spec_from_loader("verl", None)
        modules[names[-1]].register_adv_est = lambda name: lambda function: registry.setdefault(name, function)
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
    else:
        from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY as registry
    made = register("everytoken_tempo", TEMPO().recipe())
    assert registry["everytoken_tempo"] is made
