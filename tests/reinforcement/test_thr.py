"""THR against autograd, three implementations of it, and its weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.reinforcement.thr import THR, HiddenRewardWeights, negative_weights, thr_scores, threshold

from .common import batch_of, made, policy

SEEDS = st.integers(0, 300)


def problem(seed, rows=4, length=4, size=5, vocab=7):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, size, generator=generator, dtype=torch.double)
    head = torch.randn(vocab, size, generator=generator, dtype=torch.double)
    ids = torch.randint(0, vocab, (rows, length), generator=generator)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)
    return hidden, head, ids, mask, torch.tensor([True, False, True, False])


def likelihood(head, hidden, ids, mask, correct):
    """Length-normalised log-likelihood of the correct responses."""
    logps = torch.log_softmax(hidden @ head.T, -1).gather(-1, ids[..., None])[..., 0] * mask
    return (logps.sum(1) / mask.sum(1))[correct].sum()


@given(seed=SEEDS)
@settings(max_examples=25)
def test_it_is_the_directional_derivative_of_a_one_token_step(seed):
    hidden, head, ids, mask, correct = problem(seed)
    head.requires_grad_(True)
    (gradient,) = torch.autograd.grad(likelihood(head, hidden, ids, mask, correct), head)
    scores = thr_scores(hidden, hidden @ head.detach().T, ids, mask, correct, "full")
    errors = torch.eye(7).double()[ids] - torch.softmax(hidden @ head.detach().T, -1)
    for j in range(len(ids)):
        for t in range(ids.shape[1]):
            step = (2.0 * correct[j] - 1) * torch.outer(errors[j, t], hidden[j, t]) * mask[j, t]
            assert scores[j, t].item() == pytest.approx((gradient * step).sum().item(), abs=1e-10)


@given(seed=SEEDS)
@settings(max_examples=15)
def test_three_ways_agree(seed):
    """The matrix, the triple loop and the Gram matrices; and what is left out of the vocabulary may be zero."""
    hidden, head, ids, mask, correct = problem(seed)
    logits = hidden @ head.T
    errors = (torch.eye(7).double()[ids] - torch.softmax(logits, -1)) * mask[..., None]
    gram = torch.einsum("ikv,jtv->ikjt", errors, errors) * torch.einsum("ikd,jtd->ikjt", hidden, hidden)
    shares = correct.double() / mask.sum(1)
    expected = torch.einsum("i,ikjt->jt", shares, gram) * torch.where(correct, 1.0, -1.0)[:, None]
    scores = thr_scores(hidden, logits, ids, mask, correct, "full")
    assert torch.allclose(scores, expected, atol=1e-10)
    loop = sum(shares[0] * (errors[0, k] @ errors[1, 0]) * (hidden[0, k] @ hidden[1, 0]) for k in range(ids.shape[1]))
    loop += sum(shares[2] * (errors[2, k] @ errors[1, 0]) * (hidden[2, k] @ hidden[1, 0]) for k in range(ids.shape[1]))
    assert scores[1, 0].item() == pytest.approx(-loop.item(), abs=1e-10)
    unseen = torch.ones(7, dtype=torch.bool)
    unseen[ids[mask]] = False
    hushed = logits.masked_fill(unseen, -torch.inf)
    ways = [thr_scores(hidden, hushed, ids, mask, correct, vocab) for vocab in ("full", "group")]
    assert torch.allclose(*ways, atol=1e-10)


def test_symmetries():
    hidden, head, ids, mask, correct = problem(0)
    logits = hidden @ head.T
    scores = thr_scores(hidden, logits, ids, mask, correct)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).double())
    assert torch.allclose(thr_scores(hidden @ rotation, logits, ids, mask, correct), scores)
    assert torch.allclose(thr_scores(3 * hidden, logits, ids, mask, correct), 9 * scores)
    order = torch.tensor([3, 1, 0, 2])
    assert torch.allclose(thr_scores(*(x[order] for x in (hidden, logits, ids, mask, correct))), scores[order])
    junk = torch.where(mask, ids, 6)
    assert torch.allclose(thr_scores(hidden, logits, junk, mask, correct), scores)
    sure = 200.0 * torch.eye(7).double()[ids]
    assert thr_scores(hidden, sure, ids, mask, correct).abs().max() < 1e-12
    # a wrong response that counts as right turns its own sign, and adds its part to the sum over right ones
    second = torch.tensor([False, True, False, False])
    more, part = (thr_scores(hidden, logits, ids, mask, right) for right in (correct | second, second))
    signs = torch.where(correct, 1.0, -1.0)[:, None]
    expected = scores - signs * part
    expected[1] = -scores[1] + part[1]
    assert torch.allclose(more, expected)
    alone = torch.tensor([True, False, False, False])
    one = mask.clone()
    one[0] = torch.tensor([True, False, False, False])
    assert thr_scores(hidden, logits, ids, one, alone)[0, 0] >= 0
    assert not thr_scores(hidden, logits, ids, mask & False, correct).any()


def weights_of(seed=0, rewards=(1.0, 0, 1, 0), **settings_):
    hidden, head, ids, mask, _ = problem(seed)
    batch = batch_of(list(rewards), ids=ids, length=4)
    batch.mask = mask
    batch.distributions = lambda rows: (hidden[rows], (hidden @ head.T)[rows])
    return HiddenRewardWeights(**settings_)(batch, torch.ones(4, 4)), batch, (hidden, hidden @ head.T, ids, mask)


def test_weights():
    up, batch, parts = weights_of(p=0.1)
    scores = thr_scores(*parts, torch.tensor([True, False, True, False]))
    correct = torch.tensor([True, False, True, False])
    tau = threshold(scores, batch.mask, correct)
    assert tau.item() == pytest.approx(max(0.0, min((scores[i].sum() / batch.mask[i].sum()).item() for i in (0, 2))))
    expected = torch.where(scores.abs() > tau, 1 + 0.1 * scores.sign(), 0.0).float()
    assert torch.allclose(up, expected)
    down, only, everything = (weights_of(**c)[0] for c in ({"p": -0.1}, {"p": 0.0}, {"p": 0.0, "tau": -1.0}))
    assert torch.allclose((up + down) / 2, only) and set(only.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(everything, torch.ones(4, 4))
    for rewards in ((0.0,) * 4, (1.0,) * 4, (float("nan"),) * 4):
        assert torch.equal(weights_of(rewards=rewards)[0], torch.ones(4, 4))


def test_its_predecessor_weakens_tokens_of_wrong_responses_only():
    """NTHR by the triple loop: s = sum over correct tokens of both inner products, without their responses' lengths."""
    weight, batch, (hidden, logits, ids, _) = weights_of(variant="nthr", vocab="full")
    correct = torch.tensor([True, False, True, False])
    errors = torch.eye(7).double()[ids] - torch.softmax(logits, -1)
    s = torch.zeros(4, 4).double()
    for j in range(4):
        for t in range(4):
            for i in (0, 2):
                for k in range(4):
                    if batch.mask[j, t] and batch.mask[i, k]:
                        s[j, t] += (errors[i, k] @ errors[j, t]) * (hidden[i, k] @ hidden[j, t])
    low = max(0.0, min((s[i].sum() / batch.mask[i].sum()).item() for i in (0, 2)))
    for tau, given_ in ((low, weight), (0.0, weights_of(variant="nthr", vocab="full", tau=0.0)[0])):
        expected = torch.where(~correct[:, None] & (s > tau), 0.0, 1.0)  # 2 |1/2 - 2/4|
        assert torch.equal(given_, expected)
    assert (expected == 0).any()
    mostly = negative_weights(-s, torch.tensor([True, False, False, False]), 0.0)
    assert set(mostly.unique().tolist()) == {0.5, 1.0}


def test_the_sum_over_a_batch_is_the_change_that_a_step_on_a_real_head_makes(tmp_path):
    """A small SGD step on the output matrix alone, for the rollouts that the trainer itself made."""
    seen = {}

    class Spy(HiddenRewardWeights):
        def __call__(self, batch, advantages):
            hidden, logits = batch.distributions(torch.arange(4))
            seen.update(hidden=hidden.double(), logits=logits, ids=batch.ids[:4], mask=batch.mask[:4])
            return super().__call__(batch, advantages)

    trainer = made(tmp_path, Spy(), temperature=0.8, steps_per_generation=1, max_steps=1, learning_rate=0.0)
    trainer.train()
    correct = torch.tensor([True, False, False, True])
    hidden, ids, mask = seen["hidden"], seen["ids"], seen["mask"]
    head = trainer.model.lm_head.weight.detach().double()
    assert torch.allclose(hidden @ head.T / 0.8, seen["logits"].double(), atol=1e-4)
    scores = thr_scores(hidden, hidden @ head.T, ids, mask, correct, "full")
    errors = (torch.eye(13).double()[ids] - torch.softmax(hidden @ head.T, -1)) * mask[..., None]
    step = torch.einsum("j,jtv,jtd->vd", torch.where(correct, 1.0, -1.0).double(), errors, hidden)
    ahead, behind = (likelihood(head + size * step, hidden, ids, mask, correct) for size in (1e-6, -1e-6))
    assert ((ahead - behind) / 2e-6).item() == pytest.approx(scores.sum().item(), rel=1e-4)


def test_a_head_with_a_bias_and_one_that_caps_its_logits():
    """A bias is the weight of a feature that is always 1: by autograd over both. Capped logits are not linear."""
    hidden, head, ids, mask, correct = problem(4)
    model = policy()
    model.lm_head = torch.nn.Linear(16, 13, bias=True)
    piece = HiddenRewardWeights(p=0.0, tau=0.0, vocab="full")
    piece.check_model(model)
    bias = torch.randn(7, generator=torch.Generator().manual_seed(5)).double().requires_grad_(True)
    head.requires_grad_(True)
    logps = torch.log_softmax(hidden @ head.T + bias, -1).gather(-1, ids[..., None])[..., 0] * mask
    gradients = torch.autograd.grad((logps.sum(1) / mask.sum(1))[correct].sum(), (head, bias))
    logits = (hidden @ head.T + bias).detach()
    errors = (torch.eye(7).double()[ids] - torch.softmax(logits, -1)) * mask[..., None]
    expected = torch.einsum("jtv,vd,jtd->jt", errors, gradients[0], hidden) + errors @ gradients[1]
    expected = expected * torch.where(correct, 1.0, -1.0)[:, None]
    batch = batch_of([1.0, 0, 1, 0], ids=ids, length=4)
    batch.mask, batch.distributions = mask, lambda rows: (hidden[rows], logits[rows])
    assert torch.equal(piece(batch, torch.ones(4, 4)), (expected.abs() > 1e-12).float())
    wide = torch.cat([hidden, torch.ones_like(hidden[..., :1])], -1)
    assert torch.allclose(thr_scores(wide, logits, ids, mask, correct, "full"), expected, atol=1e-10)
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=13)
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, num_key_value_heads=1, head_dim=4, final_logit_softcapping=2.0))
    with pytest.raises(UnsupportedModelError, match="these are capped"):
        piece.check_model(capped)


def test_bad_settings():
    for changes, name in (({"p": 1.5}, "p lies"), ({"vocab": "all"}, "vocab"), ({"tau_scale": -1.0}, "tau_scale"),
                          ({"variant": "x"}, "variant")):  # fmt: skip
        with pytest.raises(BadInputError, match=name):
            THR(**changes)
    assert policy().lm_head.bias is None
