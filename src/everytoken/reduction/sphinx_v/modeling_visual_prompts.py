"""The visual prompt encoder of SPHINX-V: points and boxes as one token each (arXiv 2403.20271).

With random frequencies G ``[2, c/2]`` that never learn, a place v in [0, 1]^2 becomes::

    a = 2 pi (2v - 1) G        phi(v) = [sin a, cos a]                                  in R^c
    point:  t = U(phi(v) + p_1)                     empty slot:  U(phi(0) + p_0)        in R^2c
    box:    t = [phi(tl) + b_tl ; phi(br) + b_br] + b_1   empty: [phi(0) + b_tl ; phi(0) + b_br] + b_0
    token = LayerNorm(W t)                                                              in R^d

No slot has a vector of its own: "region 2" is found by the token's position in the text. The tokens of an image stand
between a learned start and a learned end.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from ...core.errors import BadInputError
from .configuration_visual_prompts import VisualPromptConfig
from .prompts import BOX, POINT, Prompts


class VisualPromptEncoder(PreTrainedModel):
    """``(coordinates [B, P, 4], kinds [B, P], valid [B, P]) -> [B, P, d]``.

    Args:
        config: see ``VisualPromptConfig``.
    """

    config_class = VisualPromptConfig
    base_model_prefix = "prompts"

    def __init__(self, config: VisualPromptConfig):
        super().__init__(config)
        half, width = config.width // 2, config.width
        self.register_buffer("frequencies", torch.empty(2, half))
        self.point_types = nn.Embedding(2, width)  # p_0, p_1
        self.corners = nn.Embedding(2, width)  # b_tl, b_br
        self.box_types = nn.Embedding(2, 2 * width)  # b_0, b_1
        self.lift = nn.Linear(width, 2 * width)
        self.project = nn.Linear(2 * width, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.ends = nn.Embedding(2, config.hidden_size)  # start, end
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            nn.init.normal_(self.frequencies, std=self.config.fourier_scale)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)

    def places(self, coordinates: torch.Tensor) -> torch.Tensor:
        """phi: ``[..., 2]`` from 0 to 1 -> ``[..., c]``."""
        centred = 2 * (coordinates + self.config.coordinate_shift) - 1
        angles = 2 * math.pi * centred @ self.frequencies
        return torch.cat([angles.sin(), angles.cos()], -1)

    def forward(self, coordinates: torch.Tensor, kinds: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """One token a slot.

        Args:
            coordinates: ``[B, P, 4]`` from 0 to 1; those of empty slots do not matter.
            kinds: ``[B, P]``, ``POINT`` or ``BOX``.
            valid: ``[B, P]``, whether a slot holds a prompt.

        Raises:
            BadInputError: shapes that do not belong together, more slots than ``max_prompts``, or an unknown kind.
        """
        if coordinates.shape != (*kinds.shape, 4) or valid.shape != kinds.shape:
            raise BadInputError(
                "Prompts are coordinates [B, P, 4], kinds [B, P] and valid [B, P]; got "
                f"{tuple(coordinates.shape)}, {tuple(kinds.shape)} and {tuple(valid.shape)}."
            )
        if kinds.shape[1] > self.config.max_prompts:
            raise BadInputError(
                f"{kinds.shape[1]} slots are more than this encoder's {self.config.max_prompts}.", "Raise max_prompts."
            )
        if not bool(((kinds == POINT) | (kinds == BOX)).all()):
            raise BadInputError(f"A prompt is a point ({POINT}) or a box ({BOX}).")
        there = valid.long()
        coordinates = torch.where(valid[..., None], coordinates, 0.0).to(self.frequencies.dtype)
        first, second = self.places(coordinates[..., :2]), self.places(coordinates[..., 2:])
        points = self.lift(first + self.point_types(there))
        corners = self.corners.weight
        boxes = torch.cat([first + corners[0], second + corners[1]], -1) + self.box_types(there)
        return self.norm(self.project(torch.where((kinds == BOX)[..., None], boxes, points)))

    def tokens(self, prompts: Prompts) -> list[torch.Tensor]:
        """Start, prompts and end of every image, ``[P + 2, d]`` each.

        With ``drop_empty`` an image with k prompts has k + 2 tokens.
        """
        device = self.frequencies.device
        valid = prompts.valid.to(device)
        encoded = self(prompts.coordinates.to(device), prompts.kinds.to(device), valid)
        start, end = self.ends.weight
        rows = [row[there] for row, there in zip(encoded, valid, strict=True)] if self.config.drop_empty else encoded
        return [torch.cat([start[None], row, end[None]]) for row in rows]
