"""A recipe on two real processes (gloo) whose groups are spread over both, against stock GRPO on the same two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ..training.test_distributed import DDP, command_of, run
from .common import distance

pytestmark = pytest.mark.slow


def test_pieces_that_change_nothing_train_the_weights_of_stock_grpo_on_two_processes(tmp_path):
    place = tmp_path / "run"
    run([*command_of(*DDP), str(Path(__file__).parent / "recipe_worker.py"), str(place)], place)
    one, two = (torch.load(place / f"state{rank}.pt", weights_only=True) for rank in (0, 1))
    assert distance(one["ours"], one["theirs"]) == 0.0
    assert distance(one["ours"], two["ours"]) == 0.0
    assert torch.equal(one["rewards"], two["rewards"])  # every process sees the whole group
