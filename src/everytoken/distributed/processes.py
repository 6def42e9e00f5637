"""Ranks as real processes on this machine, over gloo: for tests, checks and measurements without a cluster."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import BadInputError, EverytokenError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SECONDS = 120
"""A collective that takes longer has lost a rank."""


def launch(function: str, world: int, arguments: dict[str, Any] | None = None, seconds: float = 300.0) -> list[Any]:
    """Runs a function in so many processes that know each other.

    Args:
        function: ``"module:function"``; called as ``function(mesh, **arguments)`` with a ``DeviceMesh`` of the CPU. It
            returns what JSON can hold.
        world: processes.
        arguments: what JSON can hold.
        seconds: time limit of all.

    Returns:
        What each rank returned.

    Raises:
        BadInputError: no process.
        EverytokenError: a rank failed or did not end in time; the others are stopped.
    """
    if world < 1:
        raise BadInputError(f"Ranks are 1 or more; got {world}.")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        order = {"function": function, "world": world, "arguments": arguments or {}}
        (folder / "order.json").write_text(json.dumps(order), encoding="utf-8")
        started: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(world):
                with (folder / f"{rank}.err").open("wb") as errors:
                    command = [sys.executable, "-m", __name__, name, str(rank)]
                    started.append(
                        subprocess.Popen(
                            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, env=environment
                        )
                    )
            _wait(started, folder, seconds)
            return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
                    process.wait()


def _wait(started: list[subprocess.Popen[bytes]], folder: Path, seconds: float) -> None:
    """Returns when all have ended well. The first that fails ends the waiting: the others would wait for it."""
    until = time.monotonic() + seconds
    while True:
        codes = [process.poll() for process in started]
        for rank, code in enumerate(codes):
            if code:
                told = (folder / f"{rank}.err").read_text(encoding="utf-8", errors="replace")
                raise EverytokenError(f"Rank {rank} of {len(started)} failed:\n{told[-2000:]}")
        if None not in codes:
            return
        if time.monotonic() > until:
            raise EverytokenError(f"Rank {codes.index(None)} of {len(started)} did not end within {seconds:g} s.")
        time.sleep(0.05)


def main(folder: Path, rank: int) -> None:
    """One rank.

    Args:
        folder: holds the order, and gets what the rank returns.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    order = json.loads((folder / "order.json").read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=order["world"],
        timeout=datetime.timedelta(seconds=SECONDS),
    )  # fmt: skip
    try:
        mesh: DeviceMesh = init_device_mesh("cpu", (order["world"],))
        module, _, name = order["function"].partition(":")
        found = getattr(importlib.import_module(module), name)(mesh, **order["arguments"])
        (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
