"""What a call is checked for before any forward: modes, inputs, padding, caches, vocabularies.

Every function raises an error of ``core.errors`` that names what it refuses.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ..core.errors import BadInputError, TokenizerMismatchError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedConfig, PreTrainedModel

PREPARED = frozenset({
    "attention_mask", "position_ids", "past_key_values", "cache_params", "use_cache", "logits_to_keep",
})  # fmt: skip
"""Inputs that ``generate`` prepares for every causal language model, and that every decoder here takes care of."""
STATEFUL = frozenset({"SynthIDTextWatermarkLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor"})
"""Processors that follow a text step by step: they cannot be asked twice about one token."""


# -- what is asked for -------------------------------------------------------------------------------------------------
def refuse_unsupported(decoder: str, config: GenerationConfig, synced_gpus: bool) -> None:
    """Raises BadInputError for generation modes and settings that a decoder with a loop of its own cannot honour."""
    asked = {
        "num_beams > 1": (config.num_beams or 1) > 1,
        "output_attentions": bool(config.output_attentions),
        "output_hidden_states": bool(config.output_hidden_states),
        "use_cache=False": config.use_cache is False,
        "penalty_alpha (contrastive search)": bool(getattr(config, "penalty_alpha", None)),
        "dola_layers": bool(getattr(config, "dola_layers", None)),
        "prompt_lookup_num_tokens (assisted generation)": getattr(config, "prompt_lookup_num_tokens", None) is not None,
        "prefill_chunk_size": getattr(config, "prefill_chunk_size", None) is not None,
        "synced_gpus": synced_gpus,
    }
    refused = [name for name, present in asked.items() if present]
    if refused:
        raise BadInputError(
            f"{decoder} does not support {', '.join(refused)}.", "Leave it out, or decode without custom_generate."
        )


def refuse_processors(decoder: str, processors: LogitsProcessorList) -> None:
    """Raises BadInputError for processors that remember what they were asked before."""
    odd = sorted({type(item).__name__ for item in processors} & STATEFUL)
    if odd:
        raise BadInputError(
            f"{decoder} does not support {', '.join(odd)}: it weighs several candidates for a token.", "Leave it out."
        )


def refuse_inputs(decoder: str, model_kwargs: Mapping[str, Any], carried: Collection[str]) -> None:
    """Raises BadInputError for model inputs that a decoder would not pass on.

    Args:
        model_kwargs: what ``generate`` would hand to the model.
        carried: inputs passed on, beside those that ``generate`` prepares itself.
    """
    lost = [name for name in further_inputs(model_kwargs) if name not in carried]
    if lost:
        raise BadInputError(
            f"{decoder} does not pass {_listed(lost)} on to the model.",
            "Leave it out, or decode without custom_generate.",
        )


def check_undivided(decoder: str, rows: int, model_kwargs: Mapping[str, Any]) -> None:
    """Raises BadInputError for inputs of a decoder that passes them on as they are, and so with one row only."""
    given = further_inputs(model_kwargs)
    refuse_inputs(decoder, {name: model_kwargs[name] for name in given if name == "inputs_embeds"}, ())
    if rows > 1 and given:
        raise BadInputError(
            f"{decoder} decodes rows one after the other and cannot divide {_listed(given)} among them.",
            "Pass the rows one at a time.",
        )


def further_inputs(model_kwargs: Mapping[str, Any]) -> list[str]:
    """Names of the model inputs that ``generate`` does not prepare for every causal language model."""
    return sorted(name for name, value in model_kwargs.items() if value is not None and name not in PREPARED)


def _listed(names: list[str]) -> str:
    return ", ".join(sorted("pixel_values or other media" if name == "mm_encoder_outputs" else name for name in names))


def must_sync(model: PreTrainedModel) -> bool:
    """Whether every process must make the same number of forwards: weights are sharded over several.

    transformers works this out for its own loops only.
    """
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.integrations.fsdp import is_fsdp_managed_module

    sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
    return bool(sharded) and torch.distributed.get_world_size() > 1


# -- prompts -----------------------------------------------------------------------------------------------------------
def split_rows(input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A left-padded batch ``[B, T]`` as one ``(tokens, padding)`` a row.

    Raises:
        BadInputError: padding on the right or inside, or an empty row.
    """
    if mask is None:
        return [(ids, ids[:0]) for ids in input_ids]
    keep = mask[:, -input_ids.shape[1] :].bool()
    if not bool((keep.int().diff(dim=1) >= 0).all()):
        raise BadInputError("Padding must be on the left.", "Set padding_side='left' on the tokenizer.")
    lengths = keep.sum(1).tolist()
    if 0 in lengths:
        raise BadInputError(f"Row {lengths.index(0)} of the batch is empty.", "Give at least one token.")
    width = input_ids.shape[1]
    return [(ids[width - length :], ids[: width - length]) for ids, length in zip(input_ids, lengths, strict=True)]


def check_whole_text(
    decoder: str, input_ids: torch.Tensor, model_kwargs: Mapping[str, Any], config: GenerationConfig
) -> None:
    """Raises BadInputError where ``input_ids`` are only the end of a text that a cache holds the beginning of."""
    mask = model_kwargs.get("attention_mask")
    length = getattr(config, "_mask_length", input_ids.shape[1]) if mask is None else mask.shape[1]
    if length != input_ids.shape[1]:
        raise BadInputError(
            f"{decoder} got {input_ids.shape[1]} tokens and an attention mask of {length}.",
            "Pass the whole text, also what the cache holds already.",
        )


def check_positions(decoder: str, positions: torch.Tensor | None, mask: torch.Tensor | None, length: int) -> None:
    """Raises BadInputError unless ``position_ids`` ``[.., B, T]`` count each row's tokens from 0."""
    import torch

    if positions is None or positions.shape[-1] != length:
        return
    if mask is None:
        right = positions == torch.arange(length, device=positions.device)
    else:
        keep = mask[:, -length:].bool()
        right = (positions == keep.long().cumsum(-1) - 1) | ~keep
    if not bool(right.all()):
        raise BadInputError(
            f"{decoder} counts positions from 0 and cannot honour other position_ids.", "Leave position_ids out."
        )


def check_not_empty(length: int) -> None:
    """Raises BadInputError for an empty prompt."""
    if length == 0:
        raise BadInputError("The prompt is empty.", "Give at least one token (a BOS token will do).")


def check_prompt(model: PreTrainedModel, length: int) -> None:
    """Raises BadInputError for an empty prompt, or one that leaves no room in the model's context."""
    check_not_empty(length)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and 0 < context <= length:
        raise BadInputError(f"The prompt has {length} tokens; the model's context is {context}.", "Shorten the prompt.")


# -- caches ------------------------------------------------------------------------------------------------------------
def check_empty_cache(decoder: str, cache: Cache | None) -> None:
    """Raises BadInputError where ``past_key_values`` hold something already."""
    if cache is not None and is_filled(cache):
        raise BadInputError(f"{decoder} starts from an empty cache.", "Leave past_key_values out.")


def check_unread(cache: Cache, length: int) -> None:
    """Raises BadInputError where a cache leaves nothing to read of a prompt of ``length`` tokens."""
    from .row_cache import cached_length

    if cached_length(cache) >= length:
        raise BadInputError("The cache already holds the whole prompt.", "Pass at least one token beyond the cache.")


def check_one_row(decoder: str, rows: int, streamer: Any, cache: Cache | None) -> None:
    """Raises BadInputError where a batch of several rows comes with a streamer or a cache of its own, which follow
    one."""
    if rows > 1 and cache is not None and is_filled(cache):
        raise BadInputError(f"{decoder} continues a filled cache for one row only.", "Pass the rows one at a time.")
    if rows > 1 and cache is not None and is_special(cache):
        raise BadInputError(
            f"{decoder} gives every row of a batch a cache of its own and cannot use one {type(cache).__name__}.",
            "Leave cache_implementation out, or pass the rows one at a time.",
        )
    if rows > 1 and streamer is not None:
        raise BadInputError("A streamer follows one row only.", "Decode one prompt at a time.")


def is_filled(cache: Cache) -> bool:
    """Whether a cache holds anything; recurrent layers alone do not say how much."""
    try:
        return cache.get_seq_length() > 0
    except ValueError:
        return bool(cache.has_previous_state())


def is_special(cache: Cache) -> bool:
    """Whether a cache is another than ``generate``'s default: static, quantised, offloaded or a user's own class."""
    from transformers import DynamicCache

    return type(cache) is not DynamicCache or bool(getattr(cache, "offloading", False))


# -- models ------------------------------------------------------------------------------------------------------------
def check_decoder_only(decoder: str, config: PreTrainedConfig) -> None:
    """Raises UnsupportedModelError for models with an encoder."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{decoder} decodes models without an encoder; {config.model_type} has one.", "Use a causal language model."
        )


def check_same_vocabulary(target: PreTrainedModel, draft: PreTrainedModel, slack: int = 512) -> int:
    """The target's vocabulary size. The draft's may differ by padding rows, or lack tokens that were added later.

    What the draft lacks it never proposes; the target can still write it.

    Raises:
        TokenizerMismatchError: sizes differ by more than ``slack``, or both know each other's end tokens and disagree.
    """
    sizes = [model.config.get_text_config().vocab_size for model in (target, draft)]
    if abs(sizes[0] - sizes[1]) > slack:
        raise TokenizerMismatchError(
            f"The draft has a vocabulary of {sizes[1]} tokens and the target of {sizes[0]}: they use different "
            "tokenizers.",
            "Speculative decoding needs a draft with the target's own tokenizer.",
        )
    eos = [_as_set(getattr(model.config.get_text_config(), "eos_token_id", None)) for model in (target, draft)]
    known = {token for token in eos[0] if token < sizes[1]}  # the draft cannot end a text with what it does not know
    if known and eos[1] and not eos[0] & eos[1]:
        raise TokenizerMismatchError(
            f"Target and draft end a text with different tokens ({sorted(eos[0])} and {sorted(eos[1])}).",
            "Speculative decoding needs a draft with the target's own tokenizer.",
        )
    return int(sizes[0])


def _as_set(value: int | list[int] | None) -> set[int]:
    if value is None:
        return set()
    return set(value) if isinstance(value, (list, tuple, set)) else {int(value)}
