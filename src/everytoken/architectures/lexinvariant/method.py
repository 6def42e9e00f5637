"""A lexinvariant model as a method: how it reads an enciphered text, and how it learns to (arXiv 2305.16349)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ...core.charts import inline_image, lines_svg
from ...core.errors import BadInputError
from ...core.trace import TokenTrace
from ..base import Architecture, Inputs, Network, Observation
from ..training import Curves, Recipe, StepFigures
from .configuration_lexinvariant import LexinvariantConfig
from .modeling_lexinvariant import LexinvariantForCausalLM
from .symbols import cipher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LETTERS = "abcdefghijklmnopqrstuvwxyz "
SPACE = 26
_TABLE = np.full(256, SPACE, np.int64)
_TABLE[np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)] = np.arange(26)
_TABLE[np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8)] = np.arange(26)


def letters(data: bytes) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Lower-case letters and single spaces of a text: ids 0 to 26."""
    found = _TABLE[np.frombuffer(data, np.uint8)]
    again = np.concatenate([[False], (found[1:] == SPACE) & (found[:-1] == SPACE)])
    return found[~again]


def letter_rows(windows: torch.Tensor, length: int) -> torch.Tensor:
    """Windows ``[B, L]`` of bytes as ``[B, length]`` letters; spaces fill what is too short."""
    rows = np.full((len(windows), length), SPACE)
    for number, row in enumerate(windows.numpy().astype(np.uint8)):
        found = letters(row.tobytes())[:length]
        rows[number, : len(found)] = found
    return torch.from_numpy(rows)


@dataclass(frozen=True)
class LexinvariantTraining(Recipe):
    """Settings of ``everytoken train lexinvariant``: the next letter of 27, and a probe that says which is which.

    Args:
        width, layers: of the decoder.
        random_share: q, see ``LexinvariantConfig``; 0 trains the ordinary tied model.
        random_kind: ``"sequences"`` or ``"symbols"``.

    Raises:
        BadInputError: a value out of range.
    """

    steps: int = 700
    batch: int = 8
    length: int = 160
    lr: float = 4e-3
    width: int = 96
    layers: int = 2
    random_share: float = 1.0
    random_kind: str = "sequences"
    summary: ClassVar[str] = "a decoder that knows letters by their context alone, every text under names of its own"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 32 or self.width % 32 or self.layers < 1:
            raise BadInputError("width is a multiple of 32, and there is a layer at least.")
        self.config()

    @property
    def symbols(self) -> int:
        """Letters of a row: what is left of a window when runs of other characters became one space."""
        return max(2, self.length * 3 // 4)

    def config(self) -> LexinvariantConfig:
        """The shape of a network from scratch."""
        decoder = {
            "hidden_size": self.width,
            "intermediate_size": self.width * 5 // 2,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.width // 32,
            "max_position_embeddings": 2048,
        }
        return LexinvariantConfig(
            decoder_config=decoder,
            vocab_size=len(LETTERS),
            probe_symbols=len(LETTERS),
            random_share=self.random_share,
            random_kind=self.random_kind,
        )

    def begin(self, model: str | None) -> PreTrainedModel:
        return LexinvariantForCausalLM(self.config()) if model is None else Lexinvariant.load(model)

    def loss(self, learner: nn.Module, windows: torch.Tensor, step: int) -> tuple[torch.Tensor, StepFigures]:
        ids = letter_rows(windows, self.symbols)
        output = learner(ids, labels=ids)
        read = F.cross_entropy(output.probe_logits.flatten(0, 1), ids.flatten())
        half = ids.shape[1] // 2
        known = (output.probe_logits[:, half:].argmax(-1) == ids[:, half:]).float().mean()
        bits = output.loss / math.log(2)
        return output.loss + read, {"bits per letter": bits, "letters known in the second half": known}

    def measure(self, model: PreTrainedModel, windows: torch.Tensor) -> dict[str, float]:
        ids = letter_rows(windows, self.symbols)
        key = torch.randperm(len(LETTERS), generator=torch.Generator().manual_seed(1))
        nats, known = by_position(model, ids)
        renamed, _ = by_position(model, cipher(ids, key))
        half, bit = len(known) // 2, math.log(2)
        return {
            "bits per letter": float(nats.mean()) / bit,
            "bits per letter, enciphered": float(renamed.mean()) / bit,
            "bits per letter in the last quarter": float(nats[-len(nats) // 4 :].mean()) / bit,
            "letters known in the second half": float(known[half:].mean()),
        }

    def pictures(self, model: PreTrainedModel, curves: Curves, windows: torch.Tensor) -> dict[str, str]:
        nats, known = by_position(model, letter_rows(windows, self.symbols))
        span = max(1, len(known) // 16)
        points = [(float(i), float(known[i : i + span].mean())) for i in range(0, len(known) - span + 1, span)]
        costs = [
            (float(i), float(nats[i : i + span].mean()) / math.log(2)) for i in range(0, len(nats) - span + 1, span)
        ]
        return {
            "Which letters it knows, by the text before them": inline_image(
                lines_svg({"share": [points]}, "letters read", "share of letters known"), "letters known by position"
            ),
            "What a letter costs": inline_image(
                lines_svg({"bits": [costs]}, "letters read", "bits per letter"), "bits by position"
            ),
        }


@torch.no_grad()
def by_position(model: PreTrainedModel, ids: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over rows: nats of every letter from the second on ``[L - 1]``, and the share that are known ``[L]``."""
    seeds = torch.arange(len(ids)) + 1000 * seed
    output = model(ids, table_seeds=seeds)
    nats = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    known = torch.zeros(ids.shape)
    if output.probe_logits is not None:
        known = (output.probe_logits.argmax(-1) == ids).float()
    return nats.reshape(len(ids), -1).mean(0), known.mean(0)


@dataclass
class Lexinvariant(Architecture):
    """Reads a text whose letters have no fixed meaning, and tells which letter is which from the context.

    Args:
        cipher: rename the letters first; nothing should change.
        draws: random tables, over which figures are means.
        seed: of the key and the tables.

    Raises:
        BadInputError: no draw.
    """

    cipher: bool = True
    draws: int = 4
    seed: int = 0
    declares: ClassVar[Network] = Network(
        LexinvariantConfig,
        LexinvariantForCausalLM,
        columns=("read as", "first", "logp", "key entropy"),
        lacks={
            "inputs_embeds": "the table that embeds a text gives its logits too",
            "sft": "TRL's SFTTrainer calls the backbone past the network; transformers' Trainer trains it",
            "compile": "a table is drawn by a generator of each row; with symbol_table given it compiles",
        },
    )
    weights: ClassVar[str] = "lexinvariant-prose"
    example: ClassVar[str] = (
        "the value of the expression is the object that is returned by the function and the name of the class is used "
        "for the instance of the type if the argument is not a string then the method is called with the same "
        "arguments and the result is the value of the attribute"
    )
    headline: ClassVar[str] = "bits per letter"
    recipe: ClassVar[type | None] = LexinvariantTraining

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise BadInputError(f"One draw at least; got {self.draws}.")

    @classmethod
    def tiny(cls) -> PreTrainedModel:
        decoder = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "initializer_range": 0.2,
        }
        return LexinvariantForCausalLM(LexinvariantConfig(decoder_config=decoder, vocab_size=27)).eval()

    @classmethod
    def inputs(cls, model: PreTrainedModel, batch: int = 2, length: int = 12, seed: int = 0) -> Inputs:
        inputs = super().inputs(model, batch, length, seed)
        return inputs | {"table_seeds": torch.arange(batch) + 17}

    def arms(self) -> dict[str, Architecture]:
        return {"as it is": Lexinvariant(False, self.draws, self.seed)} if self.cipher else {}

    def observe(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, text: str, new_tokens: int = 0
    ) -> Observation:
        """Every letter of the text, enciphered, with what the network reads it as."""
        plain = torch.from_numpy(letters(text.encode()))
        if len(plain) < 2:
            raise BadInputError("The text has no letters to read.")
        if model.config.vocab_size != len(LETTERS):
            raise BadInputError(f"This network reads {model.config.vocab_size} symbols; a trial shows 27 letters.")
        key = torch.randperm(len(LETTERS), generator=torch.Generator().manual_seed(self.seed + 1))
        ids = cipher(plain, key) if self.cipher else plain
        seeds = torch.arange(self.draws) + 1000 * self.seed
        output = model(ids.expand(self.draws, -1), table_seeds=seeds)
        logps = output.logits.log_softmax(-1)[:, :-1].gather(-1, ids[1:].expand(self.draws, -1)[..., None])[..., 0]
        # the probe was trained to name letters by what they do; under a cipher that is the plain letter
        probe = None if output.probe_logits is None else output.probe_logits.softmax(-1).mean(0)
        trace = TokenTrace(plain.tolist(), texts=[LETTERS[item] for item in ids.tolist()], station="architectures")
        trace.title = "lexinvariant, enciphered" if self.cipher else "lexinvariant"
        read = [None] * len(plain) if probe is None else [LETTERS[item] for item in probe.argmax(-1).tolist()]
        trace.add("read as", read if probe is not None else ["?"] * len(plain))
        seen: set[int] = set()
        trace.add("first", [item not in seen and not seen.add(item) for item in ids.tolist()])  # type: ignore[func-returns-value]
        trace.add("logp", [None, *logps.mean(0).tolist()])
        entropy = None if probe is None else -(probe * probe.clamp_min(1e-12).log()).sum(-1) / math.log(2)
        trace.add("key entropy", [None] * len(plain) if entropy is None else entropy.tolist())
        figures = {"bits per letter": -float(logps.mean()) / math.log(2), "letters": float(len(plain))}
        if probe is not None:
            right = (probe.argmax(-1) == plain).float()
            figures["letters known"] = float(right.mean())
            figures["letters known in the last quarter"] = float(right[-max(1, len(right) // 4) :].mean())
        return Observation([trace], figures)
