"""Adaptive layer norms: a condition (class, time) shifts, scales and gates what a layer computes.

A condition c gives six vectors a layer by one linear map of silu(c)::

    x <- x + g1 * Attention(norm(x) (1 + s1) + b1)
    x <- x + g2 * MLP(norm(x) (1 + s2) + b2)

(Peebles and Xie, arXiv 2212.09748.) Norms have no weights of their own. Conditions are ``[B, ...,  d]`` with any axes
that broadcast against the tokens.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...core.errors import BadInputError


def modulate(hidden: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``hidden (1 + scale) + shift``."""
    return hidden * (1 + scale) + shift


class AdaptiveModulation(nn.Module):
    """The vectors of one layer: ``[..., condition] -> parts of [..., width]``.

    Args:
        condition, width: sizes of what comes in and of each vector.
        parts: how many vectors; six for a layer of attention and MLP, two for a last norm.
    """

    def __init__(self, condition: int, width: int, parts: int = 6):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(condition, parts * width)

    def forward(self, condition: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.linear(F.silu(condition)).chunk(self.parts, -1)


class AdaptiveLayerNorm(nn.Module):
    """A norm without weights, then a shift and a scale from a condition.

    Args:
        condition, width: sizes of the condition and of what is normed.
        rms: root mean square in place of mean and variance.
    """

    def __init__(self, condition: int, width: int, eps: float = 1e-6, rms: bool = False):
        super().__init__()
        self.eps, self.rms, self.width = eps, rms, width
        self.modulation = AdaptiveModulation(condition, width, 2)

    def forward(self, hidden: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale = self.modulation(condition)
        return modulate(plain_norm(hidden, self.eps, self.rms), shift, scale)


def init_modulated(module: nn.Module) -> None:
    """Weights of a network of modulated blocks as they begin: maps by their width, biases and modulations at
    zero.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            init.xavier_uniform_(part.weight)
            init.zeros_(part.bias)
    for part in module.modules():
        if isinstance(part, AdaptiveModulation):
            init.zeros_(part.linear.weight)


def plain_norm(hidden: torch.Tensor, eps: float = 1e-6, rms: bool = False) -> torch.Tensor:
    """A norm over the last axis without weights."""
    width = (hidden.shape[-1],)
    return F.rms_norm(hidden, width, eps=eps) if rms else F.layer_norm(hidden, width, eps=eps)


class TimeEmbedding(nn.Module):
    """A number from 0 to 1 as a vector, by sines of many frequencies and an MLP: ``[...] -> [..., width]``.

    Args:
        width: of the vector.
        frequencies: size of the sinusoid; even.
        steps: the sinusoid reads ``steps * t``.
        floored: it reads the whole part of that alone, as the first such networks did; False keeps t continuous.

    Raises:
        BadInputError: an odd number of frequencies.
    """

    def __init__(self, width: int, frequencies: int = 256, steps: int = 1000, floored: bool = True):
        super().__init__()
        if frequencies < 2 or frequencies % 2:
            raise BadInputError(f"frequencies is even; got {frequencies}.")
        self.frequencies, self.steps, self.floored = frequencies, steps, floored
        self.first, self.second = nn.Linear(frequencies, width), nn.Linear(width, width)

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(F.silu(self.first(self.sinusoid(time).to(self.first.weight.dtype))))
        return found

    def sinusoid(self, time: torch.Tensor) -> torch.Tensor:
        """Cosines, then sines: ``[...] -> [..., frequencies]``, in float32."""
        at = self.steps * time.float()
        if self.floored:
            at = at.floor()
        half = self.frequencies // 2
        rates = torch.exp(-math.log(10_000) / half * torch.arange(half, device=time.device))
        angles = at[..., None] * rates
        return torch.cat([angles.cos(), angles.sin()], -1)


class ClassEmbedding(nn.Embedding):
    """A vector for each class, and one for no class, whose number is ``classes``: ``[...] -> [..., width]``."""

    def __init__(self, classes: int, width: int):
        super().__init__(classes + 1, width)
        self.null = classes
