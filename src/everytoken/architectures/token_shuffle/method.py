"""Token-Shuffle for the command line: a digit that a text asks for, drawn window by window."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import PreTrainedModel

from ...core.errors import BadInputError
from ...core.rng import derive_seed
from ...core.trace import TokenTrace
from ..base import Architecture, Inputs, Network, Observation
from ..images.drawing import Drawing, ImageMethod
from .configuration_token_shuffle import TokenShuffleConfig
from .digits import (
    FIRST_STROKE,
    FIRST_WORD,
    LEVELS,
    STROKES,
    TEXT,
    LevelCodes,
    codes_of,
    strokes_of,
    text_ids,
    text_tokenizer,
    words_for,
)  # fmt: skip
from .modeling_token_shuffle import TokenShuffleForConditionalGeneration
from .sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("window", "logp", "guidance")


@dataclass
class TokenShuffleMethod(ImageMethod):
    """Draws digits by windows of image tokens: those of a text ("seven, thick"), or of a label.

    Args:
        stroke: ``thin``, ``medium``, ``thick``, or None for any.
        guidance: the full scale w; 1 is no guidance.
        schedule: of the scale over the windows: ``half-linear``, ``linear`` or ``constant``.
        temperature, top_k, top_p: of each token.

    Raises:
        BadInputError: a value out of range; and what ``ImageMethod`` refuses.
    """

    stroke: str | None = None
    guidance: float = 2.0
    schedule: str = "half-linear"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    declares: ClassVar[Network] = Network(
        TokenShuffleConfig,
        TokenShuffleForConditionalGeneration,
        COLUMNS,
        lacks={
            "generate": "a step draws a whole window: its own generate draws images",
            "cache": "a step draws a whole window: its own generate has a cache of windows",
            "inputs_embeds": "images are found by their ids",
            "sft": "TRL's SFTTrainer has no images of ids; transformers' Trainer trains it",
            "compile": "how many positions the backbone reads depends on where images stand",
        },
    )
    weights: ClassVar[str] = "token-shuffle-digits"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stroke is not None and self.stroke not in STROKES:
            raise BadInputError(f"stroke is {', '.join(STROKES)} or none; got {self.stroke!r}.")
        Sampling(**self.sampling())

    def sampling(self) -> dict[str, Any]:
        """What these settings say of the choice of tokens, as ``generate`` takes it."""
        names = ("guidance", "schedule", "temperature", "top_k", "top_p")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def tiny(cls) -> PreTrainedModel:
        codes = LevelCodes()
        backbone = {
            "vocab_size": len(TEXT) + LEVELS,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 96,
            "initializer_range": 0.2,
        }
        config = TokenShuffleConfig(
            backbone_config=backbone,
            num_blocks=1,
            grid=codes.grid,
            num_image_tokens=codes.count,
            image_token_start=len(TEXT),
            image_codes=codes.name,
            image_codes_identity=codes.identity,
        )
        return TokenShuffleForConditionalGeneration(config).eval()

    @classmethod
    def tiny_tokenizer(cls) -> PreTrainedTokenizerBase | None:
        return text_tokenizer()

    @classmethod
    def inputs(cls, model: PreTrainedModel, batch: int = 2, length: int = 12, seed: int = 0) -> Inputs:
        """Rows of two words, an image, and two words behind it; ``length`` follows from the grid."""
        config, generator = model.config, torch.Generator().manual_seed(seed)
        first, size = config.image_token_start, config.grid[0] * config.grid[1]
        words = torch.stack([torch.randperm(first - 4, generator=generator)[:4] + 4 for _ in range(batch)])
        image = torch.randint(first, first + config.num_image_tokens, (batch, size), generator=generator)
        marks = torch.tensor([config.boi_token_id, config.eoi_token_id]).expand(batch, 2)
        ids = torch.cat([words[:, :2], marks[:, :1], image, marks[:, 1:], words[:, 2:]], 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    def arms(self) -> dict[str, Architecture]:
        return {"no guidance": replace(self, guidance=1.0, picture=None)} if self.guidance != 1 else {}

    def observe(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, text: str, new_tokens: int = 0
    ) -> Observation:
        """Images of a text, or of the settings' label where there is none; with the window, log-probability and
        guidance of each token of the first image.
        """
        if text.strip():
            label, stroke = self.asked_for(text)
            return replace(self, label=label, stroke=stroke).observe(model, tokenizer, "", new_tokens)
        return super().observe(model, tokenizer, text, new_tokens)

    def asked_for(self, text: str) -> tuple[int, str | None]:
        """The digit and the stroke of a text.

        Raises:
            BadInputError: a word that the network does not know, another number of digits than one, more than one
                stroke, or a stroke in the settings too.
        """
        ids = text_ids(text_tokenizer(), [text])[0][0].tolist()
        digits = [item - FIRST_WORD for item in ids if item < FIRST_STROKE]
        strokes = [STROKES[item - FIRST_STROKE] for item in ids if item >= FIRST_STROKE]
        if len(digits) != 1 or len(strokes) > 1 or ids[0] >= FIRST_STROKE:
            raise BadInputError(
                f"{text!r} asks for no single digit.", "Name a digit, then perhaps a stroke: 'seven, thick'."
            )
        if self.stroke is not None:
            raise BadInputError("A stroke comes from the text or from the settings, not from both.")
        return digits[0], strokes[0] if strokes else None

    def draw(self, model: PreTrainedModel, labels: torch.Tensor, seed: int) -> Drawing:
        codes = codes_of(model.config)
        strokes = None if self.stroke is None else torch.full_like(labels, STROKES.index(self.stroke))
        texts = words_for(labels, strokes)
        ids, mask = (item.to(model.device) for item in text_ids(text_tokenizer(), texts))
        seeds = [derive_seed(seed, "image", number) for number in range(len(labels))]
        found = model.generate(ids, mask, seeds=seeds, **self.sampling())
        images = codes.decode(found.codes.cpu())
        flat, columns = found.codes[0].flatten().tolist(), found.window.shape[1]
        trace = TokenTrace(
            [code + model.config.image_token_start for code in flat],
            texts=["▪▪" + "\n" * (number % columns == columns - 1) for number in range(len(flat))],
            title=f"{texts[0]}, by windows of {' x '.join(map(str, model.config.window))}",
            station="architectures",
        )
        window = found.window.flatten().tolist()
        trace.add("window", window)
        trace.add("logp", found.logps[0].flatten())
        trace.add("guidance", [found.guidance[number] for number in window])
        figures = {
            "nats per token": -float(found.logps.mean()),
            "windows": float(len(found.guidance)),
            "positions in the cache": float(found.positions),
        }
        if strokes is not None:
            figures["right strokes"] = float((strokes_of(images, labels) == strokes).float().mean())
        frames = list(codes.decode(found.grown(codes.blank)[0].cpu()))
        steps = [f"window {number + 1}" for number in range(len(frames))]
        return Drawing(images, frames, steps, trace, figures)
