"""TokenBridge for the command line: a picture that grows token by token, and how sure each channel was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from transformers import PreTrainedModel

from ...core.errors import BadInputError
from ...core.trace import TokenTrace
from ..base import Architecture, Inputs, Network, Observation
from ..images.guidance import check_guidance
from ..images.metrics import features_of
from .configuration_tokenbridge import TokenBridgeConfig
from .latents import load_kl, unflat
from .modeling_tokenbridge import TokenBridgeModel, TokenBridgeSample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_IMAGES = "it reads latents of images"


@dataclass
class TokenBridge(Architecture):
    """Draws pictures of a class.

    Args:
        label: which class; None takes the one that the prompt names.
        steps: iterations; None takes one a token, and 64 at most.
        guidance: strength of the class; 1 is none.
        temperature: 0 takes the likeliest bin of every channel.

    Raises:
        BadInputError: a value out of range.
    """

    label: int | None = None
    steps: int | None = None
    guidance: float = 2.0
    temperature: float = 1.0
    declares: ClassVar[Network] = Network(
        TokenBridgeConfig,
        TokenBridgeModel,
        columns=("step", "entropy", "channels"),
        auto="AutoModel",
        lacks={
            "generate": "it draws latents by its own generate",
            "cache": "its encoder reads all known positions anew; the cache of its head has a test of its own",
            "padding": "the grids of its images are all of one size",
            "inputs_embeds": _IMAGES,
            "sft": _IMAGES,
        },
    )
    weights: ClassVar[str] = "tokenbridge-digits"
    headline: ClassVar[str] = "nats a token"
    example: ClassVar[str] = "7"

    def __post_init__(self) -> None:
        if self.label is not None and self.label < 0:
            raise BadInputError(f"A label is 0 or more; got {self.label}.")
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
        return {"no guidance": TokenBridge(self.label, self.steps, 1.0, self.temperature)} if self.guidance != 1 else {}

    def observe(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, text: str, new_tokens: int = 0
    ) -> Observation:
        """Draws one picture, by a seed from torch's generator.

        Raises:
            BadInputError: a prompt that is no label, or a label that the network does not know.
        """
        assert isinstance(model, TokenBridgeModel)
        config = model.config
        if self.label is None and not text.strip().isdecimal():
            raise BadInputError(f"{text!r} is no label.", f"Give a number from 0 to {config.num_classes - 1}.")
        label = int(text) if self.label is None else self.label
        seed = int(torch.randint(2**31, ()))
        drawn = model.generate([label], self.steps, self.guidance, temperature=self.temperature, seed=seed)
        trace = trace_of(drawn, config, f"class {label}")
        figures: dict[str, float] = {"iterations": float(len(drawn.masked))}
        if drawn.entropies is not None:
            figures = {"nats a token": float(drawn.entropies.sum(-1).mean())} | figures
        return Observation([trace], figures)


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
