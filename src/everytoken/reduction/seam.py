"""``with reduce_tokens(model, DivPrune(keep=0.1)): model.generate(**inputs)``: fewer visual tokens, unpatched model.

Inside the block the one model reduces the visual tokens of every prompt, in ``generate`` and in plain calls (training
included); other models of the class do not, and behind the block nothing of it is left. Hooks of torch and
transformers' own ``mm_encoder_outputs`` do it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import BadInputError
from .base import Reducer
from .decoder_cut import DecoderCut
from .inputs import ReducedInputs, check_reducer, reduce_inputs
from .inside import DecoderReducer

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


@dataclass
class ReducedRun:
    """What ``reduce_tokens`` hands to its block.

    Attributes:
        last: the latest batch after the reduction at the input; None before the first.
        lengths: decoder layer -> ``[B]`` tokens that it saw of each prompt, where a reducer cuts inside the decoder.
    """

    last: ReducedInputs | None = None
    lengths: dict[int, list[int]] = field(default_factory=dict)


@contextlib.contextmanager
def reduce_tokens(
    model: PreTrainedModel,
    reducer: Reducer,
    positions: str | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[ReducedRun]:
    """Reduces the visual tokens of every prompt that the model reads inside the block.

    ``generate`` returns the prompts as they were given with the new tokens behind them, and ``max_length`` counts the
    prompts as given. Logits of a plain call are those of the shorter sequences: ``run.last.index`` says which token
    each one belongs to; labels are shortened alike. Streamers, processors and criteria of ``generate`` see the shorter
    prompts. ``segments`` (see ``reduce_inputs``) may be given as one more argument of the call.

    Args:
        model: of a class in ``reduction.families.FAMILIES``.
        reducer: the method.
        positions: ``"packed"``, ``"original"`` or None; see ``reduce_inputs``.
        generator: of random choices.

    Raises:
        UnsupportedModelError: a class or an encoder that the reducer cannot work with; said at once.
        BadInputError: two blocks at once on one model. In the block: a prompt without images, a call that continues
            from a cache, and for a reducer inside the decoder also labels, beams, static caches and assisted decoding.
    """
    family, used = check_reducer(model, reducer, positions)
    gaps = used == "original" and not family.axes
    if "generate" in vars(model):
        raise BadInputError("This model is inside another reduce_tokens block already.", "Leave that one first.")
    run, own = ReducedRun(), threading.local()
    cut = DecoderCut(model, reducer) if isinstance(reducer, DecoderReducer) else None
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    plain = functools.partial(type(model).generate, model)

    def reduced(inputs: dict[str, Any]) -> ReducedInputs:
        segments = inputs.pop("segments", None)
        run.last = reduce_inputs(model, reducer, inputs, positions, segments, generator)
        return run.last

    def before(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        if getattr(own, "inside", False):
            return None
        inputs = dict(zip(names, args, strict=False)) | kwargs
        check_fresh(inputs)
        if cut is not None and inputs.get("labels") is not None:
            raise BadInputError(f"{type(reducer).__name__} cuts inside the decoder and cannot be trained through.")
        batch = reduced(inputs)
        if cut is not None:
            cut.start(batch)
        return (), batch.arguments

    def after(_module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
        if cut is not None and not getattr(own, "inside", False):
            run.lengths = cut.finish()

    @torch.no_grad()
    def generate(inputs: torch.Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        if inputs is not None:
            kwargs["input_ids"] = inputs
        check_fresh(kwargs)
        config = generation_config if generation_config is not None else model.generation_config
        check_generate(reducer, config, kwargs, cut is not None, gaps)
        batch = reduced(kwargs)
        arguments = batch.arguments
        removed = batch.input_ids.shape[1] - arguments["input_ids"].shape[1]
        limited, arguments = shorter_limits(config, arguments, removed)
        check_copies(config, arguments)
        if limited is not config:
            generation_config = limited
        own.inside = True
        if cut is not None:
            cut.start(batch)
        try:
            output = plain(generation_config=generation_config, **arguments)
        finally:
            own.inside = False
            if cut is not None:
                run.lengths = cut.finish()
        return with_prompts(output, batch)

    with contextlib.ExitStack() as undo:
        undo.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        undo.callback(model.register_forward_hook(after, with_kwargs=True).remove)
        if cut is not None:
            undo.enter_context(cut.attached())
        model.generate = generate  # type: ignore[method-assign, assignment]
        undo.callback(delattr, model, "generate")
        yield run


def check_fresh(inputs: dict[str, Any]) -> None:
    """Raises BadInputError where a call continues from a cache that holds something."""
    cache = inputs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise BadInputError(
            "A call that continues from a cache cannot be reduced: the cache holds the shorter prompt.",
            "Use generate, which does the whole text, or leave the block for the calls that follow.",
        )


def setting(config: Any, arguments: dict[str, Any], name: str) -> Any:
    """A setting of ``generate``: from the call, else from the generation configuration."""
    return arguments[name] if name in arguments else getattr(config, name, None)


def check_generate(reducer: Reducer, config: Any, arguments: dict[str, Any], cuts: bool, gaps: bool) -> None:
    """Raises BadInputError for ways of generating that would silently go wrong; said before the encoder runs.

    Args:
        cuts: the reducer cuts inside the decoder.
        gaps: positions have gaps, which transformers takes for separate texts where there is neither mask nor cache.
    """
    name = type(reducer).__name__
    mask, ids = arguments.get("attention_mask"), arguments.get("input_ids")
    pad = setting(config, arguments, "pad_token_id")
    if mask is None and pad is not None and ids is not None and bool((ids == pad).any()):
        raise BadInputError("The prompts contain the padding token but there is no attention_mask.", "Give the mask.")
    if setting(config, arguments, "use_cache") is False and (cuts or gaps):
        raise BadInputError("Original positions and cuts inside the decoder need the cache.", "Drop use_cache=False.")
    if not cuts:
        return
    if any(setting(config, arguments, key) is not None for key in ASSISTED):
        raise BadInputError(f"{name} leaves caches of unequal length, which assisted decoding cannot rewind.")
    cache = arguments.get("past_key_values")
    if setting(config, arguments, "cache_implementation") not in (None, "dynamic") or (
        cache is not None and type(cache).__name__ != "DynamicCache"
    ):
        raise BadInputError(f"{name} leaves caches of unequal length, which only the dynamic cache can hold.")
    if (setting(config, arguments, "num_beams") or 1) > 1:
        raise BadInputError(f"{name} leaves caches of unequal length; beams are not supported with them.")
    if setting(config, arguments, "prefill_chunk_size") is not None or arguments.get("custom_generate") is not None:
        raise BadInputError(f"{name} reads the prompt at once: no prefill_chunk_size and no custom_generate with it.")


def check_copies(config: Any, arguments: dict[str, Any]) -> None:
    """Raises BadInputError where transformers would deal out the features of several prompts wrongly to copies."""
    copies = max(setting(config, arguments, key) or 1 for key in ("num_beams", "num_return_sequences"))
    if copies == 1 or len(arguments["input_ids"]) == 1:
        return
    for output in arguments["mm_encoder_outputs"].values():
        joined = output.pooler_output
        if isinstance(joined, torch.Tensor) and len(joined) == 1:
            raise BadInputError(
                "Images that keep different numbers of tokens cannot be copied for beams or several answers here.",
                "Give one prompt at a time, or a reducer that keeps the same number for every image.",
            )


def shorter_limits(config: Any, arguments: dict[str, Any], removed: int) -> tuple[Any, dict[str, Any]]:
    """Limits of ``generate`` that count the prompt, for a prompt that is ``removed`` tokens shorter.

    Returns:
        The configuration (a copy where it changed) and the arguments.
    """
    if not removed:
        return config, arguments
    arguments, changed = dict(arguments), {}
    for name, own in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        limit = setting(config, arguments, name)
        if not limit or setting(config, arguments, own) is not None:
            continue
        if name in arguments:
            arguments[name] = max(limit - removed, 0)
        else:
            changed[name] = max(limit - removed, 0)
    if changed:
        config = copy.deepcopy(config)
        config.update(**changed)
    return config, arguments


def with_prompts(output: Any, batch: ReducedInputs) -> Any:
    """What ``generate`` returned, with the prompts as they were given."""
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    new = sequences[:, batch.arguments["input_ids"].shape[1] :]
    prompts = batch.input_ids.to(new.device).repeat_interleave(len(new) // len(batch.input_ids), 0)
    whole = torch.cat([prompts, new], -1)
    if isinstance(output, torch.Tensor):
        return whole
    output.sequences = whole
    return output
