"""PlainMamba for the command line: in which order a picture is read, and which scan tells each token most."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from transformers import PreTrainedModel

from ...core.errors import BadInputError
from ...core.trace import TokenTrace
from ..base import Architecture, Inputs, Network, Observation
from ..grid import MOVES, SCANS
from .configuration_plainmamba import PlainMambaConfig
from .modeling_plainmamba import PlainMambaForImageClassification, PlainMambaModel
from .pictures import picture_of, scan_picture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("strongest scan", "place", "move", "size")
_IMAGES = "it reads images"


@dataclass
class PlainMamba(Architecture):
    """Images read by snakes.

    Args:
        scan: ``"snake"`` or ``"raster"``; None takes what the network was trained with.

    Raises:
        BadInputError: an unknown scan.
    """

    scan: str | None = None
    declares: ClassVar[Network] = Network(
        PlainMambaConfig,
        PlainMambaForImageClassification,
        COLUMNS,
        auto="AutoModelForImageClassification",
        lacks={
            "generate": "it classifies",
            "cache": "it classifies",
            "padding": "images of one size have no padding; others go into batches of their own",
            "inputs_embeds": _IMAGES,
            "sdpa": "it has no attention",
            "sft": _IMAGES,
        },
    )
    weights: ClassVar[str] = "plainmamba-shapes"
    headline: ClassVar[str] = "probability of the answer"
    example: ClassVar[str] = "a red ring"

    def __post_init__(self) -> None:
        if self.scan is not None and self.scan not in SCANS:
            raise BadInputError(f"scan is {' or '.join(SCANS)}; got {self.scan!r}.")

    @classmethod
    def tiny(cls) -> PreTrainedModel:
        config = PlainMambaConfig(
            image_size=16,
            patch_size=4,
            hidden_size=16,
            num_hidden_layers=2,
            state_size=4,
            stem_channels=8,
            conv_kernel=3,
            drop_path_rate=0.0,
            num_labels=6,
        )
        return PlainMambaForImageClassification(config).eval()

    @classmethod
    def inputs(cls, model: PreTrainedModel, batch: int = 2, length: int = 12, seed: int = 0) -> Inputs:
        config = model.config
        generator = torch.Generator().manual_seed(seed)
        shape = batch, config.num_channels, config.image_size, config.image_size
        labels = torch.randint(0, config.num_labels, (batch,), generator=generator)
        return {"pixel_values": torch.randn(*shape, generator=generator), "labels": labels}

    def arms(self) -> dict[str, Architecture]:
        return {"raster": PlainMamba("raster")} if self.scan != "raster" else {}

    def observe(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, text: str, new_tokens: int = 0
    ) -> Observation:
        config = model.config
        pixels, wanted = picture_of(text, config.image_size)
        own = config.scan
        try:
            config.scan = self.scan or own
            encoder = model.base_model
            side = config.image_size // config.patch_size
            scans = encoder.scans((side, side))
            with scans_of(encoder) as strength:
                logits = model(pixels.to(model.device)).logits[0].detach().float()
        finally:
            config.scan = own
        chances = logits.softmax(-1)
        best = int(chances.argmax())
        answer = config.id2label[best]
        sizes = torch.stack(strength)[:, 0].mean(0)  # [K, L], over layers
        trace = TokenTrace(
            list(range(side * side)),
            texts=["▪▪" + "\n" * (number % side == side - 1) for number in range(side * side)],
            title=f"{text}: {answer}",
            station="architectures",
        )
        trace.add("strongest scan", [f"scan {config.scans[int(k)] + 1}" for k in sizes.argmax(0)])
        trace.add("place", scans.inverses[0])
        assert scans.moves is not None
        trace.add("move", [MOVES[int(move)] for move in scans.moves[0, scans.inverses[0]]])
        trace.add("size", sizes.sum(0))
        figures = {"probability of the answer": float(chances[best])}
        if wanted is not None and wanted in config.label2id:
            figures["right"] = float(answer == wanted)
        return Observation([trace], figures, answer, [scan_picture(scans, (side, side), config.scans)])


@contextlib.contextmanager
def scans_of(encoder: PlainMambaModel) -> Iterator[list[torch.Tensor]]:
    """Collects how much every scan gives to every token: a norm ``[B, K, L]`` a layer, in the order of the layers."""
    found: list[torch.Tensor] = []

    def look(module: torch.nn.Module, arguments: tuple[object, ...]) -> None:
        with torch.no_grad():
            found.append(module.scan_each(*arguments).float().norm(dim=-1))  # type: ignore[operator]

    hooks = [layer.mixer.ssm.register_forward_pre_hook(look) for layer in encoder.layers]  # type: ignore[union-attr]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
