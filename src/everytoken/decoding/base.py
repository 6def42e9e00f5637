"""The station's contract: a Decoder.

A decoder is a dataclass of its settings that is callable as transformers' ``custom_generate``::

    model.generate(**inputs, max_new_tokens=64, custom_generate=DySpec(draft))

transformers prepares prompts, logits processors and stopping criteria and calls
``decoder(model, input_ids, logits_processor=..., stopping_criteria=..., generation_config=..., **model_kwargs)``. A decoder
honours all of them, or refuses by name what it cannot honour, before any forward pass. After a call ``decoder.stats`` holds
the counters, and ``decoder.trace`` one TokenTrace for each row if the decoder was built with ``trace=True``.

transformers does not hand ``streamer`` (nor the tokenizer that stop strings need) to callables; ``decoder.generate(model,
**inputs, streamer=..., tokenizer=...)`` does, and is otherwise ``model.generate``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.errors import BadInputError, TokenizerMismatchError, UnsupportedModelError
from ..core.trace import TokenTrace

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel


@dataclass
class DecodingStats:
    """Counters of one ``generate`` call, summed over its rows.

    Attributes:
        new_tokens: tokens returned.
        target_forwards: forward passes of the model itself, the prompt's included.
        draft_forwards: forward passes of a helper model.
        proposed: tokens proposed by the helper.
        accepted: proposals kept.
        rounds: verification rounds.
        seconds: wall-clock time of the call.
    """

    new_tokens: int = 0
    target_forwards: int = 0
    draft_forwards: int = 0
    proposed: int = 0
    accepted: int = 0
    rounds: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def mean_accepted(self) -> float:
        """Accepted proposals per round (each round adds one token of the target's own on top)."""
        return self.accepted / self.rounds if self.rounds else 0.0

    def as_dict(self) -> dict[str, float]:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return values | {"tokens_per_second": self.tokens_per_second, "mean_accepted": self.mean_accepted}


BY_NAME: dict[str, Any] = {"text": (str, type(None))}
"""Metadata of a field that takes a model, or its hub id or folder."""


@dataclass
class Decoder:
    """Base of every decoder: settings are fields; ``__call__`` is a transformers ``custom_generate``."""

    trace_enabled: bool = field(default=False, kw_only=True)
    stats: DecodingStats = field(default_factory=DecodingStats, init=False, repr=False)
    trace: list[TokenTrace] = field(default_factory=list, init=False, repr=False)

    colour: ClassVar[str] = "source"
    """The trace's column to look at first."""
    streams: ClassVar[bool] = True
    """Whether tokens are final as they appear, so that a streamer can follow."""
    extrapolates: ClassVar[bool] = False
    """Whether prompts may be longer than the model's context."""
    lossless: ClassVar[bool] = True
    """Whether greedy decoding gives the text of plain greedy decoding."""
    samples_only: ClassVar[bool] = False
    """Whether greedy decoding is refused."""

    def prepare(self, tokenizer: Any, vocab_size: int) -> Any:
        """Tells the decoder of the tokenizer and the width of the logits, where it needs them; returns it."""
        return self

    def load_helpers(self, model: PreTrainedModel) -> None:
        """Loads further models that were named by hub id or folder, or that ship with the package, before any time is taken."""

    def figures(self) -> dict[str, float]:
        """What is worth comparing after a call, beside speed."""
        figures = {"target forwards": float(self.stats.target_forwards)}
        if self.stats.draft_forwards:
            figures |= {"accepted a round": self.stats.mean_accepted, "proposed": float(self.stats.proposed)}
        return figures

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: GenerationConfig | None = None,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decodes; returns what ``generate`` would (ids, or a dict with ``return_dict_in_generate``)."""
        raise NotImplementedError

    def generate(self, model: PreTrainedModel, *args: Any, streamer: Any = None, **kwargs: Any) -> Any:
        """``model.generate`` through this decoder, with a streamer and with stop strings (``tokenizer=``)."""
        tokenizer = kwargs.pop("tokenizer", None)
        stop_strings = kwargs.pop("stop_strings", None)
        config = kwargs.get("generation_config")
        if stop_strings is None and config is not None:
            stop_strings = config.stop_strings
        if stop_strings is not None:
            from transformers import StoppingCriteriaList, StopStringCriteria

            if tokenizer is None:
                raise BadInputError("stop_strings need the tokenizer.", "Pass tokenizer=... as well.")
            criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
            criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings))
            kwargs["stopping_criteria"] = criteria
            if config is not None and config.stop_strings is not None:
                import copy

                kwargs["generation_config"] = copy.copy(config)
                kwargs["generation_config"].stop_strings = None
        call = functools.partial(self, streamer=streamer) if streamer is not None else self
        return model.generate(*args, custom_generate=call, streamer=streamer, **kwargs)


def refuse_unsupported(decoder: str, config: GenerationConfig, synced_gpus: bool) -> None:
    """Raises BadInputError for generation modes that a one-path decoder cannot honour."""
    asked = {
        "num_beams > 1": (config.num_beams or 1) > 1,
        "output_attentions": bool(config.output_attentions),
        "output_hidden_states": bool(config.output_hidden_states),
        "use_cache=False": config.use_cache is False,
        "penalty_alpha (contrastive search)": bool(getattr(config, "penalty_alpha", None)),
        "dola_layers": bool(getattr(config, "dola_layers", None)),
        "synced_gpus": synced_gpus,
    }
    refused = [name for name, present in asked.items() if present]
    if refused:
        raise BadInputError(
            f"{decoder} does not support {', '.join(refused)}.", "Leave it out, or decode without custom_generate."
        )


def split_rows(input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A left-padded batch ``[B, T]`` as one ``(tokens, padding)`` a row.

    Raises:
        BadInputError: padding on the right or inside, or an empty row.
    """
    rows = []
    for row in range(input_ids.shape[0]):
        ids = input_ids[row]
        if mask is None:
            rows.append((ids, ids[:0]))
            continue
        keep = mask[row, -ids.shape[0] :].bool()
        if not bool(keep[keep.int().argmax() :].all()):
            raise BadInputError("Padding must be on the left.", "Set padding_side='left' on the tokenizer.")
        if not bool(keep.any()):
            raise BadInputError(f"Row {row} of the batch is empty.", "Give at least one token.")
        rows.append((ids[keep], ids[~keep]))
    return rows


def check_empty_cache(decoder: str, cache: Any) -> None:
    """Raises BadInputError where ``past_key_values`` hold something already."""
    if cache is not None and cache.get_seq_length() > 0:
        raise BadInputError(f"{decoder} starts from an empty cache.", "Leave past_key_values out.")


def check_unread(cache: Any, length: int) -> None:
    """Raises BadInputError where a cache leaves nothing to read of a prompt of ``length`` tokens."""
    if cache.get_seq_length() >= length:
        raise BadInputError("The cache already holds the whole prompt.", "Pass at least one token beyond the cache.")


def check_one_row(decoder: str, rows: int, streamer: Any, cache: Any) -> None:
    """Raises BadInputError where a batch of several rows comes with a streamer or a filled cache, which follow one."""
    if rows > 1 and cache is not None and cache.get_seq_length() > 0:
        raise BadInputError(f"{decoder} continues a filled cache for one row only.", "Pass the rows one at a time.")
    if rows > 1 and streamer is not None:
        raise BadInputError("A streamer follows one row only.", "Decode one prompt at a time.")


def join_rows(input_ids: torch.Tensor, new: list[list[int]], config: GenerationConfig) -> torch.Tensor:
    """The prompts with each row's new tokens behind them, padded on the right: ``[B, T + longest]``."""
    import torch

    pad = getattr(config, "_pad_token_tensor", None)
    pad_id = int(pad) if pad is not None else (config.pad_token_id or 0)
    longest = max(map(len, new))
    block = torch.full((len(new), longest), pad_id, dtype=input_ids.dtype, device=input_ids.device)
    for row, tokens in enumerate(new):
        block[row, : len(tokens)] = torch.tensor(tokens, dtype=input_ids.dtype)
    return torch.cat([input_ids, block], dim=1)


def check_not_empty(length: int) -> None:
    """Raises BadInputError for an empty prompt."""
    if length == 0:
        raise BadInputError("The prompt is empty.", "Give at least one token (a BOS token will do).")


def check_prompt(model: PreTrainedModel, length: int) -> None:
    """Raises BadInputError for an empty prompt, or one that leaves no room in the model's context."""
    check_not_empty(length)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and length >= context:
        raise BadInputError(f"The prompt has {length} tokens; the model's context is {context}.", "Shorten the prompt.")


def attention_mask_for(model: Any, allowed: torch.Tensor) -> torch.Tensor:
    """A boolean mask in the form that the model's attention takes: eager attention adds it to its scores."""
    import torch

    if getattr(model.config, "_attn_implementation", None) != "eager":
        return allowed
    return torch.zeros(allowed.shape, dtype=model.dtype, device=allowed.device).masked_fill(
        ~allowed, torch.finfo(model.dtype).min
    )


def check_same_vocabulary(target: PreTrainedModel, draft: PreTrainedModel, slack: int = 512) -> int:
    """The vocabulary size both share; sizes may differ by padding rows only.

    Raises:
        TokenizerMismatchError: sizes differ by more than ``slack``, or special token ids disagree.
    """
    sizes = [model.config.get_text_config().vocab_size for model in (target, draft)]
    if abs(sizes[0] - sizes[1]) > slack:
        raise TokenizerMismatchError(
            f"The draft has a vocabulary of {sizes[1]} tokens and the target of {sizes[0]}: they use different tokenizers.",
            "Speculative decoding needs a draft with the target's own tokenizer.",
        )
    eos = [_as_set(model.config.get_text_config().eos_token_id) for model in (target, draft)]
    if eos[0] and eos[1] and not eos[0] & eos[1]:
        raise TokenizerMismatchError(
            f"Target and draft end a text with different tokens ({sorted(eos[0])} and {sorted(eos[1])}).",
            "Speculative decoding needs a draft with the target's own tokenizer.",
        )
    return min(sizes)


def _as_set(value: Any) -> set[int]:
    if value is None:
        return set()
    return set(value) if isinstance(value, (list, tuple, set)) else {int(value)}


def check_croppable(decoder: str, cache: Any) -> None:
    """Raises UnsupportedModelError unless every layer of the cache is a plain growing one (rows can be dropped)."""
    from transformers.cache_utils import DynamicLayer

    odd = sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer})
    if odd or not hasattr(cache, "layers"):
        raise UnsupportedModelError(
            f"{decoder} must drop rejected tokens from the cache; this model's cache has {', '.join(odd)} layers.",
            "Models with sliding windows, static or recurrent caches are not supported.",
        )
