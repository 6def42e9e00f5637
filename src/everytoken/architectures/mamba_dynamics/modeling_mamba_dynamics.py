"""A Mamba whose layers keep the constraint on their token dynamics, and scan without a loop in Python.

Blocks, cache and generation are transformers' own. Only ``x_proj`` of a constrained mixer is ours: it has as many
weights as the constraint needs, so that none is left without a gradient.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import MambaForCausalLM
from transformers import initialization as init
from transformers.models.mamba.modeling_mamba import MambaMixer

from ..base import OwnWeights, register
from ..scan import with_fast_scan
from .analysis import constrained_rows
from .configuration_mamba_dynamics import MambaDynamicsConfig


class ConstrainedProjection(nn.Module):
    """``x_proj`` of a mixer: free rows for the steps, constrained ones for B and C.

    Args:
        channels: E.
        rank: rows for the steps.
        states: N.
        kind: of ``analysis.KINDS``.

    Attributes:
        steps: ``[rank, E]``.
        basis: P's part above the diagonal, in ``[N, E]``.
        rate: v, ``[N]``.
    """

    def __init__(self, channels: int, rank: int, states: int, kind: str):
        super().__init__()
        self.kind, self.in_features, self.out_features = kind, channels, rank + 2 * states
        self.steps = nn.Parameter(torch.empty(rank, channels))
        self.basis = nn.Parameter(torch.empty(states, channels))
        self.rate = nn.Parameter(torch.empty(states))
        if self.rate.device.type != "meta":
            self.init_weights(channels**-0.5)

    @torch.no_grad()
    def init_weights(self, deviation: float) -> None:
        """Normal weights as those of other projections; v begins at zero, so that w is 1.39 or 0.69."""
        init.normal_(self.steps, std=deviation)
        init.normal_(self.basis, std=deviation)
        init.zeros_(self.rate)

    @property
    def weight(self) -> torch.Tensor:
        """``[rank + 2 N, E]``, as a plain ``x_proj`` has it."""
        return torch.cat([self.steps, *constrained_rows(self.basis, self.rate, self.kind)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight)


class MambaDynamicsMixer(MambaMixer):
    """transformers' mixer with the scan of ``architectures.scan``."""

    forward = with_fast_scan(MambaMixer.forward)


class MambaDynamicsForCausalLM(OwnWeights, MambaForCausalLM):
    """A causal language model; used as ``MambaForCausalLM`` is.

    Raises:
        BadInputError: see ``MambaDynamicsConfig``.
    """

    config_class = MambaDynamicsConfig
    config: MambaDynamicsConfig

    def __init__(self, config: MambaDynamicsConfig):
        super().__init__(config)
        for layer in self.backbone.layers:
            mixer = layer.mixer
            mixer.__class__ = MambaDynamicsMixer
            if config.dynamics != "free":
                sizes = mixer.intermediate_size, mixer.time_step_rank, mixer.ssm_state_size
                mixer.x_proj = ConstrainedProjection(*sizes, config.dynamics)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ConstrainedProjection):
            module.init_weights(module.in_features**-0.5)
        else:
            super()._init_weights(module)


register(MambaDynamicsConfig, MambaDynamicsForCausalLM, "AutoModelForCausalLM")
