"""SkipDecode: how many layers run is fixed by the position in the answer, and only falls (arXiv 2307.02628).

Early exit by token breaks batches (every row leaves elsewhere) and caches (a later token needs keys of layers that an
earlier one skipped). SkipDecode gives every position its depth in advance, the same for all rows of a batch and never
more than before::

    b(t) = round(b_max - (b_max - b_min) min(t, T) / T)              layers run when token t of the answer is predicted
    layers(t) = {0 .. w-1}  and  {L - (b(t) - w) .. L-1}             warm-up layers at the bottom, the rest from the top

The prompt runs with b(0). Layers between are skipped, not the last ones. As b falls, a layer that runs at t has run at
every earlier position, so its keys are all there and nothing is ever recomputed: each layer's cache holds a prefix of
the text.

    model.generate(**inputs, custom_generate=SkipDecode(LinearDepth(20, 8, length=128)))

A model has to be tuned for its schedule. ``skip_layers`` runs whole sequences as cached decoding would (a position that
skips a layer carries its hidden state through and gives it no keys; it lies behind all that do, so causal attention
cannot see it), and ``SkipDecodeCallback`` brings that into any transformers or TRL trainer::

    SFTTrainer(model, ..., callbacks=[SkipDecodeCallback(LinearDepth(20, 8, length=128))])
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch
from torch import nn
from transformers import (
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from ..core.errors import BadInputError, UnsupportedModelError
from ..core.trace import TokenTrace
from ..decoding.base import Example
from ..decoding.call import DecodingCall, DecodingStats
from ..decoding.checks import is_filled
from ..decoding.inputs import cache_argument
from ..decoding.loop import LoopDecoder, by_row

Run = Callable[[], torch.Tensor]
"""A layer's own forward on the hidden states that it was called with."""
Route = Callable[[int, torch.Tensor, Run], torch.Tensor]
Forward = Callable[..., Any]


@runtime_checkable
class DepthSchedule(Protocol):
    """How many layers run at position t of the answer; must not rise with t."""

    warmup: int

    def depth(self, t: int) -> int: ...


@dataclass
class LinearDepth:
    """The paper's schedule: from ``max_layers`` down to ``min_layers`` over ``length`` tokens, then constant.

    Args:
        max_layers: layers that the prompt and the first token get.
        min_layers: layers from position ``length`` on.
        warmup: bottom layers that always run.
        length: tokens of the answer over which the depth falls; usually as many as will be generated.

    Raises:
        BadInputError: not ``max_layers >= min_layers >= warmup >= 1``, or a length below 1.
    """

    max_layers: int
    min_layers: int
    warmup: int = 1
    length: int = 128

    def __post_init__(self) -> None:
        if not self.max_layers >= self.min_layers >= self.warmup >= 1 or self.length < 1:
            raise BadInputError(
                f"LinearDepth needs max_layers >= min_layers >= warmup >= 1 and length >= 1; got {self.max_layers}, "
                f"{self.min_layers}, {self.warmup}, {self.length}."
            )

    def depth(self, t: int) -> int:
        fallen = (self.max_layers - self.min_layers) * min(max(t, 0), self.length) / self.length
        return round(self.max_layers - fallen)

    @classmethod
    def for_speedup(cls, num_layers: int, speedup: float, length: int, warmup: int = 1) -> LinearDepth:
        """A schedule whose mean depth over ``length`` tokens is about ``num_layers / speedup``, half of it at the end
        and one and a half times as much at the start (as far as the model goes).

        Raises:
            BadInputError: a speed-up below 1, or one that leaves fewer layers than the warm-up.
        """
        mean = num_layers / speedup
        if speedup < 1 or mean < warmup:
            raise BadInputError(
                f"A speed-up of {speedup} is impossible with {num_layers} layers and {warmup} warm-up layers.",
                f"Choose one between 1 and {num_layers / warmup:g}.",
            )
        top = min(num_layers, 1.5 * mean)
        bottom = max(float(warmup), 2 * mean - top)
        return cls(round(top), round(bottom), warmup, length)


def active_layers(schedule: DepthSchedule, t: int, num_layers: int) -> list[int]:
    """Indices of the layers that run at position t, in order."""
    return [index for index in range(num_layers) if runs(schedule, index, schedule.depth(t), num_layers)]


def runs(schedule: DepthSchedule, layer: int, depth: Any, num_layers: int) -> Any:
    """Whether a layer runs at a depth (a number or a tensor of them)."""
    return (layer < schedule.warmup) | (layer >= num_layers - (depth - schedule.warmup))


def speedup(schedule: DepthSchedule, num_layers: int, tokens: int) -> float:
    """The nominal speed-up of ``tokens`` generated tokens: layers of the model over the mean depth."""
    return num_layers * tokens / sum(schedule.depth(t) for t in range(tokens))


def find_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a model, wherever it keeps them: the one list of as many alike as the model has layers.

    Raises:
        UnsupportedModelError: there is no such list.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    name = type(model).__name__
    found = [item for item in model.modules() if isinstance(item, nn.ModuleList) and len(item) == count]
    found = [item for item in found if not any(item is not other and _holds(other, item) for other in found)]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{name} does not keep its decoder layers in one list of {count}.",
            "SkipDecode works with stacks of layers.",
        )
    return found[0]


def _holds(outer: nn.Module, inner: nn.Module) -> bool:
    return any(item is inner for item in outer.modules())


def check_schedule(schedule: DepthSchedule, num_layers: int) -> None:
    """Raises BadInputError where a schedule does not fit a model, or rises."""
    depths = [schedule.depth(t) for t in range(4096)]
    if max(depths) > num_layers:
        raise BadInputError(f"The schedule runs {max(depths)} layers; the model has {num_layers}.", "Lower max_layers.")
    if min(depths) < schedule.warmup or schedule.warmup < 1:
        raise BadInputError("A schedule runs its warm-up layers at least, and one of them is needed.")
    if any(later > earlier for earlier, later in itertools.pairwise(depths)):
        raise BadInputError(
            "The schedule gives a later position more layers than an earlier one, whose keys would be missing.",
            "Depths must not rise.",
        )


@contextmanager
def rerouted(layers: nn.ModuleList, route: Route) -> Iterator[None]:
    """Has ``route(index, hidden states, run)`` decide about each layer; ``run()`` is the layer's own forward."""

    beside: dict[str, tuple[Any, ...]] = {}  # what layers return beside hidden states, as the last that ran did

    def wrap(index: int, original: Forward) -> Forward:
        @functools.wraps(original)
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            def run() -> torch.Tensor:
                output = original(hidden_states, *args, **kwargs)
                if isinstance(output, torch.Tensor):
                    return output
                beside["last"] = tuple(output[1:])
                first: torch.Tensor = output[0]
                return first

            output = route(index, hidden_states, run)
            return (output, *beside["last"]) if "last" in beside else output

        return forward

    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(_forward_of(layer, wrap(index, layer.forward)))
        yield


def counts(cache: Cache, index: int) -> bool:
    """Whether a layer of a cache counts its tokens; recurrent layers do not, and some have no cache."""
    return index < len(cache.layers) and isinstance(cache.layers[index], CacheLayerMixin)


def counted(cache: Cache) -> bool:
    """Whether a cache knows how many tokens it holds; one of recurrent layers alone does not."""
    return not cache.layers or any(counts(cache, index) for index in range(len(cache.layers)))


def held(cache: Cache) -> int:
    """Tokens that a cache holds: as many as in its fullest layer, since every token passes some layer that counts."""
    counted = (cache.layers[index].get_seq_length() for index in range(len(cache.layers)) if counts(cache, index))
    return max(map(int, counted), default=0)


@contextmanager
def measured_where_layers_run(cache: Cache, running: Callable[[int], bool]) -> Iterator[None]:
    """Has masks fit the layers that run.

    A model takes the sizes of a mask from the first layer of its kind, which may be a skipped one whose keys are fewer.
    """
    sizes, length = cache.get_mask_sizes, cache.get_seq_length

    def get_mask_sizes(query_length: int, layer_idx: int) -> tuple[int, int]:
        if counts(cache, layer_idx) and not running(layer_idx):
            kind = type(cache.layers[layer_idx])
            alike = (place for place, layer in enumerate(cache.layers) if type(layer) is kind and running(place))
            layer_idx = next(alike, layer_idx)
        return sizes(query_length, layer_idx)

    def get_seq_length(layer_idx: int = 0) -> int:
        if counts(cache, layer_idx) and running(layer_idx):
            return length(layer_idx)
        return held(cache) if layer_idx == 0 or counts(cache, layer_idx) else length(layer_idx)

    cache.get_mask_sizes, cache.get_seq_length = get_mask_sizes, get_seq_length  # type: ignore[method-assign]
    try:
        yield
    finally:
        del cache.get_mask_sizes, cache.get_seq_length


@contextmanager
def _forward_of(module: nn.Module, forward: Forward) -> Iterator[None]:
    """Replaces a module's forward, and puts back what was there (others patch it too)."""
    before = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@dataclass
class SkipDecodeStats(DecodingStats):
    """Counters of a call.

    Attributes:
        layers_run: layers run by each forward.
    """

    layers_run: list[int] = field(default_factory=list)


@dataclass
class SkipDecode(LoopDecoder):
    """Decoding with fewer layers the later the token.

    Args:
        schedule: a ``DepthSchedule``; None makes a ``LinearDepth`` for ``speedup`` over the tokens asked for.
        speedup: nominal speed-up of that schedule.
        warmup: its warm-up layers.

    Batches of ragged prompts are padded on the left, so that all rows are at the same position of their answers. A
    cache of an earlier call can be continued as long as no layer that is to run has been skipped before.

    The trace has ``layers``: how many ran when the token was predicted.
    """

    stats_type: ClassVar[type[DecodingStats]] = SkipDecodeStats
    trace_columns: ClassVar[tuple[str, ...]] = ("layers",)
    lossless: ClassVar[bool] = False
    colour: ClassVar[str] = "layers"
    counts_text: ClassVar[bool] = True
    schedule: DepthSchedule | None = None
    speedup: float = 2.0
    warmup: int = 1

    def __post_init__(self) -> None:
        if self.schedule is not None and not isinstance(self.schedule, DepthSchedule):
            raise BadInputError(
                f"schedule must have a warmup and depth(t); got {type(self.schedule).__name__}.",
                "For example LinearDepth(20, 8, length=128).",
            )
        if self.speedup < 1 or self.warmup < 1:
            raise BadInputError(f"SkipDecode needs speedup >= 1 and warmup >= 1; got {self.speedup}, {self.warmup}.")

    @property
    def stats(self) -> SkipDecodeStats:
        return cast(SkipDecodeStats, super().stats)

    @property
    def layers_run(self) -> list[int]:
        """Layers run by each forward of the last call."""
        return self.stats.layers_run

    def figures(self) -> dict[str, float]:
        return super().figures() | {"layers a forward": sum(self.layers_run) / max(len(self.layers_run), 1)}

    def check_model(self, config: PreTrainedConfig) -> None:
        """A schedule that the model's layers can follow.

        Raises:
            UnsupportedModelError: a model with an encoder.
            BadInputError: a schedule with more layers than the model has, one that rises, or an impossible speed-up.
        """
        super().check_model(config)
        layers = config.get_text_config().num_hidden_layers
        if self.schedule is not None:
            check_schedule(self.schedule, layers)
        else:
            LinearDepth.for_speedup(layers, self.speedup, 128, self.warmup)

    def check_call(self, call: DecodingCall[SkipDecodeStats]) -> None:
        """Raises BadInputError where attentions are asked for (a skipped layer has none), UnsupportedModelError for a
        model that reads its text anew for every token: earlier tokens would run with the layers of the last."""
        if cache_argument(call.model) is None:
            raise UnsupportedModelError(
                f"SkipDecode needs a cache that grows; {type(call.model).__name__} takes none.",
                "Use a model that caches keys.",
            )
        if call.config.output_attentions:
            raise BadInputError(
                "SkipDecode does not support output_attentions: skipped layers have none.", "Leave it out."
            )

    @contextmanager
    def applied(self, call: DecodingCall[SkipDecodeStats]) -> Iterator[None]:
        model, stats = call.model, call.stats
        layers = find_layers(model)
        total = len(layers)
        mask = call.attention_mask
        # a cache may hold the beginning of the text, and input_ids only the rest; the mask covers both
        whole = call.input_ids.shape[1] if mask is None else mask.shape[1]
        prompt = int(getattr(call.config, "_mask_length", whole)) if mask is None else whole
        schedule = self.schedule
        if schedule is None:
            room = max((call.config.max_length or prompt + 128) - prompt, 1)
            schedule = LinearDepth.for_speedup(total, self.speedup, room, self.warmup)
        check_schedule(schedule, total)
        cache = call.cache
        if cache is None or any(isinstance(layer, StaticLayer) for layer in cache.layers):
            raise BadInputError("SkipDecode needs a cache that grows.", "Leave cache_implementation out.")
        self._check_cache(cache, active_layers(schedule, 0, total))
        if not counted(cache) and is_filled(cache):
            raise BadInputError(
                "SkipDecode needs to know how many tokens a cache holds; recurrent layers do not say it.",
                "Leave past_key_values out.",
            )
        now = {"depth": schedule.depth(0), "read": 0}

        stack = next(item for item in model.modules() if any(child is layers for child in item.children()))
        inputs = inspect.signature(stack.forward)

        def see_position(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            given = inputs.bind_partial(*args, **kwargs).arguments
            names = ("input_ids", "inputs_embeds", "hidden_states")
            tokens = next(given[name] for name in names if given.get(name) is not None)
            before = held(cache) if counted(cache) else now["read"]
            now["read"] += tokens.shape[1]
            now["depth"] = schedule.depth(before + tokens.shape[1] - prompt)
            stats.layers_run.append(0)

        def route(index: int, hidden: torch.Tensor, run: Run) -> torch.Tensor:
            if not runs(schedule, index, now["depth"], total):
                return hidden
            stats.layers_run[-1] += 1
            return run()

        def running(index: int) -> bool:
            return bool(runs(schedule, index, now["depth"], total))

        hook = stack.register_forward_pre_hook(see_position, with_kwargs=True)
        try:
            with rerouted(layers, route), measured_where_layers_run(cache, running):
                yield
        finally:
            hook.remove()
            cache._layers_run = frozenset(filter(running, range(total)))

    @staticmethod
    def _check_cache(cache: Cache, first: list[int]) -> None:
        """Refuses a filled cache in which a layer that is to run has been skipped."""
        length = held(cache)
        missing = []
        for index in first if length else []:
            if counts(cache, index):
                missing += [index] if cache.get_seq_length(index) < length else []
            elif index not in getattr(cache, "_layers_run", first):  # a recurrent layer does not count: a call notes it
                missing.append(index)
        if missing:
            raise BadInputError(
                f"The cache lacks keys of layer {missing[0]}: an earlier call skipped it and this schedule runs it.",
                "Go on with at most as many layers as the earlier call ended with, or start from an empty cache.",
            )

    def finished(self, call: DecodingCall[SkipDecodeStats], sequences: torch.Tensor, new: list[list[int]]) -> None:
        run = call.stats.layers_run
        call.stats.rounds = len(run)
        if self.trace_enabled:
            longest = max(map(len, new))
            steps: list[Any] = list(run[len(run) - longest :])
            for tokens, column in zip(new, by_row(new, steps), strict=True):
                call.trace.append(TokenTrace(tokens, columns={"layers": column}, station=self.station))

    @classmethod
    def examples(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Example]:
        layers = model.config.get_text_config().num_hidden_layers
        every, fewer = LinearDepth(layers, layers, 1, 8), LinearDepth(layers, max(layers // 2, 1), 1, 8)
        return {
            "all layers": Example(lambda **settings: cls(every, **settings), exact=True),
            "fewer layers": Example(lambda **settings: cls(fewer, **settings), refuses=frozenset({"past_key_values"})),
        }


# -- training ----------------------------------------------------------------------------------------------------------
def depths_of(schedule: DepthSchedule, labels: torch.Tensor) -> torch.Tensor:
    """The depth of every position of training rows ``[B, T]``, from their labels (-100: prompt or padding).

    The position that predicts token t of an answer (counted from the first label that is not -100) gets ``depth(t)``,
    and all before it ``depth(0)``; what follows an answer keeps falling, so that depths never rise.
    """
    answer = labels != -100
    first = torch.where(answer.any(1), answer.int().argmax(1), labels.shape[1])
    positions = torch.arange(labels.shape[1], device=labels.device)[None] - (first[:, None] - 1)
    table = torch.tensor([schedule.depth(t) for t in range(labels.shape[1] + 1)], device=labels.device)
    return table[positions.clamp(min=0)]


@contextmanager
def skip_layers(model: Any, schedule: DepthSchedule) -> Iterator[Any]:
    """Runs whole sequences as cached decoding would, for training and scoring.

    ``model(input_ids=..., labels=...)`` takes each position's depth from the labels (see ``depths_of``); ``depths=[B,
    T]`` gives them instead. Gradients flow through the layers that run.

    Raises:
        BadInputError: the schedule does not fit the model; a call has neither labels nor depths.
    """
    layers = find_layers(model)
    check_schedule(schedule, len(layers))
    original_forward = model.forward
    now: dict[str, torch.Tensor] = {}

    @functools.wraps(original_forward)
    def forward(*args: Any, depths: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if depths is None:
            if kwargs.get("labels") is None:
                raise BadInputError(
                    "Training with SkipDecode needs labels (-100 on the prompt), or depths.", "Pass labels=..."
                )
            depths = depths_of(schedule, kwargs["labels"])
        now["depths"] = depths
        return original_forward(*args, **kwargs)

    def route(index: int, hidden: torch.Tensor, run: Run) -> torch.Tensor:
        active = runs(schedule, index, now["depths"], len(layers))
        if bool(active.all()):
            return run()
        return torch.where(active[..., None], run(), hidden) if bool(active.any()) else hidden

    with _forward_of(model, forward), rerouted(layers, route):
        yield model


class SkipDecodeCallback(TrainerCallback):
    """Trains with a schedule in any Trainer: layers are skipped from the start of training to its end.

    Args:
        schedule: as for ``SkipDecode``.
    """

    def __init__(self, schedule: DepthSchedule):
        self.schedule = schedule
        self._context: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._context = skip_layers(model, self.schedule)
        self._context.__enter__()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = None
