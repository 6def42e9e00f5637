"""The start of a decoder's forward, as transformers' own models write it; for backbones with a loop of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from ..core.errors import BadInputError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


@dataclass
class Begun:
    """What every layer of a forward is called with.

    Attributes:
        hidden: ``[B, S, d]``, the embeddings.
        past_key_values: the cache, made where one is wanted.
        arguments: of the layers, by name.
    """

    hidden: torch.Tensor
    past_key_values: Cache | None
    arguments: dict[str, Any]


def begin(
    model: PreTrainedModel,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    use_cache: bool | None,
) -> Begun:
    """Embeds, and prepares cache, positions, mask and rotary embeddings.

    Args:
        model: with ``embed_tokens`` and ``rotary_emb``.
        input_ids: ``[B, S]``; or ``inputs_embeds`` ``[B, S, d]``, not both.
        attention_mask: ``[B, past + S]``, or a mask of four dimensions that is taken as it is.

    Raises:
        BadInputError: neither ids nor embeddings were given, or both.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise BadInputError("A forward takes either input_ids or inputs_embeds.", "Give one of them.")
    hidden = model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    if use_cache and past_key_values is None:
        past_key_values = DynamicCache(config=model.config)
    if position_ids is None:
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + past)[None]
    windowed = getattr(model.config, "sliding_window", None) is not None
    make_mask = create_sliding_window_causal_mask if windowed else create_causal_mask
    mask = make_mask(
        config=model.config,
        inputs_embeds=hidden,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
    )
    arguments = {
        "attention_mask": mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "use_cache": use_cache,
        "position_embeddings": model.rotary_emb(hidden, position_ids=position_ids),
    }
    return Begun(hidden, past_key_values, arguments)
