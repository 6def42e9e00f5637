"""A prompt read in fewer positions by dynamic tokenization, then decoded as usual.

::

    model.generate(**inputs, max_new_tokens=32, custom_generate=DynamicPrefill(dynamic))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..core.errors import BadInputError
from .dynamic_tokenization import DynamicTokenizer


@dataclass
class DynamicPrefill:
    """Reads a prompt in fewer positions, then decodes as usual; a ``custom_generate`` for transformers.

    Args:
        dynamic: with an embedder.
        keep_last: base tokens at the prompt's end that stay as they are (the next token depends on them most).

    Raises:
        BadInputError: a tokenizer without an embedder.
    """

    dynamic: DynamicTokenizer
    keep_last: int = 1

    def __post_init__(self) -> None:
        if self.dynamic.embedder is None:
            raise BadInputError("The dynamic tokenizer has no embedder.", "Pass embedder=MeanEmbedding(model), say.")
        if self.keep_last < 0:
            raise BadInputError(f"keep_last must not be negative; got {self.keep_last}.")
        self.positions = 0
        """Positions of the last call's prompts, padding left out."""

    @torch.inference_mode()
    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """As ``generate``: ``[B, T + new]``; the prompt's tokens are the base tokenizer's.

        Raises:
            BadInputError: padding on the right, a filled cache, or a generation mode that is not plain decoding.
        """
        from transformers import DynamicCache

        from ..decoding.base import check_empty_cache, check_prompt, join_rows, refuse_unsupported, split_rows

        refuse_unsupported("DynamicPrefill", generation_config, bool(model_kwargs.get("synced_gpus")))
        check_empty_cache("DynamicPrefill", model_kwargs.get("past_key_values"))
        rows = [ids.tolist() for ids, _ in split_rows(input_ids, model_kwargs.get("attention_mask"))]
        cuts = [max(0, len(row) - self.keep_last) for row in rows]
        heads = [row[:cut] for row, cut in zip(rows, cuts, strict=True)]
        tails = [row[cut:] for row, cut in zip(rows, cuts, strict=True)]
        parts: list[torch.Tensor] = []
        some = [row for row in heads if row]
        batch = self.dynamic(some) if some else None
        embedder, place = self.dynamic.embedder, 0
        assert embedder is not None
        for head, tail in zip(heads, tails, strict=True):
            vectors = []
            if head:
                assert batch is not None and batch.inputs_embeds is not None
                vectors.append(batch.inputs_embeds[place][batch.attention_mask[place].bool()])
                place += 1
            if tail:
                vectors.append(embedder.base(torch.tensor(tail)))
            parts.append(torch.cat(vectors))
        self.positions = sum(map(len, parts))
        width = max(map(len, parts))
        check_prompt(model, width)
        embeds = parts[0].new_zeros(len(parts), width, parts[0].shape[-1])
        mask = torch.zeros(len(parts), width, dtype=torch.long, device=embeds.device)
        for number, part in enumerate(parts):
            embeds[number, width - len(part) :] = part
            mask[number, width - len(part) :] = 1
        cache = DynamicCache(config=model.config)
        logits = self._step(model, cache, mask, inputs_embeds=embeds)
        texts, new = input_ids, [[] for _ in rows]  # type: ignore[var-annotated]
        alive = torch.ones(len(rows), dtype=torch.bool, device=input_ids.device)
        pad = generation_config.pad_token_id or 0
        while True:
            scores = logits.float()
            if logits_processor is not None:
                scores = logits_processor(texts, scores)
            if generation_config.do_sample:
                chosen = torch.multinomial(scores.softmax(-1), 1)[:, 0]
            else:
                chosen = scores.argmax(-1)
            chosen = torch.where(alive, chosen, pad)
            for number in alive.nonzero()[:, 0].tolist():
                new[number].append(int(chosen[number]))
            texts = torch.cat([texts, chosen[:, None]], 1)
            if stopping_criteria is not None:
                alive = alive & ~stopping_criteria(texts, None)
            if not alive.any():
                return join_rows(input_ids, new, generation_config)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits = self._step(model, cache, mask, input_ids=chosen[:, None])

    @staticmethod
    def _step(model: Any, cache: Any, mask: torch.Tensor, **inputs: Any) -> torch.Tensor:
        size = next(iter(inputs.values())).shape[1]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -size:]
        output = model(
            **inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]
