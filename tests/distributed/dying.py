"""A rank that dies, with few imports: it should not take long to find out."""

from __future__ import annotations

import torch.distributed as dist


def dies(mesh):
    if mesh.get_rank() == 1:
        raise RuntimeError("this rank dies")
    dist.barrier()
