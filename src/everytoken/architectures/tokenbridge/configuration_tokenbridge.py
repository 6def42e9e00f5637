"""The configuration of TokenBridge; the defaults are those of the paper's L on ImageNet (arXiv 2503.16430)."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ...core.errors import BadInputError, check_choices
from ..grid import check_grid
from .head import check_order
from .quantizer import PostTrainingQuantizer

HEADS = ("channels", "independent", "continuous")
RELEASED_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)
"""The order of the 16 channels of the paper's autoencoder, by spectral energy."""


@strict
class TokenBridgeConfig(PreTrainedConfig):
    """Sizes of the network, its latents and its head.

    Args:
        rows, columns: the grid of latents; its tokens are n = rows x columns.
        channels: C, numbers of a token.
        bins, value_range, normal_range, latent_scale: of the quantiser (``quantizer.PostTrainingQuantizer``).
        tokenizer, tokenizer_identity: name or folder of the autoencoder whose latents these are, and the hash of its
            weights; latents of another are refused. Empty where it is not known.
        num_classes: what can be asked for; one more vector stands for no class.
        num_class_tokens: how many copies of the class vector the encoder reads.
        hidden_size, intermediate_size, num_attention_heads: of encoder and decoder.
        num_hidden_layers, num_decoder_layers: of the encoder, and of the decoder.
        head: ``"channels"`` spells a token channel by channel, ``"independent"`` predicts all channels from the vector
            alone, ``"continuous"`` makes latents by a flow without any bins.
        head_width, head_layers, head_heads: of the head.
        channel_order: in which channels are spelt; None takes them as they lie.
        released_first_input: as for ``head.ChannelARHead``.
        flow_steps: Euler steps of the continuous head.
        least_masked: the smallest share of positions that is masked while learning.
        label_dropout: how often the class is left out while learning.

    Raises:
        BadInputError: settings that are out of range or contradict each other.
    """

    model_type = "tokenbridge"

    rows: int = 16
    columns: int = 16
    channels: int = 16
    bins: int = 64
    value_range: float = 5.0
    normal_range: float = 3.0
    latent_scale: float = 0.2325
    tokenizer: str = ""
    tokenizer_identity: str = ""
    num_classes: int = 1000
    num_class_tokens: int = 64
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_attention_heads: int = 16
    num_hidden_layers: int = 16
    num_decoder_layers: int = 16
    head: str = "channels"
    head_width: int = 1024
    head_layers: int = 4
    head_heads: int = 8
    channel_order: list[int] | tuple[int, ...] | None = RELEASED_ORDER
    released_first_input: bool = False
    flow_steps: int = 25
    least_masked: float = 0.7
    label_dropout: float = 0.1
    hidden_act: str = "gelu"
    qkv_bias: bool = True
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_choices(self, head=HEADS)
        check_grid(self.rows, self.columns)
        sizes = ["channels", "num_classes", "num_class_tokens", "hidden_size", "intermediate_size", "head_width"]
        sizes += ["num_attention_heads", "num_hidden_layers", "num_decoder_layers", "head_layers", "head_heads"]
        if wrong := [name for name in (*sizes, "flow_steps") if getattr(self, name) < 1]:
            raise BadInputError(f"{wrong[0]} is 1 or more; got {getattr(self, wrong[0])}.")
        if self.hidden_size % self.num_attention_heads or self.head_width % self.head_heads:
            raise BadInputError("Attention heads divide hidden_size, and head_heads divide head_width.")
        if not (0 <= self.least_masked < 1 and 0 <= self.label_dropout < 1):
            raise BadInputError("least_masked and label_dropout are shares from 0 to below 1.")
        self.channel_order = check_order(self.channel_order, self.channels)
        self.quantizer()

    def quantizer(self) -> PostTrainingQuantizer:
        """The bins; raises BadInputError for those that cannot be."""
        return PostTrainingQuantizer(self.bins, self.value_range, self.normal_range, self.latent_scale)

    @property
    def positions(self) -> int:
        """n, tokens of an image."""
        return self.rows * self.columns
