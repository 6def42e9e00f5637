"""The shape of a Token-Shuffle network: a causal language model, a window, and which ids are image tokens."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from ...core.errors import BadInputError, check_choices
from ..grid import window_order

ACTIVATIONS = ("gelu", "none")
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}


class TokenShuffleConfig(PreTrainedConfig):
    """A backbone and the two modules around it.

    Args:
        backbone_config: of any causal language model of transformers; a dict with its ``model_type`` (a Llama without
            one), or None for a small Llama. Its vocabulary holds text and image tokens.
        window: rows and columns that are fused into one position, or one number for both.
        num_blocks: residual MLP blocks n of each module.
        block_ratio: width of a block's hidden layer over the model's.
        fuse_activation: ``"gelu"`` behind the map that shrinks the channels, or ``"none"``.
        grid: rows and columns of an image where a call does not say; their product is the number of its tokens.
        image_token_start: the first image id; None puts them behind ``boi`` and ``eoi``.
        num_image_tokens: how many codes there are.
        boi_token_id, eoi_token_id: the marks before and behind an image.
        image_codes: what the image tokens stand for (``digits.image_codes``); empty where that is not known.
        image_codes_identity: of the tokenizer that made them; another one is refused.
        z_loss: weight of the mean square of the log-partition, which keeps logits small; 0 is without.

    Raises:
        BadInputError: windows that do not tile the grid, a width that the tokens of a window do not divide, ids outside
            of the vocabulary or that overlap, or a value out of range.
    """

    model_type = "token_shuffle"
    sub_configs = {"backbone_config": AutoConfig}

    backbone_config: Any = None
    window: int | list[int] | tuple[int, int] = 2
    num_blocks: int = 2
    block_ratio: float = 2.0
    fuse_activation: str = "gelu"
    grid: list[int] | tuple[int, int] = (8, 8)
    image_token_start: int | None = None
    num_image_tokens: int = 16
    boi_token_id: int = 1
    eoi_token_id: int = 2
    pad_token_id: int | None = 0
    image_codes: str = ""
    image_codes_identity: str = ""
    z_loss: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.image_token_start is None:
            self.image_token_start = max(self.boi_token_id, self.eoi_token_id) + 1
        ids = range(self.image_token_start, self.image_token_start + self.num_image_tokens)
        given = self.backbone_config
        if given is None or isinstance(given, dict):
            settings = {"vocab_size": ids.stop, **SMALL} if given is None else dict(given)
            kind = settings.pop("model_type", "llama")
            settings.setdefault("pad_token_id", self.pad_token_id)
            made = LlamaConfig(**settings) if kind == "llama" else AutoConfig.for_model(kind, **settings)
            self.backbone_config = made
        sides = (self.window, self.window) if isinstance(self.window, int) else tuple(self.window)
        self.window, self.grid = list(sides), list(self.grid)
        super().__post_init__(**kwargs)
        check_choices(self, fuse_activation=ACTIVATIONS)
        if len(self.window) != 2 or len(self.grid) != 2 or min(self.window) < 1:
            raise BadInputError(f"window and grid are rows and columns; got {self.window} and {self.grid}.")
        window_order(self.grid[0], self.grid[1], tuple(self.window))  # type: ignore[arg-type]  # refuses bad tiles
        if self.hidden_size % self.window_tokens:
            raise BadInputError(
                f"A width of {self.hidden_size} cannot be cut into {self.window_tokens} equal parts, one for each "
                f"token of a window of {self.window[0]} x {self.window[1]}.",
                "Take a multiple of the tokens of a window.",
            )
        if self.num_blocks < 0 or self.block_ratio <= 0 or self.z_loss < 0:
            raise BadInputError(
                "num_blocks and z_loss are 0 or more, and block_ratio is positive; got "
                f"{self.num_blocks}, {self.z_loss} and {self.block_ratio}."
            )
        vocabulary = self.vocab_size
        marks = (self.boi_token_id, self.eoi_token_id)
        if self.num_image_tokens < 1 or ids.start < 0 or ids.stop > vocabulary:
            raise BadInputError(
                f"Image ids from {ids.start} to {ids.stop - 1} do not lie in a vocabulary of {vocabulary}.",
                "Give the backbone a vocabulary that holds text and image tokens.",
            )
        if len({*marks, self.pad_token_id}) < 3 or any(mark in ids or not 0 <= mark < vocabulary for mark in marks):
            raise BadInputError(f"boi and eoi are two ids of the vocabulary that are no image tokens; got {marks}.")

    @property
    def window_tokens(self) -> int:
        """Tokens of a window: s^2."""
        rows, columns = self.window  # type: ignore[misc]
        return int(rows * columns)

    @property
    def hidden_size(self) -> int:
        """The backbone's width d."""
        return int(self.backbone_config.hidden_size)

    @property
    def num_hidden_layers(self) -> int:
        """The backbone's layers."""
        return int(self.backbone_config.num_hidden_layers)

    @property
    def vocab_size(self) -> int:
        """Text and image tokens together."""
        return int(self.backbone_config.vocab_size)
