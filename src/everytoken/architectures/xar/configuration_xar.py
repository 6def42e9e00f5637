"""The configuration of xAR; the defaults are those of the paper's base network (arXiv 2502.20388)."""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ...core.errors import BadInputError, check_choices
from ..grid import Grid, raster_order, strided_order, window_order

ENTITIES = ("patch", "row", "cell", "subsample", "image")


@strict
class XARConfig(PreTrainedConfig):
    """Sizes of the network, and what it draws at a time.

    Args:
        entity: what is drawn at a time: one ``"patch"``, a ``"row"`` of the grid, a square ``"cell"``, every n-th token
            of every n-th row (``"subsample"``), or the whole ``"image"``.
        entity_size: patches a side of a cell, or the n of a subsample; without meaning for the others.
        grid: rows and columns of the latents.
        channels: of a latent.
        num_classes: classes to draw; one more embedding stands for no class.
        hidden_size, num_hidden_layers, num_attention_heads: of the network; heads of four or a multiple of it.
        noisy_context: entities see the noised form of those before them in training. False shows them clean ones, in
            a pass of twice as many tokens.
        clean_share: share of entities that are left clean in training with noisy context; they count in no loss.
        label_dropout: share of images that are learned without their class.
        floored_times: times are read in thousandths; False reads them as they are.
        frequencies: of the sinusoid of times.
        rope_theta: base of the two-dimensional rotary positions.
        dropout: after attention and MLP.
        latent_tokenizer, tokenizer_identity: the image tokenizer whose latents it draws, and its identity; empty
            where latents are pixels.

    Raises:
        BadInputError: settings that are out of range or contradict each other, or entities that do not tile the grid.
    """

    model_type = "xar"

    entity: str = "cell"
    entity_size: int = 8
    grid: list[int] | tuple[int, ...] = (16, 16)
    channels: int = 16
    num_classes: int = 1000
    hidden_size: int = 768
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    noisy_context: bool = True
    clean_share: float = 0.0
    label_dropout: float = 0.1
    floored_times: bool = True
    frequencies: int = 256
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    dropout: float = 0.1
    latent_tokenizer: str = ""
    tokenizer_identity: str = ""

    def __post_init__(self, **kwargs: Any) -> None:
        self.grid = list(self.grid)
        super().__post_init__(**kwargs)
        check_choices(self, entity=ENTITIES)
        sizes = ("entity_size", "channels", "num_classes", "hidden_size", "num_hidden_layers", "num_attention_heads")
        if wrong := [name for name in sizes if getattr(self, name) < 1]:
            raise BadInputError(f"{wrong[0]} is 1 or more; got {getattr(self, wrong[0])}.")
        if len(self.grid) != 2:
            raise BadInputError(f"grid is rows and columns; got {self.grid}.")
        if self.hidden_size % (4 * self.num_attention_heads):
            raise BadInputError(
                f"Heads have a multiple of 4 numbers; got {self.hidden_size} for {self.num_attention_heads} heads."
            )
        if not (0 <= self.dropout < 1 and 0 <= self.label_dropout < 1 and 0 <= self.clean_share < 1):
            raise BadInputError("dropout, label_dropout and clean_share lie from 0 to below 1.")
        if bool(self.latent_tokenizer) != bool(self.tokenizer_identity):
            raise BadInputError("latent_tokenizer and tokenizer_identity are given together.")
        self.entity_order()

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return int(self.grid[0] * self.grid[1])

    @property
    def entity_tokens(self) -> int:
        """Tokens of an entity."""
        rows, columns = self.grid
        sizes = {"patch": 1, "row": columns, "cell": self.entity_size**2, "image": rows * columns}
        return sizes[self.entity] if self.entity in sizes else rows * columns // self.entity_size**2

    @property
    def entities(self) -> int:
        """Entities of an image."""
        return self.tokens // self.entity_tokens

    def entity_order(self, device: torch.device | None = None) -> torch.Tensor:
        """The raster index ``[L]`` of every token, entity by entity.

        Raises:
            BadInputError: entities that do not tile the grid.
        """
        grid: Grid = (self.grid[0], self.grid[1])
        if self.entity == "cell":
            return window_order(*grid, self.entity_size, device)
        if self.entity == "subsample":
            if grid[0] % self.entity_size or grid[1] % self.entity_size:
                raise BadInputError(
                    f"Subsamples of every {self.entity_size}th token do not tile a grid of {grid[0]} x {grid[1]}.",
                    "Take a divisor of its sides.",
                )
            return strided_order(*grid, self.entity_size, device)
        return raster_order(*grid, device=device)
