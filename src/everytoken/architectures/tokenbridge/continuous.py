"""A head for continuous tokens, the baseline of TokenBridge: a small flow for every token (MAR, arXiv 2406.11838).

MAR denoises every token by itself, given the vector g of its position. Here the denoiser learns the velocity of a
straight path from noise e to the token z, and Euler steps follow it::

    x_t = (1 - t) e + t z          loss = |v(x_t, t, g) - (z - e)|^2          x_(t + h) = x_t + h v(x_t, t, g)
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from ...core.errors import BadInputError
from ..images.adaptive import AdaptiveLayerNorm, AdaptiveModulation, TimeEmbedding, init_modulated, modulate, plain_norm


class FlowBlock(nn.Module):
    """A perceptron, modulated by the condition; the identity at first."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.modulation = AdaptiveModulation(width, width, 3)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.modulation(condition)
        return x + gate * self.down(F.silu(self.up(modulate(plain_norm(x), shift, scale))))


class ContinuousHead(nn.Module):
    """Losses and samples of tokens ``[..., C]`` given vectors ``[..., hidden]``.

    Args:
        hidden, channels: sizes of vectors and tokens.
        width, layers: of the perceptron; a width of None is that of the vectors.

    Raises:
        BadInputError: a size below 1.
    """

    def __init__(self, hidden: int, channels: int, width: int | None = None, layers: int = 3):
        super().__init__()
        width = hidden if width is None else width
        if min(hidden, channels, width, layers) < 1:
            raise BadInputError("hidden, channels, width and layers are 1 or more.")
        self.hidden, self.channels = hidden, channels
        self.project, self.read = nn.Linear(hidden, width), nn.Linear(channels, width)
        self.time = TimeEmbedding(width, floored=False)
        self.blocks = nn.ModuleList(FlowBlock(width) for _ in range(layers))
        self.norm = AdaptiveLayerNorm(width, width)
        self.write = nn.Linear(width, channels)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Weights as they begin: modulations and the last layer at zero."""
        init_modulated(self)
        init.zeros_(self.write.weight)

    def forward(self, g: torch.Tensor, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """The velocity ``[..., C]`` at ``x [..., C]`` and ``time [...]`` from 0 (noise) to 1 (token)."""
        condition = self.project(g) + self.time(time)
        hidden = self.read(x.to(g.dtype))
        for block in self.blocks:
            hidden = block(hidden, condition)
        found: torch.Tensor = self.write(self.norm(hidden, condition))
        return found

    def losses(self, g: torch.Tensor, tokens: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Squared errors of the velocity, ``[..., C]`` in float32, for given noise ``[..., C]`` and times ``[...]``."""
        mixed = torch.lerp(noise, tokens, time[..., None])
        return (self.forward(g, mixed, time).float() - (tokens - noise)).square()

    @torch.no_grad()
    def sample(self, g: torch.Tensor, noise: torch.Tensor, steps: int = 25, temperature: float = 1.0) -> torch.Tensor:
        """Tokens ``[..., C]`` from noise ``[..., C]``, whose deviation the temperature multiplies.

        Raises:
            BadInputError: shapes that do not fit, no step, or a negative temperature.
        """
        if g.shape[-1] != self.hidden or noise.shape != (*g.shape[:-1], self.channels):
            raise BadInputError(f"Vectors {[*g.shape]} and noise {[*noise.shape]} do not fit.")
        if steps < 1 or not 0 <= temperature < float("inf"):
            raise BadInputError(f"steps are 1 or more, a temperature 0 or more; got {steps} and {temperature}.")
        x = noise * temperature
        for step in range(steps):
            time = torch.full(g.shape[:-1], step / steps, device=g.device)
            x = x + self.forward(g, x, time).float() / steps
        return x
