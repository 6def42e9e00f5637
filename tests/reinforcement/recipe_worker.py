"""Trains a recipe as one of several processes; run by test_distributed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[0] = str(Path(__file__).parents[2])

import torch

from everytoken.cli.common import leave_processes
from tests.reinforcement.common import made, stock, weights
from tests.reinforcement.test_trainer import neutral


class Watched:
    """Keeps what a piece is given."""

    kind = "token_advantage"

    def __call__(self, batch, advantages):
        self.batch = batch
        return advantages


def main(out: Path) -> None:
    found = {}
    for name in ("ours", "theirs"):
        # two rows a process and groups of four: every group is spread over the two processes
        changes = dict(per_device_train_batch_size=2, loss_type="dapo", num_iterations=2, steps_per_generation=1)
        watched = Watched()
        pieces = [piece for piece in neutral() if "distributions" not in piece.needs]
        trainer = made(out / name, *pieces, watched, **changes) if name == "ours" else stock(out / name, **changes)
        trainer.accelerator.wait_for_everyone()
        torch.manual_seed(3 + trainer.accelerator.process_index)
        trainer.train()
        found[name] = weights(trainer)
        if name == "ours":
            assert len(watched.batch.rewards) == 4 and watched.batch.groups.tolist() == [0, 0, 0, 0]
            found["rewards"] = watched.batch.rewards
            rank = trainer.accelerator.process_index
    torch.save(found, out / f"state{rank}.pt")
    trainer.accelerator.wait_for_everyone()
    leave_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
