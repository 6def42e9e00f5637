"""A head that spells the channels of a token, one after the other, from the vector of any model (arXiv 2503.16430).

A token of C channels with B bins each has B^C values, too many for one softmax. With an order o of the channels::

    p(q | g) = prod_j p(q_(o_j) | g, q_(o_<j))

A causal transformer reads ``W g, emb_1(q_(o_1)), ..., emb_(C-1)(q_(o_(C-1)))`` with learned positions. Its norms are
conditioned on ``W g`` and an embedding of the step; every step has a linear layer of its own to its B logits. All
weights belong to steps, not to places in memory: channels stored otherwise, with the order changed accordingly, give
the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from ...core.errors import BadInputError
from ..images.adaptive import AdaptiveLayerNorm, AdaptiveModulation, init_modulated, modulate, plain_norm

Past = tuple[torch.Tensor, torch.Tensor]
"""Keys and values ``[N, heads, C, d]`` of a block; steps that are still to come hold nothing of use."""


class ChannelSample(NamedTuple):
    """What a head drew.

    Attributes:
        codes: ``[..., C]``, long.
        entropies: ``[..., C]`` in nats, of the distributions that they were drawn from, before the temperature.
    """

    codes: torch.Tensor
    entropies: torch.Tensor


class ChannelBlock(GradientCheckpointingLayer):
    """Attention over the steps before and a perceptron, modulated by the condition; the identity at first."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm = nn.LayerNorm(width // heads, eps=1e-6)
        self.key_norm = nn.LayerNorm(width // heads, eps=1e-6)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = AdaptiveModulation(width, width)

    def forward(
        self, x: torch.Tensor, condition: torch.Tensor, past: Past | None = None, step: int = 0
    ) -> torch.Tensor:
        """``x, condition [N, T, width]``; with ``past``, T is 1 and its keys and values are put in at ``step``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)
        mixed = self.qkv(modulate(plain_norm(x), shift1, scale1)).unflatten(-1, (3, self.heads, -1))
        query, key, value = (item.transpose(1, 2) for item in mixed.unbind(2))
        query, key = self.query_norm(query), self.key_norm(key)
        if past is not None:
            keys, values = past
            keys[:, :, step : step + 1], values[:, :, step : step + 1] = key, value
            key, value = keys[:, :, : step + 1], values[:, :, : step + 1]
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=past is None)
        x = x + gate1 * self.out(seen.transpose(1, 2).flatten(2))
        return x + gate2 * self.down(F.gelu(self.up(modulate(plain_norm(x), shift2, scale2))))


class ChannelARHead(nn.Module):
    """Log-probabilities and samples of tokens ``[..., C]`` given vectors ``[..., hidden]``.

    Args:
        hidden: size of the vectors.
        channels, bins: C and B.
        width, layers, heads: of the transformer; a width of None is that of the vectors.
        order: the channels as they are spelt, a permutation of 0 .. C - 1; None takes them as they lie.
        independent: every channel is predicted from the vector alone, as a baseline.
        released_first_input: add the first step's embedding to the first input while sampling, though not while
            learning, as the released code does.

    Raises:
        BadInputError: sizes out of range, a width that the heads do not divide, or an order that is no permutation.
    """

    def __init__(
        self,
        hidden: int,
        channels: int,
        bins: int,
        width: int | None = None,
        layers: int = 2,
        heads: int = 4,
        order: Sequence[int] | None = None,
        independent: bool = False,
        released_first_input: bool = False,
    ):
        super().__init__()
        width = hidden if width is None else width
        if min(hidden, channels, width, layers, heads) < 1 or bins < 2:
            raise BadInputError("hidden, channels, width, layers and heads are 1 or more, and bins 2 or more.")
        if width % heads:
            raise BadInputError(f"{heads} heads do not divide a width of {width}.")
        self.order = check_order(order, channels)
        self.places = sorted(range(channels), key=self.order.__getitem__)
        """At which step each channel is spelt: the inverse of the order."""
        self.hidden, self.channels, self.bins = hidden, channels, bins
        self.independent, self.released_first_input = independent, released_first_input
        self.project = nn.Linear(hidden, width)
        self.positions = nn.Parameter(torch.empty(channels, width))
        self.steps = nn.Parameter(torch.empty(channels, width))
        self.embeddings = None if independent or channels == 1 else nn.Parameter(torch.empty(channels - 1, bins, width))
        self.blocks = nn.ModuleList(ChannelBlock(width, heads) for _ in range(layers))
        self.norm = AdaptiveLayerNorm(width, width)
        self.weight = nn.Parameter(torch.empty(channels, bins, width))
        self.bias = nn.Parameter(torch.empty(channels, bins))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Weights as they begin: modulations and biases at zero, so that every block is the identity."""
        init_modulated(self)
        for table in (self.positions, self.steps, self.weight, self.embeddings):
            if table is not None:
                init.normal_(table, std=0.02)
        init.zeros_(self.bias)

    # -- likelihood ----------------------------------------------------------------------------------------------------
    def forward(self, g: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """Logits of every channel given the vector and the channels spelt before it.

        Args:
            g: ``[..., hidden]``.
            q: ``[..., C]``, long; the last channel of the order is not looked at.

        Returns:
            ``[..., C, B]``, channels as they lie.

        Raises:
            BadInputError: shapes that do not fit, or codes that are no indices of bins.
        """
        self._check(g, q)
        shape = q.shape[:-1]
        g, q = g.reshape(-1, self.hidden), q.reshape(-1, self.channels)[:, self.order]
        given = self.project(g)[:, None]
        condition = given + self.steps
        x = given.expand(-1, self.channels, -1)
        if self.embeddings is not None:
            steps = torch.arange(self.channels - 1, device=q.device)
            x = torch.cat([given, self.embeddings[steps, q[:, :-1]]], 1)
        x = x + self.positions
        for block in self.blocks:
            x = block(x, condition)
        logits = torch.einsum("ncw,cbw->ncb", self.norm(x, condition), self.weight) + self.bias
        return logits[:, self.places].view(*shape, self.channels, self.bins)

    def log_prob(self, g: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """Log-probability ``[..., C]`` of every channel given those before it; the token's is their sum.

        Arguments and errors as for ``forward``.
        """
        logits = self.forward(g, q)
        precise = torch.promote_types(logits.dtype, torch.float32)
        return logits.to(precise).log_softmax(-1).gather(-1, q[..., None])[..., 0]

    # -- sampling ------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def sample(
        self,
        g: torch.Tensor,
        temperature: float = 1.0,
        cache: bool = True,
        generator: torch.Generator | None = None,
        uniforms: torch.Tensor | None = None,
    ) -> ChannelSample:
        """Draws a token for every vector, channel by channel.

        Args:
            g: ``[..., hidden]``.
            temperature: logits are divided by it; 0 takes the likeliest bin.
            cache: keep keys and values, for C token passes in place of C (C + 1) / 2. The result is the same.
            generator: of the random numbers; None takes torch's own.
            uniforms: the random numbers themselves, ``[..., C]`` from 0 to below 1, channels as they lie. A token then
                depends on its own numbers only, not on what else is in the batch.

        Raises:
            BadInputError: shapes that do not fit, a negative temperature, or both sources of random numbers.
        """
        self._check(g)
        if not 0 <= temperature < float("inf"):
            raise BadInputError(f"A temperature is 0 or more; got {temperature}.")
        if uniforms is not None and (generator is not None or uniforms.shape != (*g.shape[:-1], self.channels)):
            raise BadInputError("Give uniforms [..., C], one a channel of a token, or a generator.")
        shape, g = g.shape[:-1], g.reshape(-1, self.hidden)
        if uniforms is None:
            device = g.device if generator is None else generator.device
            uniforms = torch.rand(len(g), self.channels, generator=generator, device=device)
        noise = uniforms.reshape(-1, self.channels).to(g.device, torch.float32)[:, self.order]
        given = self.project(g)
        codes = torch.empty(len(g), self.channels, dtype=torch.long, device=g.device)
        entropies = torch.empty(len(g), self.channels, device=g.device)
        pasts = [self._empty(block, given) for block in self.blocks] if cache else None
        inputs: list[torch.Tensor] = []
        for step in range(self.channels):
            inputs.append(self._input(given, codes, step))
            logits = self._step(given, inputs, pasts).float()
            logps = logits.log_softmax(-1)
            entropies[:, step] = -(logps.exp() * logps).sum(-1)
            if temperature == 0:
                codes[:, step] = logits.argmax(-1)
            else:
                reached = (logits / temperature).softmax(-1).cumsum(-1)
                # against the sum that was reached, which rounding may leave below 1
                drawn = torch.searchsorted(reached, (noise[:, step : step + 1] * reached[:, -1:]), right=True)
                codes[:, step] = drawn[:, 0].clamp(max=self.bins - 1)
        return ChannelSample(codes[:, self.places].view(*shape, -1), entropies[:, self.places].view(*shape, -1))

    def _input(self, given: torch.Tensor, codes: torch.Tensor, step: int) -> torch.Tensor:
        """What the transformer reads at a step: ``[N, width]``."""
        if step and self.embeddings is not None:
            return self.embeddings[step - 1, codes[:, step - 1]] + self.positions[step]
        first = given + self.positions[step]
        return first + self.steps[0] if self.released_first_input and not step else first

    def _step(self, given: torch.Tensor, inputs: list[torch.Tensor], pasts: list[Past] | None) -> torch.Tensor:
        """Logits ``[N, B]`` of the step of the last input."""
        step = len(inputs) - 1
        if pasts is not None:
            x, condition = inputs[-1][:, None], (given + self.steps[step])[:, None]
            for block, past in zip(self.blocks, pasts, strict=True):
                x = block(x, condition, past, step)
        else:
            x, condition = torch.stack(inputs, 1), given[:, None] + self.steps[: step + 1]
            for block in self.blocks:
                x = block(x, condition)
        last = self.norm(x[:, -1], condition[:, -1])
        return F.linear(last, self.weight[step], self.bias[step])

    def _empty(self, block: nn.Module, given: torch.Tensor) -> Past:
        shape = len(given), block.heads, self.channels, given.shape[1] // block.heads  # type: ignore[operator]
        return given.new_empty(shape), given.new_empty(shape)  # type: ignore[arg-type]

    def _check(self, g: torch.Tensor, q: torch.Tensor | None = None) -> None:
        if not g.is_floating_point() or g.dim() < 1 or g.shape[-1] != self.hidden:
            raise BadInputError(f"Vectors [..., {self.hidden}] are expected; got {g.dtype} {[*g.shape]}.")
        if q is None:
            return
        if q.dtype != torch.long or q.shape != (*g.shape[:-1], self.channels):
            raise BadInputError(f"Codes are long [..., {self.channels}], one row a vector; got {q.dtype} {[*q.shape]}.")
        if not torch.compiler.is_compiling() and q.numel():
            low, high = (int(end) for end in q.aminmax())
            if low < 0 or high >= self.bins:
                raise BadInputError(f"Codes of {self.bins} bins lie from 0 to {self.bins - 1}; got {low} to {high}.")


def check_order(order: Sequence[int] | None, channels: int) -> list[int]:
    """The order as a list; raises BadInputError for one that does not name every channel once."""
    found = list(range(channels)) if order is None else [int(item) for item in order]
    if sorted(found) != list(range(channels)):
        raise BadInputError(f"An order names each of {channels} channels once; got {found}.")
    return found
