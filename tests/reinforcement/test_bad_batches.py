"""What every method's pieces make of rollouts that teach nothing: groups of one, equal or no rewards, no tokens."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")

from everytoken.catalog import find_card
from everytoken.reinforcement.base import RolloutBatch, UpdateBatch
from everytoken.reinforcement.recipe_checks import BATCH_KINDS
from everytoken.reinforcement.stages import decide

from .test_training import METHODS

NAN = float("nan")
GROUPS = {
    "one response": ([1.0], [4]),
    "equal rewards": ([0.5, 0.5, 0.5], [3, 1, 4]),
    "an empty response": ([1.0, 0.0, 0.0], [4, 0, 2]),
    "a response without a reward": ([1.0, NAN, 0.0], [4, 2, 3]),
    "no rewards": ([NAN, NAN], [3, 4]),
    "no tokens": ([1.0, 0.0], [0, 0]),
}
LENGTH = 4


def batch_of_groups(names):
    rewards = torch.tensor([reward for name in names for reward in GROUPS[name][0]])
    lengths = torch.tensor([length for name in names for length in GROUPS[name][1]])
    groups = torch.tensor([number for number, name in enumerate(names) for _ in GROUPS[name][0]])
    draw = torch.Generator().manual_seed(0)
    shape = len(rewards), LENGTH
    hidden, head = torch.randn(*shape, 3, generator=draw), torch.randn(3, 6, generator=draw)
    return RolloutBatch(
        torch.randint(0, 6, shape, generator=draw),
        torch.arange(LENGTH) < lengths[:, None],
        groups,
        rewards,
        logps=-torch.rand(shape, generator=draw),
        entropies=torch.rand(shape, generator=draw),
        distributions=lambda rows: (hidden[rows], hidden[rows] @ head),
        truncated=torch.zeros(len(rewards), dtype=torch.bool),
    )


def grpo(batch):
    """As TRL has it: 0 for rows without a reward and groups of one."""
    found = torch.zeros_like(batch.rewards)
    for rows in batch.group_rows():
        scored = rows[~batch.rewards[rows].isnan()]
        if len(scored) > 1:
            r = batch.rewards[scored]
            found[scored] = (r - r.mean()) / (r.std() + 1e-4)
    return found


@pytest.mark.parametrize("names", [list(GROUPS), *([name] for name in GROUPS)], ids=" and ".join)
@pytest.mark.parametrize("method", METHODS)
def test_what_teaches_nothing_has_no_advantage_and_nothing_is_nan(method, names):
    recipe, batch = find_card(method).load()().recipe(), batch_of_groups(names)
    for piece in recipe.pieces:
        if hasattr(piece, "observe"):
            piece.observe(batch)
    if not recipe.of(*BATCH_KINDS):
        pytest.skip("this method leaves the advantages to TRL")
    group = recipe.one("group_advantage")
    found = decide(recipe, batch, grpo(batch) if group is None else group(batch))
    assert found.advantages.isfinite().all() and found.weights.isfinite().all()
    assert not found.advantages[~batch.mask].any() and not (found.kept & ~batch.mask).any()
    for rows, name in zip(batch.group_rows(), names, strict=True):
        own = found.advantages[rows]
        if name in ("one response", "equal rewards", "no rewards", "no tokens"):
            assert not own.any(), name
        else:
            assert not own[1].any() and own[0].any(), name


@pytest.mark.parametrize("method", METHODS)
def test_updates_without_tokens_have_finite_bounds_and_weights(method):
    recipe, shape = find_card(method).load()().recipe(), (2, 3)
    update = UpdateBatch(
        torch.ones(shape), torch.zeros(shape), torch.zeros(shape), torch.zeros(shape).bool(), torch.ones(shape)
    )
    low, high = torch.full(shape, 0.2), torch.full(shape, 0.28)
    for piece in recipe.of("clip"):
        assert all(torch.equal(*pair) for pair in zip(piece(update, low, high), (low, high), strict=True))
    for piece in recipe.of("ratio_weight"):
        assert torch.equal(piece(update, low, high), torch.ones(shape))
