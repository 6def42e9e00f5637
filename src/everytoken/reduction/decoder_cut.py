"""Cuts inside the language model: behind a layer, visual tokens are dropped and the next layers never see them.

Forward pre-hooks on the decoder's layers do it. At the prompt the hidden states are gathered once behind each cut, and
for all layers behind it the masks and the rotary tables are gathered alike; a token keeps its position. The cache then
holds fewer tokens in later layers. At every later step the mask, which the model makes for the first layer's cache, is
gathered to what each layer holds. The result equals the full model in which the dropped tokens are hidden from the
layers behind the cut.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import UnsupportedModelError
from .capture import attention_row, reading
from .inputs import ReducedInputs, compact
from .inside import DecoderReducer, DecoderStage, DecoderView

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

KERNELS = ("sdpa", "eager")


@dataclass
class _Held:
    """What a layer holds of the prompt.

    Attributes:
        places: ``[B, L_k]`` places in the sequence that the first layer holds.
        there: ``[B, L_k]``, False for padding.
    """

    places: torch.Tensor
    there: torch.Tensor


class _Run:
    """One batch on its way through the layers."""

    def __init__(self, batch: ReducedInputs):
        self.batch = batch
        self.there = batch.index >= 0
        self.held: dict[int, _Held] = {}
        self.rows: dict[int, torch.Tensor] = {}
        self.prompt: int | None = None  # the length of the prompt, once the first layer has been called
        self.prefill = False
        self.copies = 1

    def begin(self, hidden: torch.Tensor) -> None:
        """Called at the first layer."""
        self.prefill = self.prompt is None
        if self.prompt is None:
            self.prompt = hidden.shape[1]
            self.copies = len(hidden) // len(self.there)
            whole = torch.arange(self.prompt, device=hidden.device).expand(len(hidden), -1)
            self.held[0] = _Held(whole, self.spread(self.there))

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Per prompt -> per row, where ``generate`` makes several answers of one prompt."""
        return values.repeat_interleave(self.copies, 0)

    def read(self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        """Keeps the attention row of every prompt's last token."""
        if not self.prefill:
            return
        there = self.held[layer].there
        length = there.shape[1]
        last = length - 1 - there.int().flip(-1).argmax(-1)
        chosen = query[torch.arange(len(query), device=query.device), :, last]
        self.rows[layer] = attention_row(chosen, key[:, :, -length:], scale, there)

    def cut(self, stage: DecoderStage, hidden: torch.Tensor) -> torch.Tensor:
        """Drops what a stage does not keep from the output of its layer; returns what goes on."""
        held = self.held[stage.after]
        units, segments = (self.spread(item).gather(1, held.places) for item in (self.batch.units, self.batch.segments))
        keep = held.there & (units < 0)
        for row in range(len(hidden)):
            there = held.there[row]
            view = DecoderView(
                hidden[row][there].detach(),
                units[row][there],
                segments[row][there],
                {layer: self.rows[layer][row][there] for layer in stage.rows},
                self.batch.totals,
            )
            keep[row, there] |= stage.choose(view)
        order, there = compact(keep, right=bool((~held.there[:, -1]).any()))
        self.held[stage.after + 1] = _Held(held.places.gather(1, order), there)
        return hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))

    def arguments(self, layer: int, hidden: torch.Tensor, given: dict[str, Any]) -> dict[str, Any]:
        """The layer's arguments for what it holds; ``given`` are those for the first layer."""
        held = self.held[layer]
        changed = dict(given)
        mask = given.get("attention_mask")
        if self.prefill:
            changed["attention_mask"] = self.prompt_mask(held, mask)
            tables = given.get("position_embeddings")
            if tables is not None:
                changed["position_embeddings"] = tuple(_gathered(table, held.places, -2) for table in tables)
            if given.get("position_ids") is not None:
                changed["position_ids"] = _gathered(given["position_ids"], held.places, -1)
            return changed
        assert self.prompt is not None
        if mask is not None:
            new = torch.arange(self.prompt, mask.shape[-1], device=mask.device).expand(len(held.places), -1)
            columns = torch.cat([held.places, new], -1)
            there = torch.cat([held.there, torch.ones_like(new, dtype=torch.bool)], -1)
            mask = mask.expand(len(columns), -1, -1, -1)
            mask = mask.gather(-1, columns[:, None, None].expand(-1, *mask.shape[1:3], -1))
            changed["attention_mask"] = _hidden(mask, there[:, None, None])
        elif not bool(held.there.all()):
            new = given["past_key_values"].get_seq_length(layer) + hidden.shape[1] - held.there.shape[1]
            there = torch.nn.functional.pad(held.there, (0, new), value=True)
            changed["attention_mask"] = there[:, None, None]
        return changed

    def prompt_mask(self, held: _Held, mask: torch.Tensor | None) -> torch.Tensor | None:
        """The mask of the prompt, gathered on both axes; made where padding came in and there was none."""
        if mask is None:
            if bool(held.there.all()):
                return None
            length = held.there.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool, device=held.there.device).tril()
            # a row of padding sees itself: a softmax over nothing is not a number
            return (causal & held.there[:, None, None]) | torch.eye(length, dtype=torch.bool, device=held.there.device)
        mask = mask.expand(len(held.places), -1, -1, -1)
        mask = mask.gather(-2, held.places[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))
        mask = mask.gather(-1, held.places[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
        seen = held.there[:, None, None] | torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
        return _hidden(mask, seen)


def _gathered(values: torch.Tensor, places: torch.Tensor, axis: int) -> torch.Tensor:
    """Gathers along the sequence's axis; leading axes are broadcast, the batch's is the one before."""
    if axis == -1:
        values = values.expand(*values.shape[:-2], len(places), -1)
        return values.gather(-1, places.expand(*values.shape[:-2], -1, -1))
    values = values.expand(*values.shape[:-3], len(places), -1, -1)
    return values.gather(-2, places[..., None].expand(*values.shape[:-3], -1, -1, values.shape[-1]))


def _hidden(mask: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """A mask (True or 0 for what is seen) in which more is hidden."""
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


class DecoderCut:
    """Applies the stages of a reducer to one model.

    Args:
        model: the vision-language model.
        reducer: its stages are asked for once.

    Raises:
        UnsupportedModelError: a cut behind a layer that does not exist, layers with a sliding window, or an attention
            kernel whose masks cannot be gathered.
    """

    def __init__(self, model: PreTrainedModel, reducer: DecoderReducer):
        self.layers = model.get_decoder().layers
        self.stages = {stage.after: stage for stage in reducer.stages()}
        name, text = type(reducer).__name__, model.config.get_text_config()
        if not self.stages:
            raise UnsupportedModelError(f"{name} names no layer to cut behind.")
        depth, last = len(self.layers), max(self.stages)
        if last + 1 >= depth or min(self.stages) < 0:
            raise UnsupportedModelError(
                f"{name} cuts behind layer {last} (from 0); the model has {depth} layers and needs one behind the cut.",
                "Choose an earlier layer.",
            )
        if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
            raise UnsupportedModelError(f"{name} cannot cut inside a decoder with sliding windows.")
        if text._attn_implementation not in KERNELS:
            raise UnsupportedModelError(
                f"{name} works with the attention kernels {' and '.join(KERNELS)}, not {text._attn_implementation}.",
                'Call model.set_attn_implementation("sdpa").',
            )
        self.first = min(self.stages) + 1
        self.readers = sorted({layer for stage in self.stages.values() for layer in stage.rows})
        self.own = threading.local()

    def start(self, batch: ReducedInputs) -> None:
        """The next prompt that runs through the layers, in this thread, is this batch."""
        self.own.run = _Run(batch)

    def finish(self) -> dict[int, list[int]]:
        """Ends the batch; layer -> how many tokens of each prompt it held."""
        run: _Run | None = getattr(self.own, "run", None)
        self.own.run = None
        if run is None:
            return {}
        return {layer: held.there.sum(-1).tolist() for layer, held in sorted(run.held.items())}

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks the layers for the time of the block."""

        def before(layer: int) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                run: _Run | None = getattr(self.own, "run", None)
                if run is None:
                    return None
                named = "hidden_states" in kwargs
                hidden = kwargs["hidden_states"] if named else args[0]
                if layer == 0:
                    run.begin(hidden)
                if run.prefill and layer > 0:
                    stage = self.stages.get(layer - 1)
                    if stage is None:
                        run.held[layer] = run.held[layer - 1]
                    else:
                        hidden = run.cut(stage, hidden)
                if layer < self.first:
                    return None
                changed = run.arguments(layer, hidden, kwargs)
                if named:
                    return args, changed | {"hidden_states": hidden}
                return (hidden, *args[1:]), changed

            return hook

        def reader(layer: int) -> Any:
            def read(query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
                run: _Run | None = getattr(self.own, "run", None)
                if run is not None:
                    run.read(layer, query, key, scale)

            return read

        with contextlib.ExitStack() as undo:
            for number, layer in enumerate(self.layers):
                undo.callback(layer.register_forward_pre_hook(before(number), with_kwargs=True).remove)
            undo.enter_context(reading({self.layers[number].self_attn: reader(number) for number in self.readers}))
            yield
