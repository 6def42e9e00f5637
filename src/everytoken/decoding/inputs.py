"""What a decoder with a loop of its own may assume of a model: what its ``forward`` takes, and how it reads a text.

Such a decoder hands the model tokens, positions and a cache. Plain ``generate`` may hand it more: images, embeddings,
the virtual tokens of a PEFT prompt. Whatever the decoder would not pass on is refused here by name, before any forward.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..core.errors import BadInputError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CACHES = ("past_key_values", "cache_params")
"""What models call the cache that they read on from."""
READ = frozenset({
    "input_ids", "attention_mask", "position_ids", *CACHES, "use_cache", "logits_to_keep", "cache_position",
})  # fmt: skip
"""What a loop over rows gives to a model, or leaves to the model's own defaults."""
TREE_ATTENTION = frozenset({"eager", "sdpa", "flex_attention"})
"""Implementations of attention that take a mask with a row for each node of a tree."""
FRAMES = 3
"""How far up ``generate`` is looked for: it calls a decoder directly, or through a function of the user's."""


# -- what a model takes ------------------------------------------------------------------------------------------------
_parameters: WeakKeyDictionary[type[PreTrainedModel], frozenset[str]] = WeakKeyDictionary()


def takes(model: PreTrainedModel, name: str) -> bool:
    """Whether ``forward`` names this argument. One that falls into its ``**kwargs`` may be ignored without a word."""
    kind = type(model)
    if kind not in _parameters:
        _parameters[kind] = frozenset(inspect.signature(kind.forward).parameters)
    return name in _parameters[kind]


def cache_argument(model: PreTrainedModel) -> str | None:
    """What ``forward`` calls the cache that it reads on from; None where it takes none."""
    return next((name for name in CACHES if takes(model, name)), None)


def keeps_state_in_layers(model: PreTrainedModel) -> bool:
    """Whether some layer keeps a recurrent state of the last text in itself."""
    return any(hasattr(module, "recurrent_states") for module in model.modules())


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model takes its inputs: for weights that accelerate offloads, where it computes.

    Raises:
        UnsupportedModelError: the weights are on the meta device and nothing loads them.
    """
    import torch

    if model.device.type != "meta":
        return model.device
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in (hook, *getattr(hook, "hooks", ())):
            device = getattr(part, "execution_device", None)
            if device is not None:
                return torch.device(device)
    raise UnsupportedModelError(
        f"The weights of this {type(model).__name__} are on the meta device: there are none.",
        "Load it with from_pretrained, or offload it with accelerate's hooks.",
    )


def is_offloaded(model: PreTrainedModel) -> bool:
    """Whether some weights are on the meta device while no forward runs."""
    return any(weight.device.type == "meta" for weight in model.parameters())


def changes_inputs(model: PreTrainedModel) -> str | None:
    """Who puts something in front of the inputs of this one model, as PEFT's prompt learning does; None: nobody."""
    patched = vars(model).get("prepare_inputs_for_generation")
    if patched is None:
        return None
    owner = getattr(patched, "__self__", None)
    if owner is model:
        return None  # its own method, which PEFT puts back after a call
    active = getattr(owner, "active_peft_config", None)
    if active is not None and not active.is_prompt_learning:
        return None  # adapters are in the weights
    method = getattr(active, "peft_type", None)
    return "a replaced prepare_inputs_for_generation" if method is None else f"PEFT's {method.value.lower()}"


# -- what is refused ---------------------------------------------------------------------------------------------------
def check_reads_text(decoder: str, model: PreTrainedModel, recurrent: bool = False) -> None:
    """Raises UnsupportedModelError for a model that tokens and a cache of keys and values do not suffice for.

    Args:
        recurrent: models that keep a state beside their cache are welcome.
    """
    kind = type(model).__name__
    device_of(model)
    if getattr(model, "_is_stateful", False) and not recurrent:
        raise UnsupportedModelError(
            f"{decoder} reads several tokens at a time into a cache; {kind} keeps a recurrent state instead.",
            "Use a model with attention only, or decode without custom_generate.",
        )
    lacking = [] if takes(model, "input_ids") else ["input_ids"]
    lacking += [] if cache_argument(model) else ["past_key_values"]
    if lacking:
        raise UnsupportedModelError(
            f"{decoder} decodes with tokens and a cache; {kind}.forward does not take {' and '.join(lacking)}.",
            "Decode without custom_generate.",
        )


def check_unchanged_inputs(decoder: str, model: PreTrainedModel) -> None:
    """Raises BadInputError where PEFT, or the user, puts something in front of the model's inputs."""
    changed = changes_inputs(model)
    if changed is not None:
        raise BadInputError(
            f"{decoder} reads a text's tokens alone and cannot take {changed} into account.",
            "Use an adapter in the weights such as LoRA, or decode without custom_generate.",
        )


def check_prepared_inputs(
    decoder: str, model: PreTrainedModel, input_ids: torch.Tensor, model_kwargs: Mapping[str, Any]
) -> None:
    """Raises BadInputError for inputs that the model's own ``prepare_inputs_for_generation`` adds to the user's."""
    added = added_inputs(model, input_ids, model_kwargs)
    if added:
        raise BadInputError(
            f"{decoder} does not pass {', '.join(added)} on to the model, which {type(model).__name__} asks for.",
            "Decode without custom_generate.",
        )


def added_inputs(model: PreTrainedModel, input_ids: torch.Tensor, model_kwargs: Mapping[str, Any]) -> list[str]:
    """Names of what ``prepare_inputs_for_generation`` hands to a model beside tokens, positions and a cache."""
    given = {name: value for name, value in model_kwargs.items() if value is not None}
    prepared = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **given)
    return sorted(name for name, value in prepared.items() if name not in READ and _says_something(value))


def _says_something(value: Any) -> bool:
    return value is not None and value is not False


def check_flex(decoder: str, model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError for flex attention on a CPU: torch cannot compile it for one token there."""
    attention = getattr(model.config.get_text_config(), "_attn_implementation", None)
    if attention == "flex_attention" and device_of(model).type == "cpu":
        raise UnsupportedModelError(
            f"{decoder} does not support flex_attention on a CPU: torch cannot compile it for one token.",
            "Load the model with attn_implementation='sdpa'.",
        )


def check_trees(decoder: str, model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError for a model that cannot read the nodes of a tree in one forward.

    Every node needs a position of its own, and a mask that shows it its ancestors only.
    """
    kind, config = type(model).__name__, model.config.get_text_config()
    if not takes(model, "position_ids") or getattr(config, "alibi", False):
        raise UnsupportedModelError(
            f"{decoder} gives every node of its tree the position of its depth; {kind} counts positions itself "
            "(as ALiBi does).",
            "Use a model with rotary or learned positions, or decode without custom_generate.",
        )
    attention = getattr(config, "_attn_implementation", None)
    if attention is not None and attention not in TREE_ATTENTION:
        raise UnsupportedModelError(
            f"{decoder} masks every node of its tree for itself; attention {attention!r} takes no such mask.",
            "Load the model with attn_implementation='sdpa'.",
        )


# -- what generate does not hand on ------------------------------------------------------------------------------------
def callers_arguments(names: Iterable[str]) -> dict[str, Any]:
    """Arguments of the ``model.generate`` that called a decoder, which transformers does not hand to callables.

    Call it from ``Decoder.__call__``. Returns those that were given; nothing where ``generate`` is not the caller.
    """
    from transformers import GenerationMixin

    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = sys._getframe(2)
    for _ in range(FRAMES):
        if frame.f_code is code:
            found = {name: frame.f_locals.get(name) for name in names}
            return {name: value for name, value in found.items() if value is not None}
        if frame.f_back is None:
            break
        frame = frame.f_back
    return {}
