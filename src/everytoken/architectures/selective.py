"""The selective state space of Mamba as a module that scans a sequence in any orders.

Its weights have the names and shapes that transformers' mixers give theirs, so that what reads or constrains those
works on it too.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .scan import selective_scan


class Scans(NamedTuple):
    """In which orders K scans read the tokens.

    Attributes:
        orders, inverses: ``[K, L]``.
        moves: ``[K, L]``, a kind of move for every position, or None.
    """

    orders: torch.Tensor
    inverses: torch.Tensor
    moves: torch.Tensor | None = None


class SelectiveSSM(nn.Module):
    """Steps, B and C from the tokens themselves, and the scan.

    Args:
        channels: E.
        states: n.
        rank: of the steps' projection.

    Attributes:
        reorder: called with the tokens ``[B, L, E]`` and their steps before bias and softplus; returns something with
            ``hidden`` and ``restore``. What it returns is read in the orders of the scans. None leaves the tokens.
    """

    def __init__(self, channels: int, states: int, rank: int):
        super().__init__()
        self.time_step_rank, self.ssm_state_size = rank, states
        self.x_proj = nn.Linear(channels, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, channels)
        self.A_log = nn.Parameter(torch.empty(channels, states))
        self.D = nn.Parameter(torch.empty(channels))
        self.reorder: nn.Module | None = None

    @torch.no_grad()
    def init_weights(self, least: float = 1e-3, most: float = 0.1, floor: float = 1e-4) -> None:
        """Mamba's start: A from -1 to -n, D one, steps between ``least`` and ``most``, uniform in their logarithm."""
        channels, states = self.A_log.shape
        numbers = torch.arange(1, states + 1, dtype=torch.float32, device=self.A_log.device)
        init.copy_(self.A_log, numbers.log().expand(channels, -1))
        init.ones_(self.D)
        bound = self.time_step_rank**-0.5
        init.uniform_(self.dt_proj.weight, -bound, bound)
        span = torch.rand(channels, device=self.dt_proj.bias.device) * (math.log(most) - math.log(least))
        step = torch.exp(span + math.log(least)).clamp(min=floor)
        init.copy_(self.dt_proj.bias, step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def forward(
        self,
        x: torch.Tensor,
        scans: Scans,
        directions: torch.Tensor | None = None,
        permute_parameters: bool = True,
        double_bias: bool = False,
    ) -> torch.Tensor:
        """The sum of all scans, in the tokens' own order: ``[B, L, E] -> [B, L, E]``.

        Args:
            x: tokens.
            scans: the orders.
            directions: ``[kinds of moves, n]``, added to B by the move into each position; None adds nothing.
            permute_parameters: steps, B and C follow their tokens. False is PlainMamba's released code, where only the
                input does, and the parameters of position t are those of token t.
            double_bias: add the steps' bias twice, as that code does.
        """
        restore = None
        if self.reorder is not None:
            moved = self.reorder(x, self._split(x)[0] - self.dt_proj.bias)
            x, restore = moved.hidden, moved.restore
        y = self.scan_each(x, scans, directions, permute_parameters, double_bias).sum(1)
        return y if restore is None else restore(y)

    def scan_each(
        self,
        x: torch.Tensor,
        scans: Scans,
        directions: torch.Tensor | None = None,
        permute_parameters: bool = True,
        double_bias: bool = False,
    ) -> torch.Tensor:
        """What every scan gives to every token: ``[B, K, L, E]``; arguments as for ``forward``."""
        steps, b, c = self._split(x)
        steps = steps.float()
        delta = F.softplus(steps + self.dt_proj.bias.float() if double_bias else steps)
        count = len(scans.orders)
        if permute_parameters:
            u, delta, b, c = (item[:, scans.orders] for item in (x, delta, b, c))  # [B, K, L, ...]
        else:
            u = x[:, scans.orders]
            delta, b, c = (item.unsqueeze(1).expand(-1, count, -1, -1) for item in (delta, b, c))
        if directions is not None and scans.moves is not None:
            b = b.float() + directions.float()[scans.moves]
        u, delta, b, c = (item.flatten(0, 1) for item in (u, delta, b, c))
        y = selective_scan(u, delta, -torch.exp(self.A_log.float()), b, c, self.D.float()).unflatten(0, (-1, count))
        rows = torch.arange(count, device=x.device)[:, None]
        return y[:, rows, scans.inverses]

    def _split(self, x: torch.Tensor) -> Any:
        """Steps before the softplus ``[B, L, E]``, B and C ``[B, L, n]``."""
        steps, b, c = self.x_proj(x).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], -1)
        return self.dt_proj(steps), b, c
