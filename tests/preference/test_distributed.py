"""``accelerate launch`` with two real processes (gloo): the same weights as one process with batches of twice the size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs" / "accelerate"


def launch(kind, out, size, *options, processes=2):
    out.mkdir()
    worker = [str(HERE / "distributed_worker.py"), kind, str(out), str(size)]
    command = [sys.executable, *worker]
    if processes > 1:
        port = 20_000 + os.getpid() % 20_000
        command = [
            sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options, "--num_processes", str(processes),
            "--main_process_port", str(port), *worker,
        ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out / "state.pt", weights_only=True)


def distance(one, other):
    return max((one["weights"][name] - other["weights"][name]).abs().max().item() for name in one["weights"])


DDP = ("--config_file", str(CONFIGS / "ddp_cpu.yaml"))


@pytest.mark.parametrize("kind", ["tgdpo", "ift"])
def test_two_processes_train_as_one(tmp_path, kind):
    alone = launch(kind, tmp_path / "alone", 4, processes=1)
    together = launch(kind, tmp_path / "together", 2, *DDP)
    assert distance(alone, together) < 2e-5
    assert len(together["logs"]) == 2
    if kind != "ift":
        one, two = alone["logs"][0], together["logs"][0]
        assert one["rewards/margins"] == pytest.approx(two["rewards/margins"], abs=1e-4)


@pytest.mark.parametrize("estimator", ["gae", "group"])
def test_rollouts_on_two_processes(tmp_path, estimator):
    """Both processes end with one policy; groups and moments are taken over all rows."""
    together = launch(estimator, tmp_path / "together", 4, *DDP)
    assert all(weight.isfinite().all() for weight in together["weights"].values())
    assert "rto/kl" in together["logs"][0]


def test_fsdp_on_two_processes(tmp_path):
    """The FSDP configuration, on CPUs: sharded parameters give the same weights."""
    alone = launch("tdpo", tmp_path / "alone", 4, processes=1)
    together = launch("tdpo", tmp_path / "together", 2, "--config_file", str(CONFIGS / "fsdp_cpu.yaml"))
    assert distance(alone, together) < 2e-5
