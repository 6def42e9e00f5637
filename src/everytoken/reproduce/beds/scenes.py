"""What experiments on the tiny model of scenes share: a block with a reducer or without, and what a prompt costs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...reduction.base import Reducer


@contextlib.contextmanager
def reduced(model: PreTrainedModel, reducer: Reducer | None, positions: str, seed: int) -> Iterator[Any]:
    """``reduce_tokens``, or nothing where there is no reducer; yields what it reports."""
    import torch

    from ...reduction.seam import reduce_tokens

    if reducer is None:
        yield None
        return
    generator = torch.Generator().manual_seed(seed)
    with reduce_tokens(model, reducer, positions, generator) as run:
        yield run


def cost(model: PreTrainedModel, reducer: Reducer | None, positions: str, batch: int = 16) -> dict[str, float]:
    """Measured, for each question: visual tokens that the language model's last layer saw, operations of the prefill
    (millions, matrix products), of which in the language model, and bytes of its cache.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ...training.datasets.scenes import question_batch
    from ...training.vision import held_out

    scenes, asked = held_out(batch, 0)
    inputs = question_batch(scenes, [[item] for item in asked], model.config.image_seq_length)
    del inputs["labels"]
    with torch.no_grad(), reduced(model, reducer, positions, 0) as run, FlopCounterMode(display=False) as counter:
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    names = counter.get_flop_counts()
    language = sum(sum(found.values()) for name, found in names.items() if name.endswith(".language_model"))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    text = inputs["input_ids"].shape[1] - model.config.image_seq_length
    if run is None:
        tokens = float(model.config.image_seq_length)
    elif run.lengths:
        tokens = sum(run.lengths[max(run.lengths)]) / batch - text
    else:
        tokens = run.last.tokens_after / batch
    return {
        "visual tokens at the end": tokens,
        "millions of operations": counter.get_total_flops() / batch / 1e6,
        "of which language model": language / batch / 1e6,
        "cache bytes": held / batch,
    }
