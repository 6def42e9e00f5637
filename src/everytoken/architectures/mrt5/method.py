"""MrT5 as a method: what it deletes of a text, and how it learns to from text (arXiv 2410.20771)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import nn
from transformers import ByT5Tokenizer

from ...core.charts import inline_image, lines_svg
from ...core.errors import BadInputError
from ...core.quiet import quiet_transformers
from ...core.rng import numpy_generator
from ...core.trace import TokenTrace
from ..base import Architecture, Network, Observation
from ..training import Curves, Recipe, StepFigures
from .configuration_mrt5 import MrT5Config
from .deletion import DeletionController
from .modeling_mrt5 import MrT5ForConditionalGeneration

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OFFSET, END, SENTINEL = 3, 1, 258
"""ByT5's ids: a byte's is ``byte + 3``; sentinels count down from the last of a vocabulary of 259 (its bytes above 0xF4
never occur in UTF-8).
"""
VOCABULARY = 259


def corrupted(
    windows: torch.Tensor, generator: np.random.Generator, rate: float = 0.15, span: float = 8.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Span corruption: every row loses the same number of bytes in the same number of spans, at random places.

    Args:
        windows: ``[B, L]`` bytes 0 to 255.
        rate: share of the bytes that are taken out.
        span: mean length of a span, in bytes.

    Returns:
        ``input_ids [B, L - N + K + 1]``, with a sentinel in the place of each of K spans of N bytes together, and
        ``labels [B, N + K + 1]``: each sentinel with its bytes. Both end with the end token.
    """
    rows, length = windows.shape
    noise = min(max(round(length * rate), 1), length - 1)
    spans = max(1, min(round(noise / span), noise, length - noise, SENTINEL - 248))
    # each part is one or longer; the text begins with what is kept
    marks = np.stack([
        np.repeat(
            np.tile([0, 1], spans),
            np.stack([_parts(length - noise, spans, generator), _parts(noise, spans, generator)], 1).ravel(),
        )
        for _ in range(rows)
    ])  # fmt: skip
    hidden = torch.from_numpy(marks).bool()
    starts = hidden & ~torch.nn.functional.pad(hidden, (1, 0))[:, :-1]
    sentinels = SENTINEL + 1 - starts.cumsum(1)
    ids = windows + OFFSET
    kept = torch.where(starts, sentinels, ids)[~hidden | starts].reshape(rows, -1)
    # a sentinel stands before the first byte of its span
    pairs = torch.stack([torch.where(starts, sentinels, -1), torch.where(hidden, ids, -1)], -1).reshape(rows, -1)
    labels = pairs[pairs >= 0].reshape(rows, -1)
    end = torch.full((rows, 1), END)
    return torch.cat([kept, end], 1), torch.cat([labels, end], 1)


VOWELS = frozenset(b"aeiouAEIOU")


def without_vowels(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Vowel removal, a diagnostic task: the text, and the text without its vowels.

    Args:
        windows: ``[B, L]`` bytes 0 to 255.

    Returns:
        ``input_ids [B, L + 1]``, and ``labels [B, M + 1]``, M the longest row's rest; shorter ones end with -100.
    """
    end = torch.full((len(windows), 1), END)
    lost = torch.isin(windows, torch.tensor(sorted(VOWELS)))
    rest = (~lost).sum(1)
    order = lost.to(torch.int8).argsort(dim=1, stable=True)[:, : int(rest.max())]
    labels = torch.cat([windows.gather(1, order) + OFFSET, end], 1)
    places = torch.arange(labels.shape[1])
    labels = torch.where(places < rest[:, None], labels, torch.where(places == rest[:, None], END, -100))
    return torch.cat([windows + OFFSET, end], 1), labels


def _parts(total: int, count: int, generator: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """``total`` as ``count`` numbers of 1 or more, all ways equally likely."""
    cuts = np.sort(generator.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


@dataclass(frozen=True)
class MrT5Training(Recipe):
    """Settings of ``everytoken train mrt5``, with a controller of the deleted share.

    Args:
        task: ``"spans"`` restores spans that are taken out of the text, ``"vowels"`` writes the text without its vowels
            (a diagnostic: a third of the bytes is not needed).
        target: the deleted share of bytes that the controller aims at.
        k_p, k_i: how strongly the controller answers the error and its sum.
        delete_from: the step from which the controller works; before it the network learns without pressure.
        width, ff_width, layers, decoder_layers, heads: of a network from scratch.
        gate_layer: the encoder block before which the gate stands.
        scale: k, the gate's value of a deleted byte.
        scores_weight: beta, see ``MrT5Config``.
        rate, span: share of bytes that are taken out, and mean length of a span.

    Raises:
        BadInputError: a value out of range.
    """

    steps: int = 1200
    batch: int = 12
    length: int = 128
    lr: float = 3e-3
    task: str = "spans"
    target: float = 0.5
    k_p: float = 0.5
    k_i: float = 1e-5
    delete_from: int = 300
    width: int = 96
    ff_width: int = 192
    layers: int = 5
    decoder_layers: int = 1
    heads: int = 4
    gate_layer: int = 2
    scale: float = -30.0
    scores_weight: float = 0.0
    rate: float = 0.15
    span: float = 8.0
    summary: ClassVar[str] = "a byte-level T5 that learns which bytes its encoder can delete, by span corruption"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.rate < 1 and self.span >= 1 and self.delete_from >= 0 and self.length >= 4):
            raise BadInputError(
                "rate lies between 0 and 1, span is 1 or more, delete_from 0 or more, length 4 or more."
            )
        if self.task not in ("spans", "vowels"):
            raise BadInputError(f"task is spans or vowels; got {self.task!r}.")
        DeletionController(self.target, self.k_p, self.k_i)
        self.config()

    def config(self) -> MrT5Config:
        """The shape of a network from scratch."""
        return MrT5Config(
            vocab_size=VOCABULARY,
            d_model=self.width,
            d_kv=self.width // self.heads,
            d_ff=self.ff_width,
            num_layers=self.layers,
            num_decoder_layers=self.decoder_layers,
            num_heads=self.heads,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            tie_word_embeddings=True,
            decoder_start_token_id=0,
            delete_gate_layer=self.gate_layer,
            delete_gate_scale=self.scale,
            scores_weight=self.scores_weight,
        )

    def begin(self, model: str | None) -> PreTrainedModel:
        """From scratch, or from a folder of ByT5 or MrT5, which gets a gate that keeps everything at first."""
        if model is None:
            return MrT5ForConditionalGeneration(self.config())
        from ...core.loading import load_config

        found = load_config(model)
        if found.model_type not in ("t5", "mrt5") or found.vocab_size < VOCABULARY:
            raise BadInputError(
                f"{model} is a {found.model_type} of {found.vocab_size:,} tokens; MrT5 goes on from a ByT5 or an MrT5."
            )
        settings = found.to_dict() | {"model_type": "mrt5"}
        if found.model_type == "t5":
            settings |= {"delete_gate_layer": self.gate_layer, "delete_gate_scale": self.scale}
        config = MrT5Config(**settings | {"scores_weight": self.scores_weight})
        with quiet_transformers():
            return MrT5ForConditionalGeneration.from_pretrained(
                model, config=config, dtype="float32", use_safetensors=True
            )

    def learner(self, model: PreTrainedModel) -> nn.Module:
        return Controlled(model, DeletionController(self.target, self.k_p, self.k_i), self.delete_from)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return ByT5Tokenizer()

    def examples(self, windows: torch.Tensor, generator: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels of the task."""
        return without_vowels(windows) if self.task == "vowels" else corrupted(windows, generator, self.rate, self.span)

    def loss(self, learner: nn.Module, windows: torch.Tensor, step: int) -> tuple[torch.Tensor, StepFigures]:
        ids, labels = self.examples(windows, numpy_generator(self.seed, "spans", step))
        assert isinstance(learner, Controlled)
        return learner.step(step, ids, labels)

    def measure(self, model: PreTrainedModel, windows: torch.Tensor) -> dict[str, float]:
        """Bits per byte and right bytes of the task with hard deletion, bits per byte with none, the deleted share."""
        ids, labels = self.examples(windows, numpy_generator(0, "held"))
        nothing = torch.zeros(ids.shape)
        with torch.no_grad():
            hard = model(ids, labels=labels)
            share = float(model.deletion_share)
            whole = model(ids, labels=labels, delete_gate=nothing)
        told, right = labels >= 0, hard.logits.argmax(-1) == labels
        return {
            "bits per byte": float(hard.loss) / float(np.log(2)),
            "bits per byte, nothing deleted": float(whole.loss) / float(np.log(2)),
            "right bytes": float(right[told].float().mean()),
            "deleted share": share,
        }

    def pictures(self, model: PreTrainedModel, curves: Curves, windows: torch.Tensor) -> dict[str, str]:
        shares: dict[str, list[list[tuple[float, float]]]] = {
            "deleted share": [curves.get("deleted share", [])],
            "target": [[(1, self.target), (self.steps, self.target)]],
        }
        if not curves.get("deleted share"):
            return {}
        picture = inline_image(lines_svg(shares, "step", "deleted share of bytes", markers=False), "deleted share")
        return {"Deleted bytes over training": picture}


class Controlled(nn.Module):
    """A network with the controller's state, so that checkpoints keep both."""

    state: torch.Tensor

    def __init__(self, network: PreTrainedModel, controller: DeletionController, begins: int = 0):
        super().__init__()
        self.network, self.controller, self.begins = network, controller, begins
        self.register_buffer("state", torch.zeros(3))  # P, I, alpha

    def step(
        self, step: int, ids: torch.Tensor, labels: torch.Tensor, **kwargs: torch.Tensor
    ) -> tuple[torch.Tensor, StepFigures]:
        """Loss and figures of a step; the loss uses the alpha of the step before."""
        network, control = self.network, self.controller
        control.proportional, control.integral = float(self.state[0]), float(self.state[1])
        network.deletion_weight = float(self.state[2])
        output = network(ids, labels=labels, **kwargs)
        share = float(network.deletion_share)
        if step >= self.begins:
            alpha = control.update(share)
            self.state.copy_(torch.tensor([control.proportional, control.integral, alpha]))
        return output.loss, {"deleted share": share, "alpha": float(self.state[2])}


@dataclass
class MrT5(Architecture):
    """Deletes bytes inside the encoder of a byte-level T5, so that later layers and the decoder read fewer.

    Args:
        delete: ``"hard"`` takes the bytes out, ``"soft"`` damps them as in training, ``"none"`` keeps all.
        threshold: a byte is kept where its gate lies above; None is the network's own (half of its scale).

    Raises:
        BadInputError: an unknown way, or a threshold that is not below 0.
    """

    delete: str = "hard"
    threshold: float | None = None
    declares: ClassVar[Network] = Network(
        MrT5Config,
        MrT5ForConditionalGeneration,
        columns=("kept", "gate"),
        auto="AutoModelForSeq2SeqLM",
        lacks={
            "sft": "TRL's SFTTrainer trains decoders; transformers' Seq2SeqTrainer trains this one",
            "compile": "hard deletion cuts to a length that depends on the text; with hard_delete=False it compiles",
        },
    )
    weights: ClassVar[str] = "mrt5-prose"
    example: ClassVar[str] = "The old bridge stood in the rain."
    headline: ClassVar[str] = "encoder milliseconds"
    recipe: ClassVar[type | None] = MrT5Training

    def __post_init__(self) -> None:
        if self.delete not in ("hard", "soft", "none"):
            raise BadInputError(f"delete is hard, soft or none; got {self.delete!r}.")
        if self.threshold is not None and self.threshold >= 0:
            raise BadInputError(f"A gate lies below 0, and so does its threshold; got {self.threshold}.")

    @classmethod
    def tiny(cls) -> PreTrainedModel:
        model = MrT5ForConditionalGeneration(
            MrT5Config(
                vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=3, num_heads=4, delete_gate_layer=1,
                feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0, initializer_factor=0.3,
            )
        ).eval()  # fmt: skip
        with torch.no_grad():  # some bytes of every text are deleted, the gates far from the threshold
            model.encoder.delete_gate.linear.weight.mul_(60)
        return model

    @classmethod
    def tiny_tokenizer(cls) -> PreTrainedTokenizerBase | None:
        return _Letters()

    def arms(self) -> dict[str, Architecture]:
        return {} if self.delete == "none" else {"every byte": MrT5("none")}

    def observe(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, text: str, new_tokens: int = 0
    ) -> Observation:
        """The gate of every byte of the text, the encoder's time, and what the network writes from what is left."""
        if tokenizer is None:
            raise BadInputError("This folder has no tokenizer.", "Save ByT5's beside the network.")
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        arguments = self._arguments(model, ids)
        threshold = model.config.delete_threshold
        model.config.delete_threshold = model.encoder.config.delete_threshold = self.threshold or threshold
        try:
            began = time.perf_counter()
            seen = model.encoder(ids, **arguments)
            milliseconds = 1e3 * (time.perf_counter() - began)
            written = ""
            if new_tokens:
                new = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, **arguments)
                written = tokenizer.decode(new[0], skip_special_tokens=True)
        finally:
            model.config.delete_threshold = model.encoder.config.delete_threshold = threshold
        gate = seen.delete_gate[0]
        limit = self.threshold if self.threshold is not None else model.config.threshold
        kept = gate > limit
        if seen.kept_positions is not None:
            kept = torch.zeros_like(kept).index_fill(0, seen.kept_positions[0], True)
        trace = TokenTrace(ids[0].tolist(), {"kept": ["kept" if item else "deleted" for item in kept]}, title="mrt5")
        trace.station = "architectures"
        trace.add("gate", gate)
        trace.with_text(tokenizer)
        figures = {"encoder milliseconds": milliseconds, "deleted share": 1 - float(kept.float().mean())}
        return Observation([trace], figures, text=written)

    def _arguments(self, model: PreTrainedModel, ids: torch.Tensor) -> dict[str, object]:
        if self.delete == "none":
            return {"delete_gate": torch.zeros(ids.shape, device=ids.device), "hard_delete": False}
        return {"hard_delete": self.delete == "hard"}


class _Letters(ByT5Tokenizer):
    """ByT5's bytes, folded into the ids of a tiny network."""

    def __call__(self, text: str, **kwargs: object) -> dict[str, list[int]]:  # type: ignore[override]
        return {"input_ids": [3 + byte % 61 for byte in text.encode()]}
