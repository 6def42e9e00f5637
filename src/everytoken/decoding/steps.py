"""Texts read as ``generate``'s own loop reads them: the prompt in one forward, then one token each.

The model prepares its inputs itself and keeps what it has read where it will: in a cache, in a state of its own, or
nowhere. So a decoder that only ever reads what it has written serves every model that plain ``generate`` serves, and
passes on every input that plain ``generate`` would pass on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, DynamicCache
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL as MEDIA

from ..core.errors import BadInputError, UnsupportedModelError
from .checks import further_inputs
from .inputs import added_inputs, cache_argument, changes_inputs, device_of, keeps_state_in_layers, takes
from .row_cache import RowCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .call import DecodingCall
    from .row import DecodingRow

BY_ROW = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
"""Inputs ``[.., B, N]`` that grow with every token."""


def needs_steps(call: DecodingCall[Any]) -> bool:
    """Whether tokens, positions and a cache of transformers' kind are not all that a model is handed or keeps."""
    model = call.model
    return (
        not takes(model, "input_ids")
        or cache_argument(model) is None
        or keeps_state_in_layers(model)
        or not model._supports_default_dynamic_cache()
        or changes_inputs(model) is not None
        or bool(further_inputs(call.model_kwargs))
        or bool(added_inputs(model, call.input_ids, call.model_kwargs))
    )


class Steps:
    """One or several texts of equal length, which share every forward.

    Args:
        model: reads the texts.
        inputs: what ``generate`` prepared for the model beside the tokens; see ``inputs_of_row``.
    """

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Any]):
        self.model, self.inputs, self.length = model, dict(inputs), 0

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, V]`` float32 behind texts ``[B, N]``: what is new of a prompt in one forward, then a token
        each."""
        if self.length == 0:
            cache = self.inputs.get("past_key_values")
            unread = None if cache is None else ids.shape[1] - int(cache.get_seq_length())
            logits = self._forward(ids, unread, first=True)
        else:
            for end in range(self.length + 1, ids.shape[1] + 1):
                logits = self._forward(ids[:, :end], 1 if self.inputs.get("use_cache", True) else None)
        self.length = ids.shape[1]
        return logits

    def _forward(self, ids: torch.Tensor, new: int | None, first: bool = False) -> torch.Tensor:
        inputs = self.model.prepare_inputs_for_generation(
            ids, next_sequence_length=new, is_first_iteration=first, **self.inputs
        )
        output = self.model(**inputs, return_dict=True)
        self.inputs = self.model._update_model_kwargs_for_generation(output, self.inputs)
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    @property
    def cache(self) -> Cache | None:
        """transformers' cache of the texts, or None where the model keeps what it has read elsewhere."""
        held = [self.inputs.get(name) for name in ("past_key_values", "cache_params")]
        return next((item for item in held if isinstance(item, Cache)), None)

    def pick(self, places: list[int]) -> None:
        """Goes on with the texts at ``places``, which may be left out or repeated."""
        index = torch.tensor(places, device=device_of(self.model))
        for name, value in self.inputs.items():
            if isinstance(value, Cache):
                value.reorder_cache(index)
            elif name in BY_ROW and isinstance(value, torch.Tensor):
                self.inputs[name] = value.index_select(-2, index)


def check_pickable(decoder: str, model: PreTrainedModel, model_kwargs: dict[str, Any]) -> None:
    """Refuses what cannot be picked by text where several texts share a forward.

    Raises:
        UnsupportedModelError: a model that keeps its state elsewhere than in a cache of transformers.
        BadInputError: inputs beside those of the prompt's tokens and media.
    """
    elsewhere = cache_argument(model) is not None and not model._supports_default_dynamic_cache()
    if elsewhere or keeps_state_in_layers(model) or takes(model, "state") or takes(model, "mems"):
        raise UnsupportedModelError(
            f"{decoder} picks among texts that share a forward; {type(model).__name__} keeps its state elsewhere than "
            "in a cache of transformers.",
            "Decode one text at a time.",
        )
    odd = [name for name in further_inputs(model_kwargs) if name not in (*BY_ROW, *MEDIA)]
    odd += [changed] if (changed := changes_inputs(model)) else []
    if odd:
        raise BadInputError(f"{decoder} cannot pick {', '.join(odd)} by text.", "Decode one text at a time.")


def inputs_of_row(call: DecodingCall[Any], row: DecodingRow) -> dict[str, Any]:
    """What ``generate`` prepared for one row of a call: all of it for a row alone, else what belongs to its text."""
    if len(call.rows) == 1:
        return dict(call.model_kwargs)
    model, length = call.model, len(row.text)
    inputs = {name: value for name, value in call.model_kwargs.items() if name in ("use_cache", "logits_to_keep")}
    inputs["attention_mask"] = torch.ones(1, length, dtype=torch.long, device=row.device)
    if takes(model, "position_ids"):
        inputs["position_ids"] = torch.arange(length, device=row.device)[None]
    name = cache_argument(model)
    if name is not None and call.model_kwargs.get(name) is not None:
        inputs[name] = DynamicCache(config=model.config.get_text_config(decoder=True))
    return inputs


def ids_of_row(call: DecodingCall[Any], row: DecodingRow) -> torch.Tensor:
    """A row's text as ``inputs_of_row`` describes it, ``[1, N]``: with its padding where it is alone."""
    return row.ids if len(call.rows) == 1 else row.ids[:, len(row.padding) :]


def reader(call: DecodingCall[Any], row: DecodingRow) -> Callable[[], torch.Tensor]:
    """A function that reads what is new of a row's text: logits ``[V]`` float32 of the next token.

    Several new tokens are read in one forward where the model can read on from a cache so.
    """
    vocab = call.vocab_size
    if call.by_steps:
        steps = Steps(call.model, inputs_of_row(call, row))

        def step() -> torch.Tensor:
            logits = steps.read(ids_of_row(call, row))
            row.cache = steps.cache if len(call.rows) == 1 else None
            return logits[0, :vocab]

        return step
    held = RowCache(call.model, row.cache)
    held.prompt = held.length or None

    def read() -> torch.Tensor:
        logits: torch.Tensor = held.read(row.text)["logits"]
        return logits[0, -1, :vocab].float()

    return read
