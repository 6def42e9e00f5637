"""Ranks as real processes on this machine, over gloo: for tests, checks and measurements without a cluster."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import subprocess
import sys
import tempfile
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
    with tempfile.TemporaryDirectory() as folder:
        order = json.dumps({"function": function, "world": world, "arguments": arguments or {}, "folder": folder})
        started = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, str(rank)],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
            )
            for rank in range(world)
        ]  # fmt: skip
        try:
            for process in started:
                assert process.stdin is not None
                process.stdin.write(order)
                process.stdin.close()
                process.stdin = None
            for rank, process in enumerate(started):
                try:
                    _, told = process.communicate(timeout=seconds)
                except subprocess.TimeoutExpired as error:
                    raise EverytokenError(f"Rank {rank} of {world} did not end within {seconds:g} s.") from error
                if process.returncode:
                    raise EverytokenError(f"Rank {rank} of {world} failed:\n{told[-2000:]}")
            return [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
                    process.wait()


def main(rank: int) -> None:
    """One rank: reads its orders from standard input."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    order = json.loads(sys.stdin.read())
    torch.set_num_threads(1)
    folder = Path(order["folder"])
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
    main(int(sys.argv[1]))
