"""Training the policy: rewards against the reduction itself, and a few steps from scratch."""

from __future__ import annotations

import pytest
import torch

from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.reduction.base import ReductionContext, selection
from everytoken.reduction.policy_reducer import FEATURES, KeepPolicy, PolicyReducer
from everytoken.reduction.policy_training import (
    OneQuestion,
    PolicyTraining,
    looked_at,
    repeated,
    rewards_of,
    train_policy,
)
from everytoken.reduction.seam import reduce_tokens
from everytoken.reduction.vision_training import SceneQuestions
from everytoken.training.datasets.scenes import SceneMaker
from everytoken.training.vision import new_vlm, vlm_config

from .models import tiny

QUESTIONS = OneQuestion(SceneQuestions(64, SceneMaker()))


class Fixed:
    """Keeps what it is told to, image by image."""

    declares = PolicyReducer(policy=KeepPolicy(torch.zeros(len(FEATURES)), torch.zeros(()), 16)).declares

    def __init__(self, kept):
        self.kept = iter(kept)

    def encoder_layers(self, depth):
        return (depth - 1,)

    def reduce(self, features: torch.Tensor, context: ReductionContext):
        self.seen = context
        return selection(features, next(self.kept).nonzero()[:, 0])


def untrained():
    torch.manual_seed(0)
    return new_vlm(vlm_config(hidden=16)).eval()


def test_a_reward_is_the_answer_of_the_reduced_model_less_the_cost():
    model, batch = untrained(), QUESTIONS.batch(3, "here")
    tables, output = looked_at(model, batch)
    assert tables.shape == (3, 64, len(FEATURES))
    kept = (torch.rand(3, 2, 64, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    # labels that the model gives with the first draw are right there
    with reduce_tokens(model, Fixed(kept[:, 0]), positions="original"):
        logits = model(**batch).logits
    said = logits[:, -3:-1].argmax(-1)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, -2:] = said
    found = rewards_of(model, batch, output, kept, beta=0.5)
    assert torch.allclose(found[:, 0], 1 - 0.5 * kept[:, 0].mean(-1))
    right = found + 0.5 * kept.mean(-1)
    assert torch.allclose(right, right.round(), atol=1e-6) and set(right.round().flatten().tolist()) <= {0.0, 1.0}


def test_the_policy_sees_the_question_and_never_the_answer():
    model, batch = untrained(), QUESTIONS.batch(2, "here")
    tables, _ = looked_at(model, batch)
    other = dict(batch, input_ids=batch["input_ids"].clone())
    other["input_ids"][:, -2] = 7
    assert torch.equal(looked_at(model, other)[0], tables)
    fixed = Fixed(torch.ones(2, 64))
    cut = {name: batch[name][:, :-2] for name in ("input_ids", "attention_mask")} | {
        "pixel_values": batch["pixel_values"]
    }
    with reduce_tokens(model, fixed):
        model(**cut)
    words = batch["input_ids"][1, 64:66]
    assert torch.equal(fixed.seen.text, model.get_input_embeddings()(words))


def test_tokens_that_cost_much_go(tmp_path):
    model = untrained()
    config = PolicyTraining(batch=2, steps=16, beta=20.0, lr=0.8, samples=2)
    policy, curve = train_policy(model, QUESTIONS, config, tmp_path)
    assert curve[-1][1] < curve[0][1] and policy.width == 16
    with reduce_tokens(model, PolicyReducer(policy=policy)) as run:
        batch = QUESTIONS.batch(2, "later")
        model(**batch)
    assert run.last.tokens_after < 40
    again, _ = train_policy(model, QUESTIONS, config, tmp_path)
    assert torch.equal(again.weight, policy.weight)


def test_containers_stay():
    pieces = [torch.zeros(2, 3), torch.ones(2, 3)]
    assert [float(item.mean()) for item in repeated(pieces, 2)] == [0, 0, 1, 1]
    assert isinstance(repeated(tuple(pieces), 2), tuple)
    assert repeated(torch.stack(pieces), 2).shape == (4, 2, 3)


@pytest.mark.parametrize("wrong", [{"samples": 1}, {"beta": -1.0}, {"steps": 0}, {"entropy_weight": -0.1}])
def test_bad_settings(wrong):
    with pytest.raises(BadInputError):
        PolicyTraining(**wrong)


def test_models_without_a_summary_token_are_refused():
    with pytest.raises(UnsupportedModelError, match="CLS"):
        train_policy(tiny("smolvlm"), QUESTIONS, PolicyTraining(steps=1))
