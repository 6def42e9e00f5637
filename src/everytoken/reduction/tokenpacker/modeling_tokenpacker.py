"""TokenPacker's projector: coarse points that attend to their own fine regions (arXiv 2407.02392).

X ``[B, g^2, C]`` are the features of one encoder level, Z ``[B, g^2, L C]`` those of several, side by side. With
q = g / s points a side::

    P = bilinear(X, q x q)      Q = LN(P W_q)      K = LN(MLP(Z))      V = LN(MLP(Z))
    O_(a,b) = attention(Q_(a,b), K_region, V_region)            region (a, b): the s x s positions (a s + i, b s + j)
    T = W_2 GELU(W_1 O + b_1) + b_2                             [B, q^2, d], raster order

There is no residual from Q to O, and no position inside a region.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ...core.errors import BadInputError
from .configuration_tokenpacker import TokenPackerConfig


def into_regions(x: torch.Tensor, shape: tuple[int, int], scale: int) -> torch.Tensor:
    """``[B, h w, E]`` in raster order -> ``[B, M, s^2, E]``: the positions of every region, both in raster order."""
    batch, _, width = x.shape
    rows, columns = shape[0] // scale, shape[1] // scale
    x = x.reshape(batch, rows, scale, columns, scale, width)
    return x.transpose(2, 3).reshape(batch, rows * columns, scale * scale, width)


def from_regions(x: torch.Tensor, shape: tuple[int, int], scale: int) -> torch.Tensor:
    """The inverse of ``into_regions``."""
    batch, _, _, width = x.shape
    rows, columns = shape[0] // scale, shape[1] // scale
    x = x.reshape(batch, rows, columns, scale, scale, width)
    return x.transpose(2, 3).reshape(batch, shape[0] * shape[1], width)


def pooled_queries(features: torch.Tensor, shape: tuple[int, int], scale: int, how: str) -> torch.Tensor:
    """P: ``[B, h w, C]`` -> ``[B, M, C]``, computed in float32 and cast back."""
    batch, _, width = features.shape
    image = features.transpose(1, 2).reshape(batch, width, *shape).float()
    if how == "mean":
        coarse = F.avg_pool2d(image, scale)
    else:
        size = (shape[0] // scale, shape[1] // scale)
        coarse = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
    return coarse.flatten(2).transpose(1, 2).to(features.dtype)


class TokenPackerProjector(PreTrainedModel):
    """``(image_features [B, N, L C]) -> [B, M, d]``: takes the place of a model's projector.

    Args:
        config: see ``TokenPackerConfig``.
    """

    config_class = TokenPackerConfig
    base_model_prefix = "packer"
    _supports_sdpa = True

    def __init__(self, config: TokenPackerConfig):
        super().__init__(config)
        channels, width, text = config.vision_hidden_size, config.width, config.text_hidden_size
        self.query = nn.Linear(channels, width, bias=False)
        self.key = nn.Sequential(nn.Linear(config.num_levels * channels, width), nn.GELU(), nn.Linear(width, width))
        self.value = nn.Sequential(nn.Linear(config.num_levels * channels, width), nn.GELU(), nn.Linear(width, width))
        self.norm_query, self.norm_key, self.norm_value = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, config.num_heads, batch_first=True)
        self.exit = nn.Sequential(nn.Linear(width, text), nn.GELU(), nn.Linear(text, text))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.MultiheadAttention):
            nn.init.xavier_uniform_(module.in_proj_weight)
            nn.init.zeros_(module.in_proj_bias)
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        image_features: torch.Tensor,
        multi_level: torch.Tensor | None = None,
        shape: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Packs the features of images of one size.

        Args:
            image_features: ``[B, N, L C]``, what transformers hands to a projector when ``vision_feature_layer`` is a
                list: levels side by side, the query's last. With ``multi_level`` it is ``[B, N, C]``, the query's.
            multi_level: ``[B, N, L C]``, for keys and values.
            shape: ``(rows, columns)`` of the features; None is a square.

        Returns:
            ``[B, N / s^2, d]`` in raster order.

        Raises:
            BadInputError: features of another width, a number of them that is no such grid, or a grid that regions do
                not tile.
        """
        return self.packed(image_features, multi_level, shape)[0]

    def packed(
        self,
        image_features: torch.Tensor,
        multi_level: torch.Tensor | None = None,
        shape: tuple[int, int] | None = None,
        need_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As ``forward``, and with ``need_weights`` each region's attention ``[B, M, s^2]``, the mean over heads."""
        scale = self.config.scale
        query_level, multi_level, shape = self._checked(image_features, multi_level, shape)
        queries = self.norm_query(self.query(pooled_queries(query_level, shape, scale, self.config.query_pool)))
        keys = into_regions(self.norm_key(self.key(multi_level)), shape, scale)
        values = into_regions(self.norm_value(self.value(multi_level)), shape, scale)
        batch, tokens, area, width = keys.shape
        flat = (queries.reshape(-1, 1, width), keys.reshape(-1, area, width), values.reshape(-1, area, width))
        mixed, weights = self.attention(*flat, need_weights=need_weights)
        output = self.exit(mixed.reshape(batch, tokens, width))
        return output, None if weights is None else weights.reshape(batch, tokens, area)

    def _checked(
        self, features: torch.Tensor, multi_level: torch.Tensor | None, shape: tuple[int, int] | None
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
        channels, levels, scale = self.config.vision_hidden_size, self.config.num_levels, self.config.scale
        if multi_level is None:
            multi_level, features = features, features[..., -channels:]
        if (
            features.dim() != 3
            or multi_level.shape != (*features.shape[:2], levels * channels)
            or features.shape[-1] != channels
        ):
            raise BadInputError(
                f"This projector reads {levels} levels of width {channels} side by side, [B, N, {levels * channels}]; "
                f"got {tuple(multi_level.shape)}.",
                f"Set vision_feature_layer to its levels: {self.config.levels}.",
            )
        count = features.shape[1]
        if shape is None:
            side = math.isqrt(count)
            shape = (side, side)
        if shape[0] * shape[1] != count:
            raise BadInputError(
                f"{count} features are no grid of {shape[0]} x {shape[1]}.",
                "Give shape=(rows, columns), and drop the class token first.",
            )
        if shape[0] % scale or shape[1] % scale:
            raise BadInputError(
                f"Regions of {scale} x {scale} do not tile a grid of {shape[0]} x {shape[1]}.", "Take another scale."
            )
        return features, multi_level, shape
