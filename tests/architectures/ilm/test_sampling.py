"""Insertion: the distribution of texts by enumeration over histories, rows, stops, and what is refused."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from everytoken.architectures.any_order.losses import insertion_logps
from everytoken.architectures.ilm.sampling import InsertionSampler
from everytoken.core.errors import BadInputError, UnsupportedModelError

from ..any_order.test_modeling import network

CLS, BOS, PAD = 8, 9, 0
START = torch.tensor([[CLS, BOS]])
FORBIDDEN = (PAD, CLS, BOS, 4, 5, 6, 7)


def model(stop=-9.0):
    """Three letters; the stop head says the same of every text."""
    found = network(stop_head=True, initializer_range=0.8)
    with torch.no_grad():
        found.stop_head.weight.zero_()
        found.stop_head.bias.copy_(torch.tensor([stop, 0.0]))
    return found


def exact(net, depth):
    """The distribution of texts after ``depth`` insertions, summed over all histories."""
    closed = torch.zeros(10, dtype=torch.bool)
    closed[list(FORBIDDEN)] = True
    states = Counter({(CLS, BOS): 1.0})
    for _ in range(depth):
        following = Counter()
        for text, weight in states.items():
            ids = torch.tensor([text])
            with torch.no_grad():
                probs = insertion_logps(net(input_ids=ids).logits, torch.arange(len(text))[None] > 0, closed)[0].exp()
            for gap in range(1, len(text)):
                for token in (1, 2, 3):
                    following[(*text[: gap + 1], token, *text[gap + 1 :])] += weight * float(probs[gap, token])
        states = following
    return states


@pytest.mark.parametrize("order", ["joint", pytest.param("gap-first", marks=pytest.mark.slow)])
def test_texts_have_the_distribution_of_all_histories(order):
    net, count = model(), 800
    wanted = exact(net, 3)
    assert sum(wanted.values()) == pytest.approx(1, abs=1e-4)
    sampler = InsertionSampler(3, order, forbidden=FORBIDDEN)
    found = sampler(net, START.repeat(count, 1), seeds=range(count))
    seen = Counter(tuple(found.row(row)) for row in range(count))
    assert set(seen) <= set(wanted) and not bool(found.stopped.any()) and found.forwards == 4
    large = {text: chance * count for text, chance in wanted.items() if chance * count >= 5}
    chi = sum((seen[text] - mean) ** 2 / mean for text, mean in large.items())
    assert chi < len(large) + 4 * (2 * len(large)) ** 0.5


def test_the_record():
    net = model()
    found = InsertionSampler(4, forbidden=FORBIDDEN)(net, START, seeds=[3])
    text, steps = found.row(0), found.step[0].tolist()
    assert text[:2] == [CLS, BOS] and steps[:2] == [-1, -1] and sorted(steps[2:]) == [0, 1, 2, 3]
    for number in range(4):  # each probability again, from the text before it
        before = [token for token, step in zip(text, steps, strict=True) if step < number]
        place = steps.index(number)
        gap = sum(step < number for step in steps[:place]) - 1
        closed = torch.zeros(10, dtype=torch.bool)
        closed[list(FORBIDDEN)] = True
        with torch.no_grad():
            logits = net(input_ids=torch.tensor([before])).logits
        logps = insertion_logps(logits, torch.arange(len(before))[None] > 0, closed)
        assert found.prob[0, place].item() == pytest.approx(float(logps[0, gap, text[place]].exp()), rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"order": "gap-first"}, {"temperature": 0.0}])
def test_rows_do_not_depend_on_their_batch(settings):
    net, sampler = model(), InsertionSampler(4, forbidden=FORBIDDEN, **settings)
    ids = torch.tensor([[CLS, BOS, 1, 2], [CLS, BOS, PAD, PAD], [CLS, 3, BOS, PAD]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    together = sampler(net, ids, mask, seeds=[1, 2, 3])
    for row in range(3):
        alone = sampler(net, ids[row : row + 1, : int(mask[row].sum())], seeds=[row + 1])
        assert alone.row(0) == together.row(row)


def test_the_stop_head_ends_rows_for_good_and_closed_gaps_stay_closed():
    assert InsertionSampler(5)(model(stop=9.0), START, seeds=[0]).row(0) == [CLS, BOS]
    net = network(stop_head=True, initializer_range=0.8)
    with torch.no_grad():
        net.stop_head.weight.mul_(20)
    found = InsertionSampler(6, forbidden=FORBIDDEN, stop_threshold=0.5)(net, START.repeat(40, 1), seeds=range(40))
    lengths = [len(found.row(row)) for row in range(40)]
    assert 0 < int(found.stopped.sum()) < 40 and len(set(lengths)) > 1
    assert all(length == 8 for length, ended in zip(lengths, found.stopped, strict=True) if not ended)
    ids = torch.tensor([[CLS, 1, BOS, 2]])
    closed = torch.tensor([[0, 1, 0, 1]])
    kept = InsertionSampler(5, forbidden=FORBIDDEN)(model(), ids, seeds=[0], closed_gaps=closed).row(0)
    assert kept[:3] == [CLS, 1, BOS] and kept[-1] == 2 and len(kept) == 9


def test_what_is_refused():
    for settings in ({"max_new_tokens": 0}, {"order": "token-first"}, {"temperature": -1.0}, {"stop_threshold": 0.0}):
        with pytest.raises(BadInputError):
            InsertionSampler(**settings)
    sampler, net = InsertionSampler(2), model()
    for arguments, message in (
        ({"seeds": [1, 2]}, "one a row"),
        ({"seeds": [1], "attention_mask": torch.tensor([[0, 1]])}, "right"),
        ({"seeds": [1], "closed_gaps": torch.tensor([[0, 1]])}, "no open gap"),
        ({"seeds": [1], "closed_gaps": torch.tensor([[0]])}, "must be as"),
    ):
        with pytest.raises(BadInputError, match=message):
            sampler(net, START, **arguments)
    with pytest.raises(UnsupportedModelError, match="stop head"):
        sampler(network(), START, seeds=[1])
