"""TEMPO's tree by brute force, its printed matrix and its identities."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.core.errors import BadInputError
from everytoken.reinforcement.tempo import TEMPO, PrefixTreeAdvantage, prefix_values, tempo_advantages

from .common import batch_of

SEEDS = st.integers(0, 500)


def problem(seed, rows=7, length=6, vocab=2, equal=False):
    """Many shared prefixes, ragged lengths, padding of any token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (rows, length), generator=generator)
    lengths = torch.full((rows,), length) if equal else torch.randint(0, length + 1, (rows,), generator=generator)
    mask = torch.arange(length) < lengths[:, None]
    return ids, mask, torch.randint(0, 3, (rows,), generator=generator).float()


def brute_value(ids, mask, rewards, row, depth):
    """The mean reward of the responses that begin with the first tokens of a row."""
    begins = [
        k for k in range(len(ids)) if mask[k].sum() >= depth and ids[k, :depth].tolist() == ids[row, :depth].tolist()
    ]
    return sum(rewards[k].item() for k in begins) / len(begins)


@given(seed=SEEDS, vocab=st.integers(1, 3))
@settings(max_examples=30)
def test_values_by_comparing_all_prefixes(seed, vocab):
    ids, mask, rewards = problem(seed, vocab=vocab)
    values, counts, _ = prefix_values(ids, mask, rewards)
    for row in range(len(ids)):
        for depth in range(int(mask[row].sum()) + 1):
            assert values[row, depth].item() == pytest.approx(brute_value(ids, mask, rewards, row, depth))
            assert rewards.min() - 1e-9 <= values[row, depth] <= rewards.max() + 1e-9
    assert (counts[:, 0] == len(ids)).all()


PRINTED = [
    [1.1547, 0.5773, 1.7320, 0.8660],
    [-0.5773, -1.1547, -1.7320, -0.8660],
    [1.1547, 1.4434, 0.8660, 0],
    [-1.7320, -0.8660, -0.8660, 0],
]


def printed():
    ids = torch.tensor([[5, 6, 7, 2], [5, 6, 8, 2], [5, 9, 2, 0], [4, 1, 2, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]]).bool()
    return ids, mask, torch.tensor([1.0, 0, 1, 0]), torch.zeros(4)


def test_the_printed_matrix():
    assert torch.allclose(tempo_advantages(*printed()), torch.tensor(PRINTED), atol=2e-4)


def test_rows_groups_and_padding_may_stand_anywhere():
    ids, mask, rewards, groups = printed()
    order = torch.tensor([2, 0, 3, 1])
    whole = tempo_advantages(ids, mask, rewards, groups)
    assert torch.equal(tempo_advantages(ids[order], mask[order], rewards[order], groups), whole[order])
    padded = torch.nn.functional.pad(torch.where(mask, ids, 77), (0, 3), value=5)
    longer = torch.nn.functional.pad(mask, (0, 3))
    assert torch.equal(tempo_advantages(padded, longer, rewards, groups)[:, :4], whole)
    mixed = torch.arange(8) % 2  # two groups, interleaved
    both = tempo_advantages(*(part.repeat_interleave(2, 0) for part in (ids, mask, rewards)), mixed)
    assert torch.equal(both[::2], whole) and torch.equal(both[1::2], whole)
    assert torch.allclose(tempo_advantages(ids, mask, rewards + 3, groups), whole, atol=1e-5)
    assert torch.allclose(tempo_advantages(ids, mask, 5 * rewards, groups), whole, atol=1e-4)
    plain = tempo_advantages(ids, mask, rewards, groups, "none")
    assert torch.allclose(tempo_advantages(ids, mask, 5 * rewards, groups, "none"), 5 * plain)


@given(seed=SEEDS)
@settings(max_examples=40)
def test_identities(seed):
    ids, mask, rewards = problem(seed, equal=True)
    key = [tuple(row.tolist()) for row in ids]
    rewards = torch.tensor([float(sum(row) % 2) for row in key])  # identical responses have identical rewards
    groups, length = torch.zeros(len(ids)), ids.shape[1]
    found = tempo_advantages(ids, mask, rewards, groups, "none").double()
    gaps = rewards.double() - rewards.double().mean()
    assert torch.allclose(found.sum(1), (length + 1) * gaps, atol=1e-5)  # the changes telescope
    assert torch.allclose(found.sum(0), torch.zeros(length).double(), atol=1e-5)  # and vanish at every node
    assert (found - gaps[:, None]).abs().max() <= 1 + 1e-6
    grpo = gaps / (rewards.double().std() + 1e-6)
    plain = tempo_advantages(ids, mask, rewards, groups, td_coef=0.0)
    assert torch.allclose(plain.double(), grpo[:, None].expand(-1, length), atol=1e-6)


def test_without_branches_it_is_grpo():
    """No shared first token: twice GRPO there and GRPO after it. All shared but the last: GRPO until it."""
    rewards, mask, groups = torch.tensor([1.0, 0.0, 0.0]), torch.ones(3, 3, dtype=torch.bool), torch.zeros(3)
    grpo = (rewards - 1 / 3) / (rewards.std() + 1e-6)
    apart = tempo_advantages(torch.tensor([[1, 5, 5], [2, 5, 5], [3, 5, 5]]), mask, rewards, groups)
    assert torch.allclose(apart, torch.stack([2 * grpo, grpo, grpo], 1), atol=1e-6)
    late = tempo_advantages(torch.tensor([[5, 5, 1], [5, 5, 2], [5, 5, 3]]), mask, rewards, groups)
    assert torch.allclose(late, torch.stack([grpo, grpo, 2 * grpo], 1), atol=1e-6)


def test_nothing_to_learn_is_zero_and_never_nan():
    ids, mask, _, groups = printed()
    for rewards in ([0.1] * 4, [float("nan")] * 4, [1.0, float("nan"), float("nan"), float("nan")]):
        assert not tempo_advantages(ids, mask, torch.tensor(rewards), groups).any()
    assert not tempo_advantages(ids[:1], mask[:1], torch.ones(1), groups[:1]).any()
    part = tempo_advantages(ids, mask, torch.tensor([1.0, 0, float("nan"), 0]), groups)
    assert not part[2].any() and torch.equal(part[[0, 1, 3]], tempo_advantages(*(x[[0, 1, 3]] for x in printed()[:2]),
                                             torch.tensor([1.0, 0, 0]), torch.zeros(3)))  # fmt: skip


def test_values_tend_to_the_true_ones():
    """All responses of two binary tokens, as often as their probability says."""
    table = {(0, 0): 1.0, (0, 1): 0.0, (1, 0): 0.5, (1, 1): 0.25}
    ids = torch.tensor([list(key) for key in itertools.product((0, 1), repeat=2)]).repeat(16, 1)
    rewards = torch.tensor([table[tuple(row.tolist())] for row in ids])
    found = tempo_advantages(ids, torch.ones_like(ids).bool(), rewards, torch.zeros(len(ids)), "none")
    change = found[0] - (rewards[0] - rewards.mean())  # of the response (0, 0)
    assert change.tolist() == pytest.approx([0.5 - 0.4375, 1.0 - 0.5], abs=1e-6)


def test_the_piece_logs_how_much_is_shared():
    ids, mask, rewards, _ = printed()
    piece = TEMPO().recipe().pieces[0]
    batch = batch_of(rewards, ids=ids, length=4)
    batch.mask = mask
    assert torch.equal(piece(batch), tempo_advantages(ids, mask, rewards, batch.groups))
    assert piece.metrics == pytest.approx({"tokens_with_td": 9 / 14, "depth_alone": (3 + 3 + 2 + 1) / 4})
    assert PrefixTreeAdvantage.kind == "group_advantage"
    with pytest.raises(BadInputError, match="scale"):
        TEMPO(scale="batch")
    with pytest.raises(BadInputError, match="td_coef"):
        TEMPO(td_coef=-1.0)
