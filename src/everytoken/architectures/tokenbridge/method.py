"""TokenBridge for the command line: a picture that grows token by token, and how sure each channel was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from ...core.errors import BadInputError
from ...core.trace import TokenTrace
from ..base import Architecture, Inputs, Network
from ..images.drawing import NO_TEXT, Drawing, ImageMethod
from ..images.guidance import check_guidance
from .configuration_tokenbridge import TokenBridgeConfig
from .latents import load_kl, unflat
from .modeling_tokenbridge import TokenBridgeModel, TokenBridgeSample


@dataclass
class TokenBridge(ImageMethod):
    """Draws digits from latents that are cut into bins and spelt channel by channel.

    Args:
        steps: iterations; None takes one a token, and 64 at most.
        guidance: strength of the class; 1 is none.
        temperature: 0 takes the likeliest bin of every channel.

    Raises:
        BadInputError: a value out of range.
    """

    steps: int | None = None
    guidance: float = 3.0
    temperature: float = 1.0
    declares: ClassVar[Network] = Network(
        TokenBridgeConfig, TokenBridgeModel, columns=("step", "entropy", "channels"), auto="AutoModel", lacks=NO_TEXT
    )
    weights: ClassVar[str] = "tokenbridge-digits"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and self.steps < 1:
            raise BadInputError(f"steps is 1 or more; got {self.steps}.")
        if not 0 <= self.temperature < float("inf"):
            raise BadInputError(f"A temperature is 0 or more; got {self.temperature}.")
        check_guidance("linear", self.guidance)

    @classmethod
    def tiny(cls) -> PreTrainedModel:
        return TokenBridgeModel(tiny_config()).eval()

    @classmethod
    def inputs(cls, model: PreTrainedModel, batch: int = 2, length: int = 12, seed: int = 0) -> Inputs:
        config = model.config
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(batch, config.positions, generator=generator).argsort(1)
        return {
            "latents": torch.randn(batch, config.positions, config.channels, generator=generator),
            "class_labels": torch.randint(0, config.num_classes, (batch,), generator=generator),
            "known": order[:, : config.positions // 3],
        }

    def arms(self) -> dict[str, Architecture]:
        if self.guidance == 1:
            return {}
        return {"no guidance": TokenBridge(self.label, self.count, self.seed, None, self.steps, 1.0, self.temperature)}

    def draw(self, model: PreTrainedModel, labels: torch.Tensor, seed: int) -> Drawing:
        assert isinstance(model, TokenBridgeModel)
        config = model.config
        drawn = model.generate(labels, self.steps, self.guidance, temperature=self.temperature, seed=seed)
        count = len(drawn.masked)
        shown = drawn.revealed[0] <= torch.arange(count, device=model.device)[:, None]  # [S, n]
        images = images_of(config, torch.cat([drawn.latents, drawn.latents[:1] * shown[..., None]]))
        steps = [f"{config.positions - left} of {config.positions} tokens" for left in drawn.masked]
        figures = {"iterations": float(count)}
        if drawn.entropies is not None:
            figures["entropy of a token, nats"] = float(drawn.entropies.sum(-1).mean())
        trace = trace_of(drawn, config, f"class {int(labels[0])}")
        return Drawing(images[: len(labels)], list(images[len(labels) :]), steps, trace, figures)


def images_of(config: TokenBridgeConfig, latents: torch.Tensor) -> torch.Tensor:
    """Images ``[B, channels, height, width]`` of latents ``[B, n, C]``, by the autoencoder that the network knows.

    A network without one shows the first channel of its latents.

    Raises:
        TokenizerMismatchError: the autoencoder of this name has other weights by now.
    """
    grid = unflat(latents, (config.rows, config.columns))
    if not config.tokenizer:
        return grid[:, :1].clamp(-1, 1)
    return load_kl(config.tokenizer).decode(grid.cpu(), made_by=config.tokenizer_identity)


def trace_of(drawn: TokenBridgeSample, config: TokenBridgeConfig, title: str) -> TokenTrace:
    """One token a position: when it was predicted, and how much was open, in all and channel by channel (in nats)."""
    count = config.positions
    texts = ["▪▪" + "\n" * (number % config.columns == config.columns - 1) for number in range(count)]
    trace = TokenTrace(list(range(count)), texts=texts, title=title, station="architectures")
    trace.add("step", drawn.revealed[0])
    if drawn.entropies is None:
        return trace.add("entropy", [None] * count).add("channels", [None] * count)
    trace.add("entropy", drawn.entropies[0].sum(-1))
    return trace.add("channels", [" ".join(f"{nats:.1f}" for nats in row) for row in drawn.entropies[0].tolist()])


def tiny_config(**settings: object) -> TokenBridgeConfig:
    """A network of a few thousand weights without an autoencoder."""
    shape: dict[str, object] = {
        "rows": 3, "columns": 3, "channels": 2, "bins": 8, "num_classes": 8, "num_class_tokens": 2,
        "latent_scale": 1.0, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
        "num_hidden_layers": 1, "num_decoder_layers": 1, "head_width": 16, "head_layers": 1, "head_heads": 2,
        "channel_order": [1, 0], "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "label_dropout": 0.0, "initializer_range": 0.2,
    }  # fmt: skip
    return TokenBridgeConfig(**(shape | settings))  # type: ignore[arg-type]
