"""Networks of this station that read bytes as tokens: their tokenizer, and what their recipes share.

Byte ``b`` is token ``b + 3``, as for ByT5; 0 is padding, 1 ends a text and 2 is unknown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..core.errors import BadInputError
from .training import Recipe, StepFigures

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "</s>", "<unk>")
VOCABULARY = 256 + len(SPECIAL)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer of single bytes, which needs no files; it adds no special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from ..core.vocabulary import byte_stand_ins

    shown = {byte: char for char, byte in byte_stand_ins().items()}
    vocabulary = {name: place for place, name in enumerate((*SPECIAL, *(shown[byte] for byte in range(256))))}
    core = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def as_ids(windows: torch.Tensor) -> torch.Tensor:
    """Bytes 0 to 255 as token ids."""
    return windows + len(SPECIAL)


def text_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, text: str) -> torch.Tensor:
    """``[1, S]`` ids of a text for a network of this station.

    Args:
        tokenizer: None takes bytes.

    Raises:
        BadInputError: the text has fewer than two tokens, so that none predicts another, or more than the network has
            positions for.
    """
    tokenizer = tokenizer or byte_tokenizer()
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    longest = model.config.max_position_embeddings
    if not 2 <= ids.shape[1] <= longest:
        raise BadInputError(
            f"The text has {ids.shape[1]:,} tokens; this network reads 2 to {longest:,}.", "Give another text."
        )
    return ids.to(model.device)


def written(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, new_tokens: int, **arguments: Any
) -> str:
    """What a network writes behind ``ids`` ``[1, S]``, the likeliest token each time; nothing for ``new_tokens=0``.

    Args:
        arguments: further ones of ``generate``.
    """
    if not new_tokens:
        return ""
    new = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, **arguments)[0, ids.shape[1] :]
    text: str = tokenizer.decode(new, skip_special_tokens=True)
    return text


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, windows: torch.Tensor, batch: int = 16) -> list[float]:
    """Bits that each byte of held-out windows costs a network of bytes, one mean a window.

    Args:
        model: a causal language model of this tokenizer.
        windows: ``[N, length]`` bytes.
        batch: rows a forward.
    """
    found: list[float] = []
    for rows in as_ids(windows).split(batch):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        found += (losses.mean(-1) / math.log(2)).tolist()
    return found


@dataclass(frozen=True)
class ByteRecipe(Recipe):
    """A causal language model of bytes; the loss is the model's own.

    Args:
        layers, width: of the network, where it begins from scratch.
        intermediate: width of the feed-forward blocks.
        heads: of the attention.
    """

    layers: int = 4
    width: int = 128
    intermediate: int = 192
    heads: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.layers, self.width, self.intermediate, self.heads) < 1:
            raise BadInputError("layers, width, intermediate and heads are 1 or more.")
        if self.width % (2 * self.heads):
            raise BadInputError(f"A width of {self.width} does not give {self.heads} heads an even size each.")
        if self.width % 4 or self.intermediate % 4:
            raise BadInputError(
                f"width and intermediate are multiples of 4; got {self.width} and {self.intermediate}.",
                "torch's product of grouped matrices takes rows of 16 bytes.",
            )

    def shape(self) -> dict[str, int | None]:
        """The settings that the configurations of all networks of bytes share."""
        return {
            "vocab_size": VOCABULARY,
            "hidden_size": self.width,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": 2048,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 1,
        }

    def from_scratch(self, model: str | None, name: str) -> None:
        """Refuses a model to go on from.

        Raises:
            BadInputError: one was given.
        """
        if model is not None:
            raise BadInputError(f"{name} begins from scratch here.", "Leave --model out.")

    def loss(self, learner: nn.Module, windows: torch.Tensor, step: int) -> tuple[torch.Tensor, StepFigures]:
        ids = as_ids(windows)
        output = learner(input_ids=ids, labels=ids, use_cache=False)
        balance = getattr(output, "aux_loss", None)
        return output.loss, {} if balance is None else {"balance loss": balance}

    def bits(self, model: PreTrainedModel, windows: torch.Tensor) -> list[float]:
        """Bits per byte of every held-out window."""
        return bits_per_byte(model, windows)

    def measure(self, model: PreTrainedModel, windows: torch.Tensor) -> dict[str, float]:
        bits = self.bits(model, windows)
        return {"bits per byte": sum(bits) / len(bits)}

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return byte_tokenizer()
