"""The insertion model: the released numbers, holes that are not seen, gaps, likelihoods, and what is refused."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from everytoken.architectures.any_order.losses import draw_missing, drop_tokens, insertion_loss
from everytoken.architectures.ilm.configuration_ilm import InsertionLMConfig
from everytoken.architectures.ilm.likelihood import insertion_bound, insertion_logp
from everytoken.architectures.ilm.training import InsertionCollator
from everytoken.core.errors import BadInputError

from .common import BOS, CLS, PAD, A, B, C, network

TEXTS = torch.tensor([[CLS, BOS, A, B, C, A], [CLS, C, BOS, B, B, PAD]])
THERE = (TEXTS != PAD).long()
MISSING = torch.tensor([[0, 0, 1, 0, 1, 1], [0, 0, 0, 1, 1, 0]]).bool()
LABELS = TEXTS.masked_fill(~MISSING, -100)


def test_the_released_example(monkeypatch):
    """CLS BOS a b c d without a, c and d: 3.309370 of the official function, in the form that keeps the places."""
    net = network(vocab_size=8, mask_token_id=1, prefix_gaps=True)
    torch.manual_seed(0)
    logits = torch.randn(1, 6, 8).requires_grad_()
    stop = torch.tensor([[0.3, -0.2]])
    seen = {}

    def forward(self, input_ids, attention_mask, position_ids, inputs_embeds, return_dict):
        seen["mask"] = attention_mask
        return SimpleNamespace(logits=logits, stop_logits=stop, loss=None)

    monkeypatch.setattr("everytoken.architectures.any_order.modeling_any_order.AnyOrderLM.forward", forward)
    ids = torch.tensor([[2, 3, 4, 5, 6, 7]])
    labels = ids.masked_fill(~torch.tensor([[0, 0, 1, 0, 1, 1]]).bool(), -100)
    loss = type(net).forward.__wrapped__(net, ids, labels=labels).loss
    assert seen["mask"].tolist() == [[1, 1, 0, 1, 0, 0]]
    assert loss.item() == pytest.approx(3.309370 + 0.97408, abs=1e-5)
    loss.backward()
    q = torch.zeros(6, 8)
    q[1, 4] = q[3, 6] = q[3, 7] = 1 / 3
    p = torch.zeros(6, 8)
    p[[1, 3]] = logits.detach()[0, [1, 3]].flatten().softmax(0).view(2, 8)
    torch.testing.assert_close(logits.grad[0], p - q, rtol=1e-4, atol=1e-6)
    whole = type(net).forward.__wrapped__(net, ids, labels=torch.full_like(ids, -100)).loss
    assert whole.item() == pytest.approx(0.47408, abs=1e-5)


def test_missing_tokens_that_stay_in_the_tensor_are_as_if_taken_out():
    """Logits 1e-6, the loss, and every gradient; on both sides of padding."""
    net = network()
    batch = drop_tokens(TEXTS, THERE, MISSING)
    assert batch.ids.tolist() == [[CLS, BOS, B], [CLS, C, BOS]]
    compact = net(input_ids=batch.ids, attention_mask=batch.attention.long())
    kept = net(input_ids=TEXTS, attention_mask=THERE, labels=LABELS)
    torch.testing.assert_close(kept.logits[0, [0, 1, 3]], compact.logits[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kept.stop_logits, compact.stop_logits)
    other = TEXTS.masked_fill(MISSING, A)  # what stands at a missing place is not read
    assert torch.equal(net(input_ids=other, attention_mask=THERE, labels=LABELS).loss, kept.loss)
    wanted = insertion_loss(net, batch, closed_gaps=~net.open_gaps(batch.ids, batch.attention))
    torch.testing.assert_close(kept.loss, wanted)
    left = [F.pad(part, (3, 0), value=fill) for part, fill in ((TEXTS, PAD), (THERE, 0), (LABELS, -100))]
    padded = net(input_ids=left[0], attention_mask=left[1], labels=left[2])
    torch.testing.assert_close(padded.loss, wanted)
    gradients = []
    for loss in (kept.loss, wanted):
        net.zero_grad()
        loss.backward()
        gradients.append([weight.grad.clone() for weight in net.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_open_gaps():
    ids = torch.tensor([[PAD, CLS, A, BOS, B], [CLS, BOS, A, BOS, B], [CLS, A, B, PAD, PAD]])
    there = ids != PAD
    assert network().open_gaps(ids, there).int().tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [0, 1, 1, 0, 0]]
    every = network(prefix_gaps=True).open_gaps(ids, there).int().tolist()
    assert every == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [0, 1, 1, 0, 0]]


def test_the_mean_over_all_losses_is_a_sum_over_single_insertions():
    """Two tokens: every number and choice of missing ones, each weighted as it is drawn."""
    net, ids = network(), torch.tensor([[CLS, BOS, A, B]])
    response = torch.tensor([[0, 0, 1, 1]]).bool()
    exact = torch.zeros(())
    for size, sets in ((0, [[]]), (1, [[2], [3]]), (2, [[2, 3]])):
        for places in sets:
            missing = torch.zeros_like(response)
            missing[0, places] = True
            labels = ids.masked_fill(~missing, -100)
            exact = exact + net(input_ids=ids, labels=labels).loss / (3 * math.comb(2, size))
    generator = torch.Generator().manual_seed(0)
    missing = draw_missing(response.expand(6000, -1), generator)
    seen = {key: float((missing[:, 2:] == torch.tensor(key)).all(1).float().mean()) for key in
            itertools.product((False, True), repeat=2)}  # fmt: skip
    assert seen[False, False] == pytest.approx(1 / 3, abs=0.03) and seen[True, True] == pytest.approx(1 / 3, abs=0.03)
    assert seen[True, False] == pytest.approx(1 / 6, abs=0.03) and not bool(missing[:, :2].any())
    rows = ids.expand(6000, -1)
    with torch.no_grad():
        mean = net(input_ids=rows, labels=rows.masked_fill(~missing, -100)).loss
    assert float(mean) == pytest.approx(exact.item(), rel=0.03)


def test_likelihoods():
    """All texts sum to one; the sets of tokens agree with all orders; the mean of orders is below, and is its bound."""
    net = network(initializer_range=0.5)
    total = 0.0
    for length in range(3):
        for letters in itertools.product((A, B, C), repeat=length):
            ids = torch.tensor([CLS, BOS, *letters])
            total += float(insertion_logp(net, ids, torch.arange(len(ids)) > 1, limit=2).exp())
    assert total == pytest.approx(1, abs=1e-6)
    ids, response = torch.tensor([CLS, C, BOS, A, A, B]), torch.tensor([0, 0, 0, 1, 1, 1])
    orders = torch.tensor(list(itertools.permutations(range(3))))
    histories = insertion_bound(net, ids, response, orders=orders)
    exact = insertion_logp(net, ids, response)
    assert float(histories.logsumexp(0)) - math.log(6) == pytest.approx(float(exact), abs=1e-6)
    assert float(histories.mean()) < float(exact)
    drawn = insertion_bound(net, ids, response, count=4, seed=1, rows=3)
    assert all(min((histories - one).abs()) < 1e-5 for one in drawn)
    empty = insertion_bound(net, ids, response * 0)
    assert empty.tolist() == pytest.approx([float(insertion_logp(net, ids, response * 0))] * 8)
    for arguments, message in (
        ((ids[None], response), "one text"),
        ((ids.repeat(3), response.repeat(3) | 1), "sets"),
    ):
        with pytest.raises(BadInputError, match=message):
            insertion_logp(net, *arguments)
    with pytest.raises(BadInputError, match="limit"):
        insertion_logp(net, ids, response, limit=2)
    with pytest.raises(BadInputError, match="orders must be"):
        insertion_bound(net, ids, response, orders=orders[:, :2])


def test_the_collator():
    collator = InsertionCollator(PAD, torch.Generator().manual_seed(0))
    rows = [
        {"input_ids": [CLS, BOS, A, B]},
        {"input_ids": [CLS, C, BOS, A, B], "labels": [-100, -100, -100, A, B]},
    ] * 50
    batch = collator(rows)
    lost = batch["labels"] != -100
    assert batch["input_ids"].shape == (100, 5) and not bool(lost[:, :2].any()) and not bool(lost[1::2, 2].any())
    assert bool((batch["labels"][lost] == batch["input_ids"][lost]).all()) and not bool(lost[::2, 4].any())
    assert len(lost.sum(1).unique()) == 3
    assert torch.isfinite(network()(**batch).loss)


def test_what_is_refused():
    for settings in ({"stop_head": False}, {"streams": 2}, {"cls_token_id": 40}):
        with pytest.raises(BadInputError):
            InsertionLMConfig(**settings)
    assert InsertionLMConfig(mask_token_id=1).never_inserted == (0, 1, 2, 3)
    net = network()
    none = torch.full_like(TEXTS, -100)

    def labelled(row, place):
        found = none.clone()
        found[row, place] = A
        return found

    for inputs, message in (
        ({"labels": labelled(1, 5)}, "padding"),
        ({"labels": labelled(0, 0)}, "no open gap on its left"),
        ({"labels": labelled(1, 1)}, "no open gap on its left"),
        ({"labels": none, "attention_mask": torch.ones(2, 6, 6)}, r"\[B, T\]"),
        ({"labels": none, "attention_mask": THERE * 0}, "no open gap"),
    ):
        with pytest.raises(BadInputError, match=message):
            net(input_ids=TEXTS, **({"attention_mask": THERE} | inputs))
    with pytest.raises(BadInputError, match="open_gaps"):
        net(inputs_embeds=torch.zeros(2, 6, 16), labels=none)
