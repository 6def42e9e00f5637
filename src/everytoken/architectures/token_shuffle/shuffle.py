"""The two modules of Token-Shuffle, for any causal model that takes ``inputs_embeds`` (arXiv 2504.17789).

A window of w = s^2 neighbouring tokens becomes one position of the same width d. One hidden state becomes the hidden
states of the w tokens of the next window::

    TokenShuffle      c_j = gelu(W_in e_j)   [d / w]      x = concat(c_1 .. c_w)      x <- x + MLP(LN x), n times
    TokenUnshuffle    x = o                               x <- x + MLP(LN x), n times  h_j = W_out x_j, x_j of [d / w]

Given the past, the tokens of a window are independent of each other. ``independence_cost`` says what that costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ...core.errors import BadInputError
from ..grid import Grid, inverse_order, window_order


class WindowOrder:
    """Where the tokens of a grid stand when it is read window by window.

    Args:
        height, width: of the grid.
        window: rows and columns, or one number for both.

    Attributes:
        indices: ``[L]`` raster indices, window by window, each in raster order.
        inverse: ``[L]`` the place of every raster index.
        windows, tokens: how many windows there are, and tokens in each.

    Raises:
        BadInputError: windows that do not tile the grid.
    """

    def __init__(self, height: int, width: int, window: int | Grid, device: torch.device | None = None):
        self.indices = window_order(height, width, window, device)
        self.inverse = inverse_order(self.indices)
        rows, columns = (window, window) if isinstance(window, int) else window
        self.tokens = rows * columns
        self.windows = height * width // self.tokens

    def gather(self, raster: torch.Tensor) -> torch.Tensor:
        """``[B, L, ...]`` in raster order -> ``[B, windows, tokens, ...]``."""
        return raster[:, self.indices].unflatten(1, (self.windows, self.tokens))

    def scatter(self, windows: torch.Tensor) -> torch.Tensor:
        """The inverse of ``gather``."""
        return windows.flatten(1, 2)[:, self.inverse]


class ResidualMLP(nn.Module):
    """``x + MLP(LN x)``: ``[..., d] -> [..., d]``."""

    def __init__(self, width: int, ratio: float = 2.0):
        super().__init__()
        inner = max(1, round(ratio * width))
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(F.gelu(self.up(self.norm(hidden))))


class TokenShuffle(nn.Module):
    """The embeddings of a window's tokens as one position: ``[..., w, d] -> [..., d]``.

    Args:
        hidden_size: d.
        window: rows and columns of a window, or one number for both; w is their product.
        num_blocks: residual MLP blocks.
        block_ratio: width of their hidden layer over d.
        activation: ``"gelu"`` behind the first map, or ``"none"``.

    Raises:
        BadInputError: w does not divide d.
    """

    def __init__(
        self,
        hidden_size: int,
        window: int | Grid = 2,
        num_blocks: int = 2,
        block_ratio: float = 2.0,
        activation: str = "gelu",
    ):
        super().__init__()
        self.tokens, inner = _parts(hidden_size, window)
        self.activation = activation
        self.linear = nn.Linear(hidden_size, inner)
        self.blocks = nn.ModuleList(ResidualMLP(hidden_size, block_ratio) for _ in range(num_blocks))

    def forward(self, embeds: torch.Tensor) -> torch.Tensor:
        small = self.linear(embeds)
        hidden = (F.gelu(small) if self.activation == "gelu" else small).flatten(-2)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class TokenUnshuffle(nn.Module):
    """A hidden state as those of the tokens of the next window: ``[..., d] -> [..., w, d]``; arguments as for
    ``TokenShuffle``.
    """

    def __init__(self, hidden_size: int, window: int | Grid = 2, num_blocks: int = 2, block_ratio: float = 2.0):
        super().__init__()
        self.tokens, inner = _parts(hidden_size, window)
        self.blocks = nn.ModuleList(ResidualMLP(hidden_size, block_ratio) for _ in range(num_blocks))
        self.linear = nn.Linear(inner, hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return self.linear(hidden.unflatten(-1, (self.tokens, -1)))


def _parts(hidden_size: int, window: int | Grid) -> tuple[int, int]:
    """Tokens of a window, and the width that each has inside a position."""
    rows, columns = (window, window) if isinstance(window, int) else window
    tokens = rows * columns
    if min(rows, columns) < 1 or hidden_size % tokens:
        raise BadInputError(f"A width of {hidden_size} cannot be cut into {tokens} equal parts, one for each token.")
    return tokens, hidden_size // tokens


# -- what it costs and saves -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class IndependenceCost:
    """What predicting the tokens of a window independently costs.

    Attributes:
        entropy: of the window, in nats: the price of a model that reads token by token.
        independent: the least that a model with independent tokens can pay, in nats: the sum of their entropies.
        legal: the probability that tokens sampled independently make a window that occurs.
    """

    entropy: torch.Tensor
    independent: torch.Tensor
    legal: torch.Tensor

    @property
    def lost(self) -> torch.Tensor:
        """``independent - entropy``: the total correlation, in nats a window; never negative."""
        return self.independent - self.entropy


def independence_cost(joint: torch.Tensor) -> IndependenceCost:
    """The exact cost for a distribution over windows.

    Args:
        joint: ``[V, V, ...]``, one axis a token of the window; probabilities that sum to 1.

    Raises:
        BadInputError: negative entries, or a sum that is not 1.
    """
    total = float(joint.detach().sum())
    if joint.dim() < 1 or bool((joint.detach() < 0).any()) or not math.isclose(total, 1.0, abs_tol=1e-4):
        raise BadInputError(f"Probabilities of windows are 0 or more and sum to 1; they sum to {total:g}.")
    axes = range(joint.dim())
    marginals = [joint.sum([other for other in axes if other != axis]) if len(axes) > 1 else joint for axis in axes]
    product = marginals[0]
    for marginal in marginals[1:]:
        product = product[..., None] * marginal
    independent = torch.stack([_entropy(marginal) for marginal in marginals]).sum()
    return IndependenceCost(_entropy(joint), independent, product[joint > 0].sum())


def _entropy(probabilities: torch.Tensor) -> torch.Tensor:
    there = probabilities[probabilities > 0]
    return -(there * there.log()).sum()


def map_weights(width: int, window: int | Grid) -> int:
    """Weights of the two linear maps of a width and a window, without biases: ``2 d^2 / w``."""
    return 2 * width * _parts(width, window)[1]


def stack_operations(positions: int, width: int, layers: int = 1) -> int:
    """Floating-point operations of a forward of a transformer whose layers have ``12 d^2`` weights.

    Each layer takes ``24 n d^2`` for its maps and ``4 n^2 d`` for attention; n is the number of positions.
    """
    return layers * (24 * positions * width**2 + 4 * positions**2 * width)


def saving(tokens: int, window: int | Grid, width: int) -> float:
    """How many times fewer operations a stack needs for ``tokens`` image tokens in windows than one by one.

    Raises:
        BadInputError: windows that do not divide the tokens.
    """
    rows, columns = (window, window) if isinstance(window, int) else window
    if min(rows, columns, tokens) < 1 or tokens % (rows * columns):
        raise BadInputError(f"Windows of {rows} x {columns} do not divide {tokens} tokens.")
    return stack_operations(tokens, width) / stack_operations(tokens // (rows * columns), width)
