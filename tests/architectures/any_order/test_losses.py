"""Losses of any order: by the released code's numbers, by plain Python, and in the gradient."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import XLNetConfig, XLNetLMHeadModel

from everytoken.architectures.any_order.losses import (
    any_subset_loss,
    draw_known,
    drop_tokens,
    insertion_logps,
    insertion_loss,
    mask_batch,
    mdlm_loss,
)
from everytoken.core.errors import BadInputError
from everytoken.decoding.canvas.orders import order_mask, subset_order

from .test_modeling import IDS, network


class Fixed(nn.Module):
    """Gives the same logits whatever it reads."""

    def __init__(self, logits, stop=None):
        super().__init__()
        self.logits, self.stop = nn.Parameter(logits), stop
        self.config = SimpleNamespace(mask_token_id=9, vocab_size=10, get_text_config=lambda: self.config)

    def forward(self, input_ids=None, attention_mask=None):
        return SimpleNamespace(logits=self.logits.expand(len(input_ids), -1, -1), stop_logits=self.stop)


# -- masked diffusion --------------------------------------------------------------------------------------------------
def test_mdlm_by_hand():
    model, response = network(), torch.tensor([[0, 1, 1, 1, 1, 1]] * 2).bool()
    levels = torch.tensor([0.5, 0.25])
    loss = mdlm_loss(model, IDS, response, generator=torch.Generator().manual_seed(3), levels=levels)
    noisy = mask_batch(IDS, response, 9, torch.Generator().manual_seed(3), levels)
    assert not bool(noisy.masked[:, 0].any()) and bool((noisy.ids[noisy.masked] == 9).all())
    scores = model(input_ids=noisy.ids).logits
    scores[..., 9] = -torch.inf  # the mask is never predicted
    logps = scores.log_softmax(-1)
    total = 0.0
    for row, level in enumerate((0.5, 0.25)):
        for place in noisy.masked[row].nonzero()[:, 0].tolist():
            total -= logps[row, place, IDS[row, place]] / level / 5 / 2
    torch.testing.assert_close(loss, total)
    loss.backward()
    ours = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    total.backward()
    for one, weight in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(one, weight.grad, rtol=1e-4, atol=1e-6)


def test_the_mean_over_masks_is_the_exact_bound():
    """For a model that ignores its input every mask gives an unbiased -log p."""
    torch.manual_seed(0)
    model = Fixed(torch.randn(1, 6, 10))
    scores = model.logits.detach().clone()
    scores[..., 9] = -torch.inf
    exact = -scores.log_softmax(-1)[0, torch.arange(6), IDS[0]].mean()
    rows, every = IDS[:1].repeat(20_000, 1), torch.ones(20_000, 6, dtype=torch.bool)
    with torch.no_grad():
        found = mdlm_loss(model, rows, every, generator=torch.Generator().manual_seed(0))
    assert float(found) == pytest.approx(float(exact), rel=0.03)


def test_levels_are_spread_over_a_batch():
    response = torch.ones(64, 6, dtype=torch.bool)
    noisy = mask_batch(torch.ones(64, 6).long(), response, 9, torch.Generator().manual_seed(0))
    levels = 1 / noisy.weights
    assert torch.equal(torch.floor((levels - 1e-3) / (1 - 1e-3) * 64).long(), torch.arange(64))
    with pytest.raises(BadInputError, match="Row 1 has no response"):
        mdlm_loss(network(), IDS, torch.tensor([[1] * 6, [0] * 6]).bool())


# -- insertion ---------------------------------------------------------------------------------------------------------
SIX = torch.tensor([[2, 3, 4, 5, 6, 7]])  # CLS BOS a b c d
DROPPED = torch.tensor([[0, 0, 1, 0, 1, 1]]).bool()
EVERY = torch.ones_like(SIX)


def test_the_released_example():
    batch = drop_tokens(SIX, EVERY, DROPPED)
    assert batch.ids.tolist() == [[2, 3, 5]] and batch.dropped.tolist() == [3]
    assert list(zip(batch.anchor.tolist(), batch.token.tolist(), strict=True)) == [(1, 4), (2, 6), (2, 7)]
    torch.manual_seed(0)
    logits = torch.randn(1, 6, 8)[:, [0, 1, 3]]
    model = Fixed(logits, torch.tensor([[0.3, -0.2]]))
    loss = insertion_loss(model, batch, stop_weight=0.0)
    assert loss.item() == pytest.approx(3.309370, abs=1e-6)
    flat = logits[0, 1:].flatten().log_softmax(-1).view(2, 8)
    assert loss.item() == pytest.approx(-float(flat[0, 4] + flat[1, 6] + flat[1, 7]) / 3, abs=1e-6)
    assert insertion_loss(model, batch).item() == pytest.approx(3.309370 + 0.97408, abs=1e-5)
    loss.backward()
    q = torch.zeros(2, 8)
    q[0, 4] = q[1, 6] = q[1, 7] = 1 / 3
    torch.testing.assert_close(model.logits.grad[0, 1:], flat.exp() - q, rtol=1e-4, atol=1e-6)
    assert not bool(model.logits.grad[0, 0].any())
    none = drop_tokens(SIX, EVERY, torch.zeros_like(DROPPED))
    whole = Fixed(torch.randn(1, 6, 8), torch.tensor([[0.3, -0.2]]))
    assert insertion_loss(whole, none).item() == pytest.approx(0.47408, abs=1e-5)
    assert float(torch.tensor([0.3, -0.2]).softmax(-1)[0]) == pytest.approx(0.62246, abs=1e-5)


@pytest.mark.parametrize(
    ("row", "dropped", "targets"),
    [
        ([0, 8, 1, 4, 5, 6, 7, 4], [3, 4, 6, 7], {(2, 4): 1, (2, 5): 1, (3, 7): 1, (3, 4): 1}),
        ([0, 8, 1, 4, 4, 9], [3, 4, 5], {(2, 4): 2, (2, 9): 1}),
    ],
)
def test_the_released_collator(row, dropped, targets):
    ids = torch.tensor([row])
    batch = drop_tokens(ids, torch.ones_like(ids), F.one_hot(torch.tensor(dropped), len(row)).sum(0)[None].bool())
    found = {}
    for pair in zip(batch.anchor.tolist(), batch.token.tolist(), strict=True):
        found[pair] = found.get(pair, 0) + 1
    assert found == targets


def test_anchors_by_a_scan_and_dropping_is_undone_by_inserting():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ids = torch.randint(3, 9, (3, 8), generator=generator)
        attention = torch.arange(8) < torch.tensor([8, 6, 3])[:, None]
        dropped = (torch.rand(3, 8, generator=generator) < 0.5) & attention
        dropped[:, 0] = False
        batch = drop_tokens(ids, attention, dropped)
        for row in range(3):
            kept = [place for place in range(8) if attention[row, place] and not dropped[row, place]]
            assert batch.ids[row][batch.attention[row]].tolist() == ids[row, kept].tolist()
            mine = batch.row == row
            wanted = [
                (sum(k < place for k in kept) - 1, int(ids[row, place])) for place in dropped[row].nonzero()[:, 0]
            ]
            assert list(zip(batch.anchor[mine].tolist(), batch.token[mine].tolist(), strict=True)) == wanted
            rebuilt = [[int(token)] for token in batch.ids[row][batch.attention[row]]]
            for anchor, token in wanted:
                rebuilt[anchor].append(token)
            assert list(itertools.chain(*rebuilt)) == ids[row][attention[row]].tolist()
    with pytest.raises(BadInputError, match="left"):
        drop_tokens(ids, attention, torch.ones_like(dropped) & attention)
    with pytest.raises(BadInputError, match="padding"):
        drop_tokens(ids, attention, ~attention)


def test_one_softmax_over_open_gaps():
    gaps = torch.tensor([[0, 1, 1], [0, 1, 0]]).bool()
    forbidden = torch.tensor([1, 0, 0, 0, 1]).bool()
    probs = insertion_logps(torch.randn(2, 3, 5), gaps, forbidden).exp()
    torch.testing.assert_close(probs.sum((1, 2)), torch.ones(2))
    assert not bool(probs[~gaps].any()) and not bool(probs[..., forbidden].any())


def test_equal_targets_count_and_rows_are_independent():
    model = network(stop_head=True, vocab_size=12)
    rows = [torch.tensor([[0, 8, 1, 4, 4, 9]]), torch.tensor([[0, 8, 1, 5, 6, 7]])]
    dropped = [torch.tensor([[0, 0, 0, 1, 1, 1]]).bool(), torch.tensor([[0, 0, 0, 0, 1, 0]]).bool()]
    alone = [insertion_loss(model, drop_tokens(i, torch.ones_like(i), d)) for i, d in zip(rows, dropped, strict=True)]
    ids, both = torch.cat(rows), torch.cat(dropped)
    torch.testing.assert_close(insertion_loss(model, drop_tokens(ids, torch.ones_like(ids), both)), sum(alone) / 2)
    logps = insertion_logps(model(input_ids=torch.tensor([[0, 8, 1]])).logits, torch.tensor([[0, 1, 1]]).bool())[0, 2]
    stop = F.cross_entropy(model(input_ids=torch.tensor([[0, 8, 1]])).stop_logits, torch.tensor([1]))
    torch.testing.assert_close(alone[0], -(2 * logps[4] + logps[9]) / 3 + stop)


# -- any subset --------------------------------------------------------------------------------------------------------
KNOWN = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 1, 1]]).bool()


def test_orders_know_first_and_then_go_from_left_to_right():
    ranks = subset_order(KNOWN)
    assert ranks.tolist() == [[0, 2, 3, 1, 4, 5], [3, 4, 0, 5, 1, 2]]
    mask = order_mask(ranks, KNOWN)[0]
    for i, j in itertools.product(range(6), repeat=2):
        both = bool(KNOWN[0, i] & KNOWN[0, j])
        assert bool(mask[i, j]) == (not both and int(ranks[0, i]) <= int(ranks[0, j]))
    draft = order_mask(ranks, KNOWN, torch.tensor([3, 4]))[0]
    assert draft[4].tolist() == [0, 0, 1, 0, 1, 1] and draft[2].tolist() == draft[4].tolist()


def test_any_subset_loss_on_both_kinds_of_model():
    torch.manual_seed(0)
    xlnet = XLNetLMHeadModel(XLNetConfig(vocab_size=10, d_model=16, n_layer=1, n_head=2, d_inner=16)).eval()
    for model in (network(streams=2), xlnet):
        loss = any_subset_loss(model, IDS, KNOWN)
        every = torch.eye(6).expand(2, -1, -1)
        logits = model(input_ids=IDS, perm_mask=order_mask(subset_order(KNOWN), KNOWN), target_mapping=every).logits
        logps = logits.log_softmax(-1).gather(-1, IDS[..., None])[..., 0]
        torch.testing.assert_close(loss, -logps[~KNOWN].mean())
        draft = order_mask(subset_order(KNOWN), KNOWN, KNOWN.sum(1))
        logits = model(input_ids=IDS, perm_mask=draft, target_mapping=every).logits
        logps = logits.log_softmax(-1).gather(-1, IDS[..., None])[..., 0]
        torch.testing.assert_close(any_subset_loss(model, IDS, KNOWN, parallel=True), -logps[~KNOWN].mean())
    with pytest.raises(BadInputError, match="nothing to predict"):
        any_subset_loss(model, IDS, torch.ones_like(KNOWN))


def test_what_is_known_is_drawn_inside_the_response():
    response = torch.ones(500, 12, dtype=torch.bool)
    response[:, :2] = False
    known = draw_known(response, 0.3, 0.9, torch.Generator().manual_seed(0))
    assert bool(known[:, :2].all())
    count = (~known).sum(1).float()
    assert count.min() >= 3 and count.max() <= 9 and abs(float(count.mean()) - 5.5) < 0.4
    assert math.isclose(float((~known).float().mean(0)[2:].std()), 0, abs_tol=0.05)
