"""Ranks in real processes over gloo: the operation, woven forwards, and what happens where a rank dies."""

from __future__ import annotations

import pytest

from everytoken.core.errors import BadInputError, EverytokenError
from everytoken.distributed.processes import launch

HERE = "tests.distributed.ranks"


def check_operation(found, world):
    """Exact in two processes, and to 1e-6 in more; the weight's gradient sums over all rows, so it is relative."""
    for count, (value, gradient, gain) in found.items():
        bar = 0.0 if world <= 2 else 1e-6
        assert value <= bar and gradient <= bar, count
        assert gain <= 1e-6 * max(10, int(count)), count


def check_forwards(found, cut):
    first = found[0]
    assert all(item == first for item in found)  # every rank has the same logits
    assert first["cut"] is cut and first["greedy"] and first["woven"] > 9
    assert all(far <= 2e-6 for far in first["far"].values()), first["far"]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_compute_what_one_process_does(world):
    """Every case of one number of ranks in one launch."""
    found = launch(f"{HERE}:everything", world, {"counts": [257] if world == 2 else [31]}, 500)
    for rank in found:
        check_operation(rank["operation"], world)
    check_forwards([rank["forwards"] for rank in found], True)
    if world == 2:
        check_forwards([rank["replicated"] for rank in found], False)
    mlp, again, cache = found[0]["refusals"]
    assert f"{world} ranks do not divide the MLP's width of 95" in mlp
    assert "DTensor" in again or "cannot be sharded" in again or "hooks" in again
    assert f"12 key heads, a rank has {12 // world}" in cache


@pytest.mark.exhaustive
@pytest.mark.slow
def test_three_ranks_divide_nine_heads():
    found = launch(f"{HERE}:forwards", 3, {"counts": [257, 1025], "heads": 9, "kv": 3, "settings": {"hidden": 54}}, 500)
    check_forwards(found, True)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others():
    with pytest.raises(EverytokenError, match=r"Rank 1 of 2 failed:[\s\S]*this rank dies"):
        launch("tests.distributed.dying:dies", 2, seconds=100)


def test_no_ranks():
    with pytest.raises(BadInputError, match="1 or more"):
        launch("tests.distributed.dying:dies", 0)
