"""Implicit rewards: telescoping, and the theory of DPO as a Q-function on a small decision process that can be
enumerated.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.core.errors import BadInputError
from everytoken.core.implicit_reward import ImplicitReward

from ..conftest import tiny_llama

VOCAB, HORIZON, BETA = 3, 3, 0.5


# -- from models ------------------------------------------------------------------------------------------------------
def test_scores_are_log_ratios_at_the_answers_tokens():
    policy, reference = tiny_llama(11, seed=1), tiny_llama(11, seed=2)
    ids = torch.tensor([[3, 5, 8, 2, 6], [1, 4, 9, 9, 2]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 0]]).bool()
    scores = ImplicitReward(policy, reference, 0.3).score(ids, mask)
    assert (scores[~mask] == 0).all()
    logps = [torch.log_softmax(model(ids).logits.detach(), -1) for model in (policy, reference)]
    for row, place in mask.nonzero().tolist():
        ratio = logps[0][row, place - 1, ids[row, place]] - logps[1][row, place - 1, ids[row, place]]
        assert scores[row, place] == pytest.approx(0.3 * ratio.item(), abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    reward = ImplicitReward(tiny_llama(11, seed=1), tiny_llama(11, seed=2))
    ids, mask = torch.tensor([[3, 5, 8, 2]]), torch.tensor([[False, True, True, True]])
    pads = torch.zeros(1, 3, dtype=torch.long)
    order = (lambda a, b: torch.cat([a, b], 1)) if side == "left" else (lambda a, b: torch.cat([b, a], 1))
    padded = reward.score(order(pads, ids), order(pads.bool(), mask), order(pads, torch.ones_like(ids)))
    assert torch.allclose(padded[padded != 0], reward.score(ids, mask)[mask], atol=1e-5)


def test_equal_models_give_no_credit_and_the_first_token_none():
    model = tiny_llama(11, seed=1)
    ids = torch.tensor([[3, 5, 8]])
    assert ImplicitReward(model, model).score(ids, torch.ones_like(ids).bool()).eq(0).all()


def test_an_adapter_is_compared_with_its_base():
    from peft import LoraConfig, get_peft_model

    base = tiny_llama(11, seed=1)
    policy = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False))
    ids, mask = torch.tensor([[3, 5, 8, 2]]), torch.tensor([[False, True, True, True]])
    scores = ImplicitReward(policy, beta=0.2).score(ids, mask)
    plain = torch.log_softmax(tiny_llama(11, seed=1)(ids).logits.detach(), -1)
    tuned = torch.log_softmax(policy(ids).logits.detach(), -1)
    expected = 0.2 * (tuned - plain)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(scores[0, 1:], expected, atol=1e-5)


def test_errors():
    with pytest.raises(BadInputError, match="compares with a reference"):
        ImplicitReward(tiny_llama(11))
    with pytest.raises(BadInputError, match="11 and 12 tokens"):
        ImplicitReward(tiny_llama(11), tiny_llama(12))


# -- the theory, on a tabular decision process ------------------------------------------------------------------------
ANSWERS = list(itertools.product(range(VOCAB), repeat=HORIZON))
STATES = [prefix for length in range(HORIZON) for prefix in itertools.product(range(VOCAB), repeat=length)]


def rewards_of(seed):
    """A random reward for every state and action, and a random reference policy's log-probabilities."""
    torch.manual_seed(seed)
    reward = {state: torch.randn(VOCAB) for state in STATES}
    reference = {state: torch.log_softmax(torch.randn(VOCAB), -1) for state in STATES}
    return reward, reference


def soft_value_iteration(reward, reference):
    """V* and log pi* of the KL-regularised process, from the last step back."""
    value, policy = {answer: torch.zeros(()) for answer in ANSWERS}, {}
    for state in sorted(STATES, key=len, reverse=True):
        following = torch.stack([value[(*state, action)] for action in range(VOCAB)])
        q = reward[state] + BETA * reference[state] + following
        value[state] = BETA * torch.logsumexp(q / BETA, -1)
        policy[state] = (q - value[state]) / BETA
    return value, policy


def total(table, answer):
    return sum(table[answer[:place]][token] for place, token in enumerate(answer))


@given(seed=st.integers(0, 500))
@settings(max_examples=20)
def test_the_optimal_policys_log_ratios_telescope(seed):
    reward, reference = rewards_of(seed)
    value, policy = soft_value_iteration(reward, reference)
    for answer in ANSWERS:
        credit = BETA * (total(policy, answer) - total(reference, answer))
        assert credit == pytest.approx(float(total(reward, answer) - value[()]), abs=1e-4)
    for state in STATES:
        assert policy[state].exp().sum() == pytest.approx(1.0, abs=1e-5)


@given(seed=st.integers(0, 500))
@settings(max_examples=20)
def test_a_potential_leaves_the_optimal_policy_unchanged(seed):
    reward, reference = rewards_of(seed)
    _, policy = soft_value_iteration(reward, reference)
    potential = {state: torch.randn(()) for state in STATES} | {answer: torch.zeros(()) for answer in ANSWERS}
    shaped = {
        state: reward[state] + torch.stack([potential[(*state, action)] - potential[state] for action in range(VOCAB)])
        for state in STATES
    }
    _, again = soft_value_iteration(shaped, reference)
    for state in STATES:
        assert torch.allclose(policy[state], again[state], atol=1e-4)


def test_dpo_on_all_preferences_finds_the_reward_and_the_optimal_policy():
    """A tabular policy, every pair of answers with its exact Bradley-Terry preference: DPO is inverse Q-learning."""
    from everytoken.preference.base import PairScores
    from everytoken.preference.dpo import DPOLoss

    reward, reference = rewards_of(3)
    true = torch.stack([total(reward, answer) for answer in ANSWERS])
    index = {state: place for place, state in enumerate(STATES)}
    table = torch.stack([reference[state] for state in STATES]).clone().requires_grad_()
    visited = torch.tensor([[index[answer[:place]] for place in range(HORIZON)] for answer in ANSWERS])
    taken = torch.tensor(ANSWERS)
    ref_logps = torch.stack([reference[state] for state in STATES])[visited, taken]
    first, second = torch.triu_indices(len(ANSWERS), len(ANSWERS), 1)
    preferred = torch.sigmoid(true[first] - true[second])  # the chance that the first is preferred
    loss = DPOLoss(beta=BETA)
    mask = torch.ones(len(first), HORIZON, dtype=torch.bool)
    optimizer = torch.optim.LBFGS([table], lr=1, max_iter=400, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def pairs(logps, a, b):
        return PairScores(logps[a], logps[b], mask, mask)

    def step():
        optimizer.zero_grad()
        logps = torch.log_softmax(table, -1)[visited, taken]
        won = loss(pairs(logps, first, second), pairs(ref_logps, first, second)).losses
        lost = loss(pairs(logps, second, first), pairs(ref_logps, second, first)).losses
        value = (preferred * won + (1 - preferred) * lost).mean()
        value.backward()
        return value

    optimizer.step(step)
    learned = torch.log_softmax(table, -1).detach()
    credit = BETA * (learned[visited, taken] - ref_logps).sum(1)
    gaps, wanted = credit[:, None] - credit[None], true[:, None] - true[None]
    assert torch.allclose(gaps, wanted, atol=5e-3)
    _, optimal = soft_value_iteration(reward, reference)
    for state in STATES:
        assert torch.allclose(learned[index[state]], optimal[state], atol=2e-2)  # of rare answers' small gradients
