"""cDPO's equation and limits, the contrastive estimator against brute force, the rollout oracle against enumeration."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from everytoken.core.errors import BadInputError, TokenizerMismatchError
from everytoken.preference.base import Example, PreferenceLoss, TokenAnnotator
from everytoken.preference.cdpo import CDPOLoss, ContrastiveEstimator, RolloutOracle, critical_tokens
from everytoken.preference.dpo import DPOLoss
from everytoken.reproduce.beds.small_models import character_tokenizer

from ..conftest import tiny_llama
from .problems import evaluate, log_ratio, pairs
from .test_trainer import first_batch, make

SEEDS = st.integers(0, 200)


def problem(seed=0):
    work = pairs(seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    return *work, {"contrast": torch.rand(work[2].shape, generator=generator, dtype=torch.float64)}


def test_contract():
    assert isinstance(CDPOLoss(), PreferenceLoss)
    assert isinstance(ContrastiveEstimator(tiny_llama(), tiny_llama()), TokenAnnotator)


@given(seed=SEEDS, beta=st.floats(0.01, 2))
@settings(max_examples=25, deadline=None)
def test_weights_of_one_are_dpo_in_value_and_gradient(seed, beta):
    work = pairs(seed=seed)
    zeros = {"contrast": torch.zeros(work[2].shape, dtype=torch.float64)}  # s = 0: every rejected token is critical
    ours, grad = evaluate(CDPOLoss(beta=beta), *work, zeros)
    theirs, expected = evaluate(DPOLoss(beta=beta), *work)
    assert torch.allclose(ours.losses, theirs.losses)
    assert torch.allclose(grad, expected)


@given(seed=SEEDS, chosen=st.booleans(), smoothing=st.floats(0, 0.49))
@settings(max_examples=25, deadline=None)
def test_equals_the_equation(seed, chosen, smoothing):
    policy, reference, labels, mask, columns = problem(seed)
    loss = CDPOLoss(beta=0.3, weight_chosen=chosen, label_smoothing=smoothing)
    output, grad = evaluate(loss, policy, reference, labels, mask, columns)
    u, s = log_ratio(policy, reference, labels, mask), columns["contrast"]
    z = ((s[0] if chosen else 1) * u[0]).sum(-1) - ((1 - s[1]) * u[1]).sum(-1)
    expected = -(1 - smoothing) * F.logsigmoid(0.3 * z) - smoothing * F.logsigmoid(-0.3 * z)
    assert torch.allclose(output.losses, expected.to(output.losses), atol=1e-5)
    (plain,) = torch.autograd.grad(expected.mean(), policy)
    assert torch.allclose(grad, plain, atol=1e-6)


def test_per_position_pairs_tokens_inside_the_sigmoid():
    policy, reference, labels, mask, columns = problem(4)
    output, _ = evaluate(CDPOLoss(per_position=True), policy, reference, labels, mask, columns)
    u, s = log_ratio(policy, reference, labels, mask).detach(), columns["contrast"]
    for row in range(len(output.losses)):
        terms = [
            -F.logsigmoid(0.1 * (u[0, row, t] - (1 - s[1, row, t]) * u[1, row, t]))
            for t in range(u.shape[-1])
            if mask[0, row, t] or mask[1, row, t]
        ]
        assert output.losses[row].item() == pytest.approx(sum(terms).item() / len(terms), abs=1e-5)


@pytest.mark.parametrize("weight_chosen", [False, True])
def test_the_grids_mean_is_that_of_the_authors_code(weight_chosen):
    """The difference of weighted log-ratios stays a grid, and the loss is its mean over every position of the padded
    batch: prompt and padding count too, at the loss of a difference of zero.
    """
    policy, reference, labels, mask, columns = problem(5)
    mask[:, :, -1] = False  # padding of the whole batch
    settings_ = dict(beta=0.3, weight_chosen=weight_chosen, label_smoothing=0.1, per_position=True)
    output, grad = evaluate(CDPOLoss(position_mean="grid", **settings_), policy, reference, labels, mask, columns)
    u, s = log_ratio(policy, reference, labels, mask), columns["contrast"]
    logits = (s[0] if weight_chosen else 1) * u[0] - (1 - s[1]) * u[1]  # [B, T], zero outside both responses
    grid = -0.9 * F.logsigmoid(0.3 * logits) - 0.1 * F.logsigmoid(-0.3 * logits)
    assert output.losses.mean().item() == pytest.approx(grid.mean().item(), abs=1e-6)
    assert grid[:, -1].tolist() == pytest.approx([math.log(2)] * 3)
    (plain,) = torch.autograd.grad(grid.mean(), policy)
    assert torch.allclose(grad, plain, atol=1e-7)
    by_tokens, _ = evaluate(CDPOLoss(**settings_), policy, reference, labels, mask, columns)
    assert abs(by_tokens.losses.mean() - output.losses.mean()) > 1e-3


def test_the_grid_is_the_trainers_padded_batch(tmp_path, embedded_tokenizer):
    """From logits of whole padded rows, as the authors' code has it: a position for every token but the first."""
    estimator = ContrastiveEstimator(tiny_llama(49152, seed=3, eos=2), tiny_llama(49152, seed=4, eos=2))
    loss = CDPOLoss(per_position=True, position_mean="grid")
    trainer = make(tmp_path, embedded_tokenizer, loss, annotators=[estimator])
    batch = first_batch(trainer)
    found = trainer.compute_loss(trainer.model, dict(batch))
    ids, inside = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
    logps = [
        torch.log_softmax(model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1], -1)
        .gather(-1, ids[:, 1:, None])[..., 0] * inside
        for model in (trainer.model, trainer.ref_model)
    ]  # fmt: skip
    chosen, rejected = (logps[0] - logps[1]).chunk(2)
    score = estimator.score(ids, batch["completion_mask"].bool(), batch["attention_mask"])[:, 1:].chunk(2)[1]
    grid = -F.logsigmoid(0.1 * (chosen - (1 - score) * rejected))
    assert found.item() == pytest.approx(grid.mean().item(), abs=1e-5)


def test_bad_settings():
    for setting in (
        dict(beta=0),
        dict(label_smoothing=0.5),
        dict(position_mean="rows"),
        dict(position_mean="grid"),  # without per_position there are no positions to average
    ):
        with pytest.raises(BadInputError):
            CDPOLoss(**setting)


# -- contrastive estimation
# ----------------------------------------------------------------------------------------------
def batch(vocab=11):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocab, (3, 8), generator=generator)
    attention = torch.ones_like(ids)
    attention[1, 6:] = 0
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, 3:], mask[1, 2:6], mask[2, 5:7] = True, True, True
    return ids, mask, attention


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 3.0])
def test_score_by_brute_force_at_the_tokens_own_position(alpha, monkeypatch):
    monkeypatch.setattr("everytoken.core.logprobs.CHUNK_BYTES", 4 * 11 * 2)  # chunks of two tokens
    positive, negative = tiny_llama(seed=1), tiny_llama(seed=2)
    ids, mask, attention = batch()
    found = ContrastiveEstimator(positive, negative, alpha).score(ids, mask, attention)
    with torch.no_grad():
        up, down = (model(input_ids=ids, attention_mask=attention).logits for model in (positive, negative))
    for row, t in itertools.product(range(3), range(8)):
        if not mask[row, t]:
            assert found[row, t] == 0
            continue
        mixed = (1 + alpha) * up[row, t - 1] - alpha * down[row, t - 1]  # logits at t - 1 predict token t
        assert found[row, t].item() == pytest.approx(torch.softmax(mixed, -1)[ids[row, t]].item(), abs=1e-5)
    if alpha == 0:
        probability = torch.softmax(up[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
        assert torch.allclose(found[:, 1:], probability * mask[:, 1:], atol=1e-5)


def test_equal_models_give_the_probability_whatever_alpha():
    model = tiny_llama(seed=1)
    ids, mask, attention = batch()
    plain = ContrastiveEstimator(model, model, 0.0).score(ids, mask, attention)
    assert torch.allclose(
        ContrastiveEstimator(model, copy.deepcopy(model), 2.0).score(ids, mask, attention), plain, atol=1e-5
    )


def test_annotate_follows_the_rows_whatever_the_batches():
    models = tiny_llama(seed=1), tiny_llama(seed=2)
    examples = [Example("", [1, 2, 3], [4, 5]), Example("", [6], [7, 8, 9, 1]), Example("", [2, 2], [3])]
    alone = [ContrastiveEstimator(*models).annotate([item])[0] for item in examples]
    for size in (1, 2, 3):
        together = ContrastiveEstimator(*models, batch_size=size).annotate(examples)
        for one, other in zip(alone, together, strict=True):
            assert torch.allclose(one, other, atol=1e-6)
    with pytest.raises(BadInputError, match="Row 1 has an empty response"):
        ContrastiveEstimator(*models).annotate([examples[0], Example("", [1], [])])
    with pytest.raises(TokenizerMismatchError, match="11 tokens"):
        ContrastiveEstimator(tiny_llama(12), tiny_llama(11))


def test_a_head_of_another_precision_than_the_layers():
    """As under mixed precision in shards: layers in bfloat16, the head's own weights in float32."""
    ids, mask = torch.randint(1, 11, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    models = [tiny_llama(seed=seed) for seed in (1, 2)]
    expected = ContrastiveEstimator(*models).score(ids, mask)
    for model in models:
        model.model.to(torch.bfloat16)
    assert torch.allclose(ContrastiveEstimator(*models).score(ids, mask), expected, atol=0.1)


# -- the rollout oracle
# --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def oracle_world():
    """A model over four characters and a grader: a response is correct if it ends in an even number of a's."""
    tokenizer = character_tokenizer("abc")
    model = tiny_llama(len(tokenizer), seed=5, eos=0)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 0, 1
    return model, tokenizer, lambda _prompt, response: response.count("a") % 2 == 0


def exact(model, prompt, prefix, left, correct, tokenizer):
    """Probability of a correct end after ``prefix``, by enumeration of every continuation of up to ``left`` tokens."""
    if left == 0 or (prefix and prefix[-1] == 0):
        return float(correct("", tokenizer.decode(prefix, skip_special_tokens=True)))
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([prompt + prefix])).logits[0, -1], -1)
    return sum(
        p[token].item() * exact(model, prompt, [*prefix, token], left - 1, correct, tokenizer)
        for token in range(len(p))
    )


def test_scores_are_the_chances_of_a_correct_end(oracle_world):
    model, tokenizer, correct = oracle_world
    torch.manual_seed(0)
    prompt, response = tokenizer("bc")["input_ids"], [*tokenizer("abca")["input_ids"], 0]
    oracle = RolloutOracle(model, tokenizer, correct, rollouts=4000, max_new_tokens=3, batch_size=9000)
    found = oracle.score(prompt, response)
    for t in range(4):
        chance = exact(model, prompt, response[: t + 1], 3, correct, tokenizer)
        assert found[t].item() == pytest.approx(chance, abs=4 * (0.25 / 4000) ** 0.5)
    assert found[4] == 1  # ended, with two a's


def test_critical_tokens():
    assert critical_tokens(torch.tensor([0.6, 0.5, 0.0, 0.02, 0.0])) == [2]
    assert critical_tokens(torch.tensor([0.6, 0.0, 0.5, 0.4])) == []  # recovers
    assert critical_tokens(torch.tensor([0.6, 0.0, 0.5, 0.0])) == [3]
    assert critical_tokens(torch.tensor([0.0, 0.0])) == [0]
    assert critical_tokens(torch.tensor([])) == []
