"""The policy that keeps tokens: its gradient against an enumeration, what it looks at, and its training."""

from __future__ import annotations

import itertools

import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.reduction.base import ReductionContext
from everytoken.reduction.policy_reducer import (
    FEATURES,
    KeepPolicy,
    PolicyReducer,
    left_out,
    log_chance,
    policy_loss,
    token_features,
)
from everytoken.reduction.seam import reduce_tokens
from everytoken.testing.reducer import ReducerConformance

from .models import inputs_of, tiny

PATTERNS = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)))


def drawn(seed=0, width=8):
    generator = torch.Generator().manual_seed(seed)
    return KeepPolicy(torch.randn(len(FEATURES), generator=generator), torch.tensor(0.1), width)


class TestContract(ReducerConformance):
    def reducers(self):
        return {"half": PolicyReducer(keep=0.5, policy=drawn()), "own budget": PolicyReducer(policy=drawn())}


def exact_gradient(logits, reward):
    """Of the mean reward over all patterns, by summing them up."""
    logits = logits.clone().requires_grad_()
    chance = torch.sigmoid(logits)
    likely = (PATTERNS * chance + (1 - PATTERNS) * (1 - chance)).prod(-1)
    return torch.autograd.grad((likely * reward).sum(), logits)[0], likely.detach()


def reward_of(kept, beta=0.3):
    """Right if the second token or both outer ones are there."""
    right = (kept[..., 1] > 0) | ((kept[..., 0] > 0) & (kept[..., 3] > 0))
    return right.double() - beta * kept.sum(-1) / 4


def test_the_estimate_is_the_exact_gradient_on_average():
    """The mean over all patterns, each weighted with its probability, and over all pairs for the compared one."""
    logits, patterns = torch.tensor([0.3, -0.7, 1.1, 0.2], dtype=torch.float64), PATTERNS.double()
    rewards = reward_of(patterns)
    exact, likely = exact_gradient(logits, rewards)
    rewards = rewards + 1  # what all draws share says nothing; only the comparison takes it out
    score = patterns - torch.sigmoid(logits)  # grad log pi
    assert torch.allclose((likely * rewards) @ score, exact, atol=1e-9)
    pairs = torch.zeros(4, dtype=torch.float64)
    squares = torch.zeros(2, dtype=torch.float64)
    for one, other in itertools.product(range(16), repeat=2):
        weight = likely[one] * likely[other]
        kept = patterns[[one, other]][None]
        learned = logits.clone().requires_grad_()
        loss = policy_loss(learned[None], kept, rewards[[one, other]][None], entropy_weight=0.0)
        gradient = -torch.autograd.grad(loss, learned)[0]
        pairs += weight * gradient
        plain = (rewards[[one, other], None] * score[[one, other]]).mean(0)
        squares += weight * torch.stack([gradient.square().sum(), plain.square().sum()])
    assert torch.allclose(pairs, exact, atol=1e-6)
    assert squares[0] < 0.5 * squares[1]  # equal means, so the smaller square is the smaller variance


def test_probabilities_of_draws_sum_to_one():
    logits = torch.tensor([0.3, -2.0, 1.1, 0.0])
    assert torch.isclose(log_chance(logits, PATTERNS).exp().sum(), torch.tensor(1.0), atol=1e-6)


def test_draws_are_compared_with_the_others():
    assert torch.allclose(left_out(torch.tensor([[1.0, 0.0, 0.5]])), torch.tensor([[0.75, -0.75, 0.0]]))
    with pytest.raises(BadInputError, match="two are needed"):
        left_out(torch.zeros(2, 1))


@pytest.mark.parametrize("beta", [0.0, 50.0])
def test_what_costs_nothing_stays_and_what_costs_all_goes(beta):
    """Plain ascent along the exact gradient, from even chances."""
    logits = torch.zeros(4, dtype=torch.float64)
    for _ in range(150):
        logits += 1.5 * exact_gradient(logits, reward_of(PATTERNS.double(), beta))[0]
    chances = torch.sigmoid(logits)
    if beta:
        assert (chances < 0.05).all()
    else:
        assert chances[1] > 0.95  # alone it makes the answer right


def test_what_the_policy_looks_at():
    features = torch.tensor([[3.0, 0.0], [6.0, 0.0], [0.0, 1.0], [0.0, -2.0]])
    keys = torch.tensor([[[1.0], [0.0], [0.0], [0.0]]])
    context = ReductionContext(
        (2, 2), text=torch.tensor([[0.0, 5.0]]), cls_queries=(torch.tensor([[2.0]]),), keys=(keys,)
    )
    table = token_features(features, context)
    norms = torch.tensor([3.0, 6.0, 1.0, 2.0])
    assert torch.allclose(table[:, 0], (norms - 3) / norms.std(correction=0))
    assert torch.allclose(table[:, 1], (4 * torch.tensor([2.0, 0, 0, 0]).softmax(0)).log(), atol=1e-6)
    assert torch.allclose(table[:, 2], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert torch.allclose(table[:, 3], torch.tensor([0.0, 0.0, 1.0, -1.0]))
    assert table[:, 4].tolist() == [-0.5, -0.5, 0.5, 0.5] and table[:, 5].tolist() == [-0.5, 0.5, -0.5, 0.5]
    context.text, context.grid = None, None
    bare = token_features(features, context)
    assert not bare[:, 3].any() and not bare[:, 5].any() and bare[:, 4].tolist() == [-0.75, -0.25, 0.25, 0.75]


def test_a_policy_of_one_weight_is_a_threshold_of_that_feature():
    weight = torch.zeros(len(FEATURES))
    weight[FEATURES.index("row")] = -1.0
    reducer = PolicyReducer(policy=KeepPolicy(weight, torch.tensor(0.0), 8))
    battery = TestContract()
    reduction = reducer.reduce(battery.features(), battery.context())
    assert reduction.kept.tolist() == list(range(32))  # the upper half
    quarter = PolicyReducer(0.25, policy=reducer.policy).reduce(battery.features(), battery.context())
    assert torch.equal(quarter.kept, torch.arange(16))
    never = PolicyReducer(policy=KeepPolicy(weight, torch.tensor(-99.0), 8))
    assert len(never.reduce(battery.features(), battery.context()).kept) == 1


def test_in_a_model_it_equals_the_masked_full_model():
    model = tiny("llava")
    inputs = inputs_of("llava", model)
    with reduce_tokens(model, PolicyReducer(policy=drawn(width=32))) as run:
        logits = model(**inputs).logits[:, -1]
    hidden = inputs["attention_mask"].clone()
    visual = inputs["input_ids"] == model.config.image_token_id
    left = torch.zeros_like(visual)
    for row, places in enumerate(run.last.index):
        left[row, places[places >= 0]] = True
    hidden[visual & ~left] = 0
    assert int((visual & ~left).sum()) > 0
    full = model(
        **inputs | {"attention_mask": hidden}, position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    )
    torch.testing.assert_close(logits, full.logits[:, -1], atol=1e-4, rtol=1e-4)


def test_on_disk(tmp_path):
    policy = drawn()
    policy.save(tmp_path)
    again = PolicyReducer(weights=str(tmp_path)).policy
    assert torch.equal(again.weight, policy.weight) and again.bias == policy.bias and again.width == 8
    (tmp_path / "config.json").write_text('{"width": 8, "features": ["norm"]}')
    with pytest.raises(BadInputError, match="no policy of"):
        PolicyReducer(weights=str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BadInputError, match="does not describe"):
        PolicyReducer(weights=str(tmp_path))


def test_what_is_refused():
    battery = TestContract()
    with pytest.raises(BadInputError, match="keep"):
        PolicyReducer(keep=0.0, policy=drawn())
    with (
        pytest.raises(BadInputError, match="width 5"),
        reduce_tokens(tiny("llava"), PolicyReducer(policy=drawn(width=5))),
    ):
        pass
    with pytest.raises(BadInputError, match="an encoder layer"):
        PolicyReducer(policy=drawn()).reduce(battery.features(), ReductionContext())
    context = battery.context(9)
    with pytest.raises(BadInputError, match="keys of 9"):
        PolicyReducer(policy=drawn()).reduce(battery.features(), context)
