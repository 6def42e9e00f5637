"""Plain decoding, token by token, with as little as possible around the model's forward.

The text, samples, scores and logits are those of ``model.generate`` without a ``custom_generate``. What is gone is what
transformers' loop does for every token; and where the model has a compiled forward (``load_model(weights="int4")``), it
runs instead of transformers'. It is what a faster method has to beat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .base import Decoder, Example
from .call import DecodingCall
from .lean import row_cache
from .row import DecodingRow
from .row_cache import cached_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class PlainDecoding(Decoder):
    """``model.generate`` with a leaner loop."""

    trace_columns: ClassVar[tuple[str, ...]] = ("source",)
    processes_once: ClassVar[bool] = True
    recurrent: ClassVar[bool] = True
    compiled: ClassVar[bool] = True

    def decode_row(self, call: DecodingCall[Any], row: DecodingRow) -> None:
        assert row.cache is not None
        cache = row_cache(call.model, row.cache, cached_length(row.cache) or None)
        try:
            done = False
            while not done:
                logits = cache.read(row.text)["logits"][0, -1, : call.vocab_size].float()
                call.stats.target_forwards += 1
                scores = row.processed(logits)
                done = row.append(row.choose(scores), scores, logits, source="target")
        finally:
            cache.close()

    @classmethod
    def examples(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Example]:
        return {"plain": Example(lambda **settings: cls(**settings), exact=True)}
