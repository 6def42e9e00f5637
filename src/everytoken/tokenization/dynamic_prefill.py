"""A prompt read in fewer positions by dynamic tokenization, then decoded as usual.

::

    model.generate(**inputs, max_new_tokens=32, custom_generate=DynamicPrefill(dynamic))
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import BadInputError
from ..core.trace import TokenTrace, Value
from ..decoding.base import Example
from ..decoding.call import DecodingCall, DecodingStats
from ..decoding.checks import check_prompt, split_rows
from ..decoding.loop import LoopDecoder
from .dynamic_tokenization import DynamicTokenizer


@dataclass
class DynamicPrefillStats(DecodingStats):
    """Counters of a call.

    Attributes:
        positions: positions of the prompts, padding left out.
        prompts: each row's tokens.
        pieces: for each of them how many base tokens its position holds.
    """

    positions: int = 0
    prompts: list[list[int]] = field(default_factory=list)
    pieces: list[list[int]] = field(default_factory=list)


@dataclass
class DynamicPrefill(LoopDecoder):
    """Reads a prompt in fewer positions, then decodes as usual; a ``custom_generate`` for transformers.

    Args:
        dynamic: with an embedder.
        keep_last: base tokens at the prompt's end that stay as they are (the next token depends on them most).

    What is returned is ``[B, T + new]``: the prompt's tokens stay the base tokenizer's. Everything after the prompt is
    transformers' own loop, with the merged prompts as ``inputs_embeds``. The trace has ``pieces in the token`` for
    every token of prompt and answer.

    Raises:
        BadInputError: a tokenizer without an embedder.
    """

    dynamic: DynamicTokenizer
    keep_last: int = 1
    stats_type: ClassVar[type[DecodingStats]] = DynamicPrefillStats
    trace_columns: ClassVar[tuple[str, ...]] = ("pieces in the token",)
    colour: ClassVar[str] = "pieces in the token"
    station: ClassVar[str] = "tokenization"
    carries: ClassVar[frozenset[str] | None] = frozenset()
    changes_model: ClassVar[bool] = False
    continues: ClassVar[bool] = False
    extrapolates: ClassVar[bool] = True
    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.dynamic.embedder is None:
            raise BadInputError("The dynamic tokenizer has no embedder.", "Pass embedder=MeanEmbedding(model), say.")
        if self.keep_last < 0:
            raise BadInputError(f"keep_last must not be negative; got {self.keep_last}.")

    @property
    def stats(self) -> DynamicPrefillStats:
        return cast(DynamicPrefillStats, super().stats)

    @property
    def positions(self) -> int:
        """Positions of the last call's prompts, padding left out."""
        return self.stats.positions

    def figures(self) -> dict[str, float]:
        return super().figures() | {"positions": float(self.positions)}

    def check_call(self, call: DecodingCall[DynamicPrefillStats]) -> None:
        """Merges the prompts and hands them to the call as ``inputs_embeds``.

        Raises:
            BadInputError: padding on the right, or a prompt that is too long after its merges.
        """
        rows = [ids.tolist() for ids, _ in split_rows(call.input_ids, call.attention_mask)]
        cuts = [max(0, len(row) - self.keep_last) for row in rows]
        some = [row[:cut] for row, cut in zip(rows, cuts, strict=True) if cut]
        batch = self.dynamic(some) if some else None
        embedder, place = self.dynamic.embedder, 0
        assert embedder is not None
        parts: list[torch.Tensor] = []
        for row, cut in zip(rows, cuts, strict=True):
            vectors, pieces = [], [1] * (len(row) - cut)
            if cut:
                assert batch is not None
                assert batch.inputs_embeds is not None
                vectors.append(batch.inputs_embeds[place][batch.attention_mask[place].bool()])
                pieces = [end - first for first, end in batch.spans[place] for _ in range(first, end)] + pieces
                place += 1
            if cut < len(row):
                with torch.no_grad():
                    vectors.append(embedder.base(torch.tensor(row[cut:])))
            parts.append(torch.cat(vectors))
            call.stats.prompts.append(row)
            call.stats.pieces.append(pieces)
        width = max(map(len, parts))
        check_prompt(call.model, width)
        embeds = parts[0].new_zeros(len(parts), width, parts[0].shape[-1])
        mask = torch.zeros(len(parts), width, dtype=torch.long, device=embeds.device)
        for number, part in enumerate(parts):
            embeds[number, width - len(part) :] = part
            mask[number, width - len(part) :] = 1
        call.stats.positions = sum(map(len, parts))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        call.model_kwargs |= {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}

    def applied(self, call: DecodingCall[DynamicPrefillStats]) -> AbstractContextManager[None]:
        return nullcontext()  # only the prompt is another

    def finished(self, call: DecodingCall[DynamicPrefillStats], sequences: torch.Tensor, new: list[list[int]]) -> None:
        if not self.trace_enabled or len(new) != len(call.input_ids):
            return
        for tokens, prompt, pieces in zip(new, call.stats.prompts, call.stats.pieces, strict=True):
            columns: dict[str, list[Value]] = {"pieces in the token": [*pieces, *[1] * len(tokens)]}
            call.trace.append(TokenTrace(prompt + tokens, columns=columns, station=self.station))

    @classmethod
    def examples(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Example]:
        from .hyper import MeanEmbedding

        assert tokenizer is not None
        embedder = MeanEmbedding(model)
        whole = DynamicTokenizer(tokenizer, merges=0, embedder=embedder)
        merged = DynamicTokenizer(tokenizer, merges=1, boundary="sentence", embedder=embedder)
        refuses = frozenset({"past_key_values"})
        return {
            "no merges": Example(lambda **settings: cls(whole, **settings), exact=True, refuses=refuses),
            # merges follow the batch: a row alone is merged otherwise
            "merged": Example(lambda **settings: cls(merged, **settings), padding_exact=False, refuses=refuses),
        }
