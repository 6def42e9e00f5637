"""HAT as a method: the words that it finds, how it spells them, and how it learns to (arXiv 2501.10322)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from ...core.charts import inline_image, lines_svg
from ...core.errors import BadInputError
from ...core.rng import numpy_generator
from ...core.trace import TokenTrace
from ..base import Architecture, Inputs, Network, Observation
from ..training import Curves, Recipe, StepFigures
from .configuration_hat import PADDING, WORD_END, HATConfig
from .modeling_hat import HATForCausalLM, WordLayout
from .tokenization_hat import HATTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LN2 = math.log(2)


def noisy(text: str, share: float, generator: np.random.Generator) -> str:
    """A text with a share of its characters dropped, swapped with the next one or recased, a third each."""
    characters, places = list(text), np.flatnonzero(generator.random(len(text)) < share)
    for place, kind in zip(places.tolist(), generator.integers(0, 3, len(places)).tolist(), strict=True):
        if kind == 0:
            characters[place] = ""
        elif kind == 1 and place + 1 < len(characters):
            characters[place], characters[place + 1] = characters[place + 1], characters[place]
        else:
            characters[place] = characters[place].swapcase()
    return "".join(characters)


def rows_of(texts: Sequence[str], max_word_bytes: int = 100) -> Inputs:
    """Texts as rows of symbols, padded on the right: ids, mask and labels ``[B, L]``. The last word stays open."""
    tokenizer = HATTokenizer(max_word_bytes)
    found = [tokenizer(text)["input_ids"] for text in texts]
    longest = max(map(len, found))
    ids = torch.tensor([row + [PADDING] * (longest - len(row)) for row in found])
    mask = torch.arange(longest) < torch.tensor([len(row) for row in found])[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


@torch.no_grad()
def symbol_nats(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    """What every symbol costs, ``[B, L - 1]`` in nats from the second on; 0 for padding."""
    logits = model(inputs["input_ids"], inputs["attention_mask"]).logits[:, :-1].float()
    wanted = inputs["input_ids"][:, 1:]
    nats = -logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
    return nats * inputs["attention_mask"][:, 1:]


def bits_per_byte(model: PreTrainedModel, texts: Sequence[str]) -> list[float]:
    """Bits per byte of every text; the end of a word costs bits and is no byte."""
    inputs = rows_of(texts, model.config.max_word_bytes)
    nats = symbol_nats(model, inputs).sum(1)
    return [float(total) / LN2 / max(len(text.encode()), 1) for total, text in zip(nats, texts, strict=True)]


@dataclass(frozen=True)
class HATTraining(Recipe):
    """Settings of ``everytoken train hat``: the next symbol, from scratch or from a folder of HAT.

    Args:
        byte_width, byte_layers: of encoder and decoder.
        width, layers: of the backbone.
        max_word_bytes: longer words are cut.

    Raises:
        BadInputError: a value out of range.
    """

    steps: int = 300
    batch: int = 4
    length: int = 128
    lr: float = 3e-3
    byte_width: int = 96
    byte_layers: int = 1
    width: int = 160
    layers: int = 3
    max_word_bytes: int = 32
    summary: ClassVar[str] = "a network that reads bytes inside words and words in a causal backbone"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            min(self.byte_width, self.byte_layers, self.width, self.layers) < 1
            or self.byte_width % 32
            or self.width % 32
        ):
            raise BadInputError("Widths are multiples of 32, and every part has a layer at least.")
        self.config()

    def config(self) -> HATConfig:
        """The shape of a network from scratch."""
        small = {
            "hidden_size": self.byte_width,
            "intermediate_size": self.byte_width * 5 // 2,
            "num_hidden_layers": self.byte_layers,
            "num_attention_heads": self.byte_width // 32,
        }
        large = {
            "hidden_size": self.width,
            "intermediate_size": self.width * 5 // 2,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.width // 32,
        }
        return HATConfig(
            encoder_config=small, backbone_config=large, decoder_config=small, max_word_bytes=self.max_word_bytes
        )

    def begin(self, model: str | None) -> PreTrainedModel:
        return HATForCausalLM(self.config()) if model is None else HAT.load(model)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return HATTokenizer(self.max_word_bytes)

    def texts(self, windows: torch.Tensor) -> list[str]:
        """Windows of bytes as texts; half characters at their ends are left out."""
        return [bytes(row).decode("utf-8", "ignore") for row in windows.tolist()]

    def loss(self, learner: nn.Module, windows: torch.Tensor, step: int) -> tuple[torch.Tensor, StepFigures]:
        inputs = rows_of(self.texts(windows), self.max_word_bytes)
        loss = learner(**inputs).loss
        words = (inputs["input_ids"] == WORD_END).sum() / len(windows)
        symbols = inputs["attention_mask"].sum() / len(windows)
        bits = loss / LN2 * (symbols - 1) / (symbols - words)
        return loss, {"bits per byte": bits, "bytes a word": (symbols - words) / words}

    def measure(self, model: PreTrainedModel, windows: torch.Tensor) -> dict[str, float]:
        """Bits per byte of clean text, and of the same text with a tenth of its characters disturbed."""
        texts = self.texts(windows)
        disturbed = [noisy(text, 0.1, numpy_generator(0, "noise", number)) for number, text in enumerate(texts)]
        clean, changed = bits_per_byte(model, texts), bits_per_byte(model, disturbed)
        return {
            "bits per byte": float(np.mean(clean)),
            "bits per byte, a tenth of the characters disturbed": float(np.mean(changed)),
        }

    def pictures(self, model: PreTrainedModel, curves: Curves, windows: torch.Tensor) -> dict[str, str]:
        inputs = rows_of(self.texts(windows), self.max_word_bytes)
        nats, layout = symbol_nats(model, inputs), WordLayout.of(inputs["input_ids"], inputs["attention_mask"])
        places, real = layout.offset[:, :-1], layout.real[:, 1:]
        points = [
            (float(place + 1), float(nats[real & (places == place)].mean()) / LN2)
            for place in range(12)
            if bool((real & (places == place)).any())
        ]
        lines = lines_svg({"bits": [points]}, "place in the word (its end counts)", "bits")
        return {"What every byte of a word costs": inline_image(lines, "bits by place in the word")}


@dataclass
class HAT(Architecture):
    """Reads bytes inside words, and words in a causal backbone: short sequences without a vocabulary.

    Args:
        noise: a share of the text's characters that is disturbed first (dropped, swapped, recased), to see what a
            spelling error costs.

    Raises:
        BadInputError: no share.
    """

    noise: float = 0.0
    declares: ClassVar[Network] = Network(
        HATConfig,
        HATForCausalLM,
        columns=("word", "logp"),
        lacks={
            "inputs_embeds": "words are found from bytes, which embeddings do not show",
            "sft": "TRL's SFTTrainer calls the backbone past the network; transformers' Trainer trains it",
            "compile": "how many words the backbone reads depends on the text",
        },
    )
    weights: ClassVar[str] = "hat-prose"
    example: ClassVar[str] = (
        "An object is callable if it has the methods that a call needs. The value of the expression is then returned."
    )
    headline: ClassVar[str] = "bits per byte"
    recipe: ClassVar[type | None] = HATTraining

    def __post_init__(self) -> None:
        if not 0 <= self.noise < 1:
            raise BadInputError(f"noise is a share of the characters; got {self.noise}.")

    @classmethod
    def tiny(cls) -> PreTrainedModel:
        part = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "initializer_range": 0.2,
        }
        config = HATConfig(
            encoder_config=part, backbone_config=part, decoder_config=part, max_word_bytes=20, initializer_range=0.2
        )
        return HATForCausalLM(config).eval()

    @classmethod
    def tiny_tokenizer(cls) -> PreTrainedTokenizerBase | None:
        return HATTokenizer(20)

    @classmethod
    def inputs(cls, model: PreTrainedModel, batch: int = 2, length: int = 12, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(32, 120, (batch, length), generator=generator)
        ends = torch.rand(batch, length, generator=generator) < 0.3
        ends[:, 0] = True
        ids = ids.masked_fill(ends, WORD_END)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    def arms(self) -> dict[str, Architecture]:
        return {"clean": HAT()} if self.noise else {}

    def observe(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, text: str, new_tokens: int = 0
    ) -> Observation:
        """The word of every byte and its log-probability, words and bytes, and what the network writes behind it."""
        text = noisy(text, self.noise, numpy_generator(0, "noise")) if self.noise else text
        inputs = rows_of([text], model.config.max_word_bytes)
        nats = symbol_nats(model, inputs)[0]
        ids = inputs["input_ids"][0]
        layout = WordLayout.of(inputs["input_ids"], None)
        bytes_only = ids != WORD_END
        data = text.encode("utf-8", "surrogatepass")
        trace = TokenTrace(ids[bytes_only].tolist(), title="hat", station="architectures")
        trace.texts = [bytes([byte]).decode("utf-8", "replace") for byte in data]
        trace.spans = [(place, place + 1) for place in range(len(data))]
        trace.add("word", layout.started[0][bytes_only])
        trace.add("logp", -nats[bytes_only[1:]])
        words = int((~bytes_only).sum())
        figures = {
            "bits per byte": float(nats.sum()) / LN2 / len(data),
            "bytes": float(len(data)),
            "words": float(words),
            "bytes a word": len(data) / words,
        }
        written = ""
        if new_tokens:
            prompt: dict[str, Any] = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            new = model.generate(**prompt, max_new_tokens=new_tokens, do_sample=False)[0, len(ids) :]
            written = HATTokenizer().convert_tokens_to_string([chr(item) for item in new.tolist()])
        return Observation([trace], figures, text=written)
