"""xAR for the command line: a digit that grows entity by entity."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from transformers import PreTrainedModel

from ...core.trace import TokenTrace
from ..base import Architecture, Inputs, Network
from ..images.drawing import NO_TEXT, Drawing, ImageMethod
from ..images.guidance import check_guidance, guidance_scale
from ..images.tokenizers import load_image_tokenizer
from .configuration_xar import XARConfig
from .modeling_xar import XARModel
from .sampling import check_sampling

COLUMNS = ("entity", "guidance", "value", "settled after step")
SETTLED = 0.1
"""A value has settled when it stays as near to its end."""


@dataclass
class XAR(ImageMethod):
    """Images drawn entity by entity.

    Args:
        label, count, seed, picture: see ``ImageMethod``.
        steps: calls of the network for an entity.
        guidance: how far the class pulls the last entity; 1 is no guidance.
        sampler: ``"sde"`` or ``"ode"``.

    Raises:
        BadInputError: a value out of range, or an unknown sampler.
    """

    steps: int = 25
    guidance: float = 2.7
    sampler: str = "sde"
    declares: ClassVar[Network] = Network(XARConfig, XARModel, COLUMNS, auto="AutoModel", lacks=NO_TEXT)
    weights: ClassVar[str] = "xar-digits"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sampling(self.sampler, self.steps)
        check_guidance("linear", self.guidance)

    @classmethod
    def tiny(cls) -> PreTrainedModel:
        config = XARConfig(
            grid=(4, 4), channels=1, entity_size=2, num_classes=10, hidden_size=16, num_hidden_layers=2,
            num_attention_heads=2, frequencies=16, dropout=0.0,
        )  # fmt: skip
        return XARModel(config).eval()

    @classmethod
    def inputs(cls, model: PreTrainedModel, batch: int = 2, length: int = 12, seed: int = 0) -> Inputs:
        config, generator = model.config, torch.Generator().manual_seed(seed)
        shape = batch, config.channels, *config.grid
        return {
            "latents": torch.randn(shape, generator=generator),
            "class_labels": torch.randint(0, config.num_classes, (batch,), generator=generator),
            "times": torch.rand(batch, config.entities, generator=generator),
            "noise": torch.randn(shape, generator=generator),
        }

    def arms(self) -> dict[str, Architecture]:
        return {"without guidance": dataclasses.replace(self, guidance=1.0, picture=None)} if self.guidance != 1 else {}

    def draw(self, model: PreTrainedModel, labels: torch.Tensor, seed: int) -> Drawing:
        network = cast(XARModel, model)
        config = network.config
        seen: list[torch.Tensor] = []
        words: list[str] = []

        def progress(entity: int, step: int, latents: torch.Tensor) -> None:
            seen.append(latents[0].clone())
            words.append(f"{config.entity} {entity + 1}, step {step + 1}")

        began = time.perf_counter()
        latents = network.generate(labels, self.steps, self.guidance, self.sampler, seed, progress=progress)
        seconds = time.perf_counter() - began
        n, order = config.entities, config.entity_order()
        number = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)) // config.entity_tokens)
        values = torch.stack(seen).float().mean(1).flatten(1).cpu()  # [N S, L], over channels
        trace = TokenTrace(
            list(range(config.tokens)),
            texts=["▪▪" + "\n" * (place % config.grid[1] == config.grid[1] - 1) for place in range(config.tokens)],
            title=f"{int(labels[0])}, {n} x {config.entity}, {self.steps} steps",
            station="architectures",
        )
        trace.add("entity", number + 1)
        scales = [guidance_scale("linear", self.guidance, k / (n - 1) if n > 1 else 1.0) for k in range(n)]
        trace.add("guidance", torch.tensor(scales)[number])
        trace.add("value", values[-1])
        own = values.view(n, self.steps, -1)[number, :, torch.arange(config.tokens)]  # [L, S], of its own entity
        away = (own - own[:, -1:]).abs() > SETTLED
        last = torch.where(away, torch.arange(1, self.steps + 1), 0).amax(1)
        trace.add("settled after step", last + 1)
        figures = {"milliseconds per image": 1e3 * seconds / len(labels), "calls of the network": float(n * self.steps)}
        return Drawing(images_of(network, latents), list(images_of(network, torch.stack(seen))), words, trace, figures)


def images_of(model: XARModel, latents: torch.Tensor) -> torch.Tensor:
    """Images of latents: by the tokenizer that the network was trained with, or the latents where they are pixels.

    Raises:
        TokenizerMismatchError: that tokenizer is another one by now.
    """
    if not model.config.latent_tokenizer:
        return latents.float().clamp(-1, 1)
    tokenizer = load_image_tokenizer(model.config.latent_tokenizer)
    return tokenizer.decode(latents.float().cpu(), made_by=model.config.tokenizer_identity)
