"""PlainMamba: one width, one resolution, identical layers, no class token (arXiv 2403.17695).

The tokens of an image are scanned by snakes in four directions, so that consecutive tokens are always neighbours, and
the state's input is told by which move m (right, left, up, down, or none at the beginning) a token was reached::

    h_t = exp(delta A) h_(t-1) + delta (B_t + Theta[m_t]) u_t          y_t = <C_t, h_t> + D u_t

Theta ``[5, n]`` is shared by the four scans of a layer. A layer is: norm, projection to x and a gate z, a depthwise
convolution of the map, the four scans, whose sum is gated and projected back, and a residual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from ...core.errors import BadInputError
from ..base import OwnWeights, register
from ..grid import MOVES, Grid, scan_orders
from ..selective import Scans, SelectiveSSM
from .configuration_plainmamba import PlainMambaConfig


class PlainMambaEmbeddings(nn.Module):
    """The stem, the cut into tokens, and learned positions: ``[B, channels, height, width] -> [B, L, d]``."""

    def __init__(self, config: PlainMambaConfig):
        super().__init__()
        self.patch_size, self.side = config.patch_size, config.image_size // config.patch_size
        width = config.stem_channels
        layers: list[nn.Module] = [nn.Conv2d(config.num_channels, width, 7, stride=2, padding=3, bias=False)]
        for number in range(config.num_stem_convs + 1):
            if number:
                layers.append(nn.Conv2d(width, width, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
        self.stem = nn.Sequential(*layers)
        half = config.patch_size // 2
        self.projection = nn.Conv2d(width, config.hidden_size, half, stride=half)
        self.position_embeddings = nn.Parameter(torch.empty(1, self.side**2, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def positions(self, grid: Grid) -> torch.Tensor:
        """The positions ``[1, L, d]`` for a grid, resized where it is another than that of the configuration."""
        if grid == (self.side, self.side):
            return self.position_embeddings
        table = self.position_embeddings.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        resized = F.interpolate(table.float(), size=grid, mode="bicubic", align_corners=False)
        return resized.flatten(2).transpose(1, 2).to(table.dtype)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, Grid]:
        features = self.projection(self.stem(pixel_values.to(self.projection.weight.dtype)))
        grid = (features.shape[2], features.shape[3])
        return self.dropout(features.flatten(2).transpose(1, 2) + self.positions(grid)), grid


class PlainMambaMixer(nn.Module):
    """Convolution, scans and gate: ``[B, L, d] -> [B, L, d]``."""

    def __init__(self, config: PlainMambaConfig):
        super().__init__()
        channels, kernel = config.intermediate_size, config.conv_kernel
        self.config = config
        self.in_proj = nn.Linear(config.hidden_size, 2 * channels)
        self.conv2d = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.ssm = SelectiveSSM(channels, config.state_size, int(config.time_step_rank))
        self.direction = (
            nn.Parameter(torch.empty(len(MOVES), config.state_size)) if config.direction_aware else None
        )  # Theta
        self.out_proj = nn.Linear(channels, config.hidden_size)

    def forward(self, hidden: torch.Tensor, grid: Grid, scans: Scans) -> torch.Tensor:
        x, gate = self.in_proj(hidden).chunk(2, -1)
        x = F.silu(self.conv2d(x.transpose(1, 2).unflatten(2, grid))).flatten(2).transpose(1, 2)
        y = self.ssm(x, scans, self.direction, self.config.permute_parameters, self.config.double_dt_bias)
        return self.out_proj(y * F.silu(gate))


class PlainMambaLayer(GradientCheckpointingLayer):
    """A mixer with its norm and residual, and in some layers a convolution that replaces the map."""

    def __init__(self, config: PlainMambaConfig, number: int):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = PlainMambaMixer(config)
        self.drop_path = config.drop_path_rate * number / max(1, config.num_hidden_layers - 1)
        self.dwconv: nn.Module | None = None
        if number in config.dwconv_layers:
            width = config.hidden_size
            self.dwconv = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.BatchNorm2d(width), nn.GELU()
            )

    def forward(self, hidden: torch.Tensor, grid: Grid, scans: Scans) -> torch.Tensor:
        mixed = self.mixer(self.norm(hidden), grid, scans)
        if self.training and self.drop_path:
            kept = torch.rand(len(mixed), 1, 1, device=mixed.device) >= self.drop_path
            mixed = mixed * (kept / (1 - self.drop_path)).to(mixed.dtype)
        hidden = hidden + mixed
        if self.dwconv is not None:
            hidden = self.dwconv(hidden.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        return hidden


class PlainMambaPreTrainedModel(OwnWeights, PreTrainedModel):
    """What both models share: how weights begin, and which of them stay in float32."""

    config_class = PlainMambaConfig
    config: PlainMambaConfig
    base_model_prefix = "plainmamba"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["PlainMambaLayer"]
    _keep_in_fp32_modules_strict = ["A_log", "D"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        deviation = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=deviation)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, SelectiveSSM):  # after its linear layers, whose start it changes
            module.init_weights()
        elif isinstance(module, PlainMambaMixer):
            if module.direction is not None:
                init.trunc_normal_(module.direction, std=deviation)
        elif isinstance(module, PlainMambaEmbeddings):
            init.trunc_normal_(module.position_embeddings, std=deviation)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class PlainMambaModel(PlainMambaPreTrainedModel):
    """The encoder: features of every token in raster order, and their mean."""

    def __init__(self, config: PlainMambaConfig):
        super().__init__(config)
        self.embeddings = PlainMambaEmbeddings(config)
        self.layers = nn.ModuleList(PlainMambaLayer(config, number) for number in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.projection

    def scans(self, grid: Grid, device: torch.device | None = None) -> Scans:
        """The orders in which the layers read a grid."""
        found = scan_orders(*grid, self.config.scan, device)
        return Scans(*(item[list(self.config.scans)] for item in found))

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Reads images of one size.

        Args:
            pixel_values: ``[B, channels, height, width]``, both sides multiples of the patch size.
            output_hidden_states: also return what entered every layer; the last one is ``last_hidden_state``.

        Returns:
            ``last_hidden_state [B, L, d]``, ``pooler_output [B, d]`` and perhaps ``hidden_states``.

        Raises:
            BadInputError: images of another shape, or that patches do not tile.
        """
        check_images(pixel_values, self.config)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden, grid = self.embeddings(pixel_values)
        scans = self.scans(grid, hidden.device)
        seen = []
        for layer in self.layers:
            if wanted:
                seen.append(hidden)
            hidden = layer(hidden, grid, scans)
        hidden = self.layernorm(hidden)
        output = BaseModelOutputWithPooling(
            last_hidden_state=hidden,
            pooler_output=hidden.mean(1),
            hidden_states=(*seen, hidden) if wanted else None,
        )
        plain = self.config.return_dict if return_dict is None else return_dict
        return output if plain else output.to_tuple()


class PlainMambaForImageClassification(PlainMambaPreTrainedModel):
    """The encoder and a linear layer on the mean of its tokens."""

    def __init__(self, config: PlainMambaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.plainmamba = PlainMambaModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Logits ``[B, num_labels]``, and the loss where ``labels [B]`` are given; raises as the encoder does."""
        outputs = self.plainmamba(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        found = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
        plain = self.config.return_dict if return_dict is None else return_dict
        return found if plain else found.to_tuple()


def check_images(pixel_values: torch.Tensor, config: PlainMambaConfig) -> None:
    """Raises BadInputError for images that the network cannot cut into tokens."""
    patch, channels = config.patch_size, config.num_channels
    if pixel_values.dim() != 4 or pixel_values.shape[1] != channels or not pixel_values.is_floating_point():
        raise BadInputError(
            f"Images are floats of shape [B, {channels}, height, width]; got {pixel_values.dtype} "
            f"{[*pixel_values.shape]}."
        )
    rows, height, width = pixel_values.shape[0], pixel_values.shape[2], pixel_values.shape[3]
    if not rows or min(height, width) < patch or height % patch or width % patch:
        raise BadInputError(
            f"Patches of {patch} pixels do not tile {rows} images of {height} x {width}.",
            "Resize them. Images of different sizes go into batches of their own: padding would be scanned.",
        )


register(PlainMambaConfig, PlainMambaModel, "AutoModel")
register(PlainMambaConfig, PlainMambaForImageClassification, "AutoModelForImageClassification")
