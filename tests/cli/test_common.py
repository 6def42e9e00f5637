"""What commands share and cannot be seen from their output."""

from __future__ import annotations

import subprocess
import sys

import pytest

from everytoken.cli.common import leave_processes


def test_leaving_without_a_process_group_changes_nothing():
    leave_processes()


@pytest.mark.slow
def test_the_process_group_ends_before_python_does(tmp_path):
    """Whoever waits for a collective's tensors at exit finds no group, and no thread of it holding them."""
    script = f"""
import torch, weakref
import torch.distributed as distributed
from everytoken.cli.common import leave_processes
distributed.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
value = torch.ones(3)
kept = weakref.ref(value)
distributed.all_reduce(value)
leave_processes()
assert not distributed.is_initialized()
del value
assert kept() is None
leave_processes()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
