"""``accelerate launch`` with two real processes (gloo): the weights of one process with batches of twice the size."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from everytoken.catalog.cards import find_card
from everytoken.core.settings import settable

from ..preference.test_training import letters

pytest.importorskip("trl")
pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs" / "accelerate"
CRASH = "Signal 11 (SIGSEGV)"


def command_of(*options):
    """A Python command, alone or (with options) in two processes."""
    if not options:
        return [sys.executable]
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options, "--num_processes", "2"]
    return [*launcher, "--main_process_port", str(20_000 + os.getpid() % 20_000)]


def start(command, place):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONFAULTHANDLER": "1"}
    environment["EVERYTOKEN_CACHE"] = str(place / "cache")
    place.mkdir()
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=HERE.parents[1])


def run(command, place):
    """Runs a command that writes to the new folder ``place``; what it printed.

    gloo (torch 2.13) very rarely corrupts the heap of its own thread in a gather: ``full_tensor()`` of a sharded tensor
    in a long loop shows it without any of our code. A launch that dies of that signal is started again, from nothing,
    and the warning says so; every other failure is ours.
    """
    done = start(command, place)
    if CRASH in done.stderr:
        warnings.warn(f"gloo crashed:\n{done.stderr}", stacklevel=2)
        shutil.rmtree(place)
        done = start(command, place)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr
    return done.stdout


def launch(kind, place, size, *options):
    run([*command_of(*options), str(HERE / "distributed_worker.py"), kind, str(place), str(size)], place)
    return torch.load(place / "state.pt", weights_only=True)


def distance(one, other):
    return max((one["weights"][name] - other["weights"][name]).abs().max().item() for name in one["weights"])


DDP = ("--config_file", str(CONFIGS / "ddp_cpu.yaml"))
FSDP = ("--config_file", str(CONFIGS / "fsdp_cpu.yaml"))


# One case a trainer belongs to every change; `make test-all` runs the others.
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("tdpo", FSDP, id="tdpo-fsdp"),
        pytest.param("ift", FSDP, id="ift-fsdp", marks=pytest.mark.exhaustive),
        pytest.param("ift", DDP, id="ift-ddp"),
    ],
)
def test_two_processes_train_as_one(tmp_path, kind, options):
    """In whole copies or in shards (the reference too), the weights of one process."""
    alone = launch(kind, tmp_path / "alone", 4)
    together = launch(kind, tmp_path / "together", 2, *options)
    assert distance(alone, together) < 2e-5
    assert len(together["logs"]) == 2
    assert together["sharded"] == [options is FSDP] * (1 if kind == "ift" else 2)
    if kind != "ift":
        one, two = alone["logs"][0], together["logs"][0]
        assert one["rewards/margins"] == pytest.approx(two["rewards/margins"], abs=1e-4)


@pytest.mark.parametrize("estimator", ["gae", pytest.param("group", marks=pytest.mark.exhaustive)])
def test_rollouts_on_two_processes(tmp_path, estimator):
    """Shards change nothing: policy, reference, DPO model (or the two in one, with an adapter) and critic whole in both
    processes, or in halves.
    """
    copies = launch(estimator, tmp_path / "copies", 4, *DDP)
    shards = launch(estimator, tmp_path / "shards", 4, *FSDP)
    assert distance(copies, shards) < 2e-5
    assert all(weight.isfinite().all() for weight in shards["weights"].values())
    assert shards["sharded"] == [True] * (4 if estimator == "gae" else 2)
    for name in ("rto/kl", "rto/dpo_reward", *(["rto/value_error"] if estimator == "gae" else [])):
        assert [entry[name] for entry in shards["logs"]] == pytest.approx(
            [entry[name] for entry in copies["logs"]], abs=1e-3
        )


SMALL = [
    "steps=2",
    "eval_share=0.33",
    "samples=1",
    "sample_tokens=4",
    "lr=0.001",
    "guide_steps=1",
    "guide_lr=0.001",
    "tune_lr=0.001",
]
CASES = {
    "a guide trained first": ("tgdpo", []),
    "a given guide": ("tgdpo", ["guide=PLACE/guide"]),
    "two guides with adapters": ("cdpo", ["save_steps=1"]),
    "a reference in columns": ("t-reg", ["precompute_reference=true"]),
    "rollouts": ("rto", ["num_generations=2", "reward=tests.preference.test_training:brief"]),
    "an adapter": ("tdpo", ["lora_r=2"]),
}


def train(place, case, own, size, *options):
    name, changes = CASES[case]
    known = settable(find_card(name).load_training().config)
    settings = [value for value in SMALL if value.partition("=")[0] in known]
    settings += [f"batch_size={size}", *(change.replace("PLACE", str(place)) for change in changes)]
    arguments = [item for setting in settings for item in ("--set", setting)]
    printed = run(
        [
            *command_of(*options),
            "-m",
            "everytoken",
            "train",
            name,
            "--model",
            str(place / "model"),
            "--data",
            str(place / "pairs.jsonl"),
            "--out",
            str(own / "out"),
            "--json",
            *arguments,
        ],
        own,
    )
    return json.loads(printed[printed.index("{") :])["figures"]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.exhaustive] if place else []) for place, case in enumerate(CASES)]
)
def test_the_command_in_shards(tmp_path, case):
    """``accelerate launch ... -m everytoken train``: guides, columns, training, evaluation, report; as one process does
    it.
    """
    as_one_process(tmp_path, case, FSDP)


@pytest.mark.exhaustive
def test_the_command_in_copies(tmp_path):
    as_one_process(tmp_path, "a guide trained first", DDP)


def as_one_process(tmp_path, case, options):
    place = letters(tmp_path)
    together = train(place, case, tmp_path / "together", 2 if case != "rollouts" else 4, *options)
    report = (tmp_path / "together" / "out" / "report.html").read_text()
    assert "Before and after" in report
    assert "Credit of every token" in report
    if case == "rollouts":  # each process samples its own
        assert together["rollouts"] == 16
        return
    alone = train(place, case, tmp_path / "alone", 4)
    assert together == pytest.approx(alone, abs=1e-3)
    kept = "adapter_model.safetensors" if case == "an adapter" else "model.safetensors"
    one, two = (load_file(tmp_path / which / "out" / "model" / kept) for which in ("alone", "together"))
    assert one.keys() == two.keys()
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 5e-5
