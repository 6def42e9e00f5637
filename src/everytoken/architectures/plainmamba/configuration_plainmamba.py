"""The configuration of PlainMamba; the defaults are those of the paper's L1 (arXiv 2403.17695)."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ...core.errors import BadInputError, check_choices
from ..grid import SCANS


@strict
class PlainMambaConfig(PreTrainedConfig):
    """Sizes of the network, and how its scans read the grid.

    Args:
        image_size: pixels a side for which positions are made; other sizes resize them.
        num_channels: of the image.
        patch_size: pixels a side of a token, even: the stem halves the image first.
        hidden_size, num_hidden_layers: d and the number of layers.
        state_size, expand, conv_kernel: n, E / d, and the side of the convolution before the scans.
        time_step_rank: R; ``"auto"`` is ``d / 16``, rounded up.
        stem_channels, num_stem_convs: of the stem's convolutions, and how many follow the first.
        dwconv_layers: layers whose output passes a convolution of its own (layer 0 in L1, none in L2 and L3).
        scan: ``"snake"`` turns at the end of a line, ``"raster"`` begins anew.
        scans: which of the four scans run: rows, rows backwards, columns, columns backwards.
        direction_aware: tell the scan by which move it reached a token.
        permute_parameters: steps, B and C follow their tokens. False is the released code, for its weights.
        double_dt_bias: add the bias of the steps twice, as the released code does.
        drop_path_rate: of the last layer; it grows linearly from zero.
        hidden_dropout_prob: after the positions.

    Raises:
        BadInputError: settings that are out of range or contradict each other.
    """

    model_type = "plainmamba"

    image_size: int = 224
    num_channels: int = 3
    patch_size: int = 16
    hidden_size: int = 192
    num_hidden_layers: int = 24
    state_size: int = 16
    expand: int = 2
    conv_kernel: int = 7
    time_step_rank: str | int = "auto"
    stem_channels: int = 64
    num_stem_convs: int = 1
    dwconv_layers: list[int] | tuple[int, ...] = (0,)
    scan: str = "snake"
    scans: list[int] | tuple[int, ...] = (0, 1, 2, 3)
    direction_aware: bool = True
    permute_parameters: bool = True
    double_dt_bias: bool = False
    drop_path_rate: float = 0.2
    hidden_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.intermediate_size = self.expand * self.hidden_size
        if self.time_step_rank == "auto":
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        self.dwconv_layers, self.scans = list(self.dwconv_layers), list(self.scans)
        super().__post_init__(**kwargs)
        check_choices(self, scan=SCANS)
        sizes = ("num_channels", "hidden_size", "num_hidden_layers", "state_size", "expand", "stem_channels")
        if wrong := [name for name in sizes if getattr(self, name) < 1]:
            raise BadInputError(f"{wrong[0]} is 1 or more; got {getattr(self, wrong[0])}.")
        if self.patch_size < 2 or self.patch_size % 2 or self.image_size < 1 or self.image_size % self.patch_size:
            raise BadInputError(
                f"Patches are even and tile the image; got {self.patch_size} pixels of {self.image_size}.",
                "The stem halves the image before it is cut.",
            )
        if self.conv_kernel < 1 or self.conv_kernel % 2 == 0:
            raise BadInputError(f"conv_kernel is odd; got {self.conv_kernel}.")
        if not self.scans or len(set(self.scans)) < len(self.scans) or not set(self.scans) <= set(range(4)):
            raise BadInputError(f"scans are some of 0, 1, 2 and 3, each once; got {self.scans}.")
        if not set(self.dwconv_layers) <= set(range(self.num_hidden_layers)):
            raise BadInputError(
                f"dwconv_layers name layers from 0 to {self.num_hidden_layers - 1}; got {self.dwconv_layers}."
            )
        if not (0 <= self.drop_path_rate < 1 and 0 <= self.hidden_dropout_prob < 1):
            raise BadInputError("drop_path_rate and hidden_dropout_prob lie from 0 to below 1.")
