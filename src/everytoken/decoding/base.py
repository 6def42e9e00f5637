"""The contract of everything that writes tokens: a Decoder.

A decoder is a dataclass of its settings that is callable as transformers' ``custom_generate``::

    model.generate(**inputs, max_new_tokens=64, custom_generate=DySpec(draft))

transformers prepares prompts, logits processors and stopping criteria and calls ``decoder(model, input_ids,
logits_processor=..., stopping_criteria=..., generation_config=..., **model_kwargs)``. ``__call__`` is written here once
and is final. It honours what was asked for, or refuses it by name before any forward pass.
A method implements one of three things:

- ``decode_row(call, row)``: a loop of its own over one prompt (``generation/r2r.py``);
- ``decode_rows(call)``: a loop of its own over the whole batch;
- ``applied(call)``: transformers' own loop, with something changed about the model (``LoopDecoder``,
  ``generation/skipdecode.py``).

What changes during a call lives in its ``DecodingCall``, so threads may share a decoder. After a call ``decoder.stats``
holds the counters, and ``decoder.trace`` one TokenTrace for each row if the decoder was built with
``trace_enabled=True``; both show the last call of the thread that asks.

transformers does not hand ``streamer`` and ``assistant_model`` to callables. A decoder looks them up in the call of
``generate`` that it answers: it feeds the streamer, and refuses the assistant. The tokenizer that stop strings need
cannot be had that way; ``decoder.generate(model, **inputs, stop_strings=..., tokenizer=...)`` passes it on, and is
otherwise ``model.generate``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

from ..core.errors import BadInputError
from ..core.trace import TokenTrace
from .call import DecodingCall, DecodingStats
from .checks import (
    check_decoder_only,
    check_empty_cache,
    check_not_empty,
    check_one_row,
    check_positions,
    check_prompt,
    check_undivided,
    check_whole_text,
    must_sync,
    refuse_inputs,
    refuse_processors,
    refuse_unsupported,
    split_rows,
)
from .inputs import callers_arguments, check_prepared_inputs, check_reads_text, check_unchanged_inputs, device_of
from .matcher import Matcher

if TYPE_CHECKING:
    import torch
    from transformers import (
        Cache,
        GenerationConfig,
        LogitsProcessorList,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        StoppingCriteriaList,
    )
    from transformers.generation.streamers import BaseStreamer

    from .output import BeamDecodingOutput, DecodingOutput
    from .row import DecodingRow

BY_NAME: dict[str, tuple[type, ...]] = {"text": (str, type(None))}
"""Metadata of a field that takes a model, or its hub id or folder."""


@contextlib.contextmanager
def ended_on_errors(streamer: BaseStreamer | None) -> Iterator[None]:
    """Ends a streamer where the block raises: whoever reads it would wait for ever."""
    try:
        yield
    except BaseException:
        if streamer is not None:
            streamer.end()
        raise


@dataclass(frozen=True)
class Example:
    """A decoder for a tiny model, as ``everytoken.testing`` wants to try it.

    Attributes:
        make: ``(**settings) -> Decoder``; settings are fields that the test varies (``trace_enabled``, ``matcher``).
        exact: whether its text, samples, scores and logits are those of ``generate`` without it.
        prefix_stable: whether a text that ends earlier has the same tokens up to there. Not so where several texts
            compete.
        padding_exact: whether a row gives the same text alone and in a padded batch.
        refuses: arguments of ``generate`` that it refuses by name, beside those that all decoders refuse.
    """

    make: Callable[..., Decoder]
    exact: bool = False
    prefix_stable: bool = True
    padding_exact: bool = True
    refuses: frozenset[str] = frozenset()


@dataclass
class Decoder:
    """Base of every decoder: settings are fields; ``__call__`` is a transformers ``custom_generate``.

    Args:
        trace_enabled: keep a TokenTrace of every row, for ``decoder.trace``.
    """

    trace_enabled: bool = field(default=False, kw_only=True)

    stats_type: ClassVar[type[DecodingStats]] = DecodingStats
    """What its calls count."""
    trace_columns: ClassVar[tuple[str, ...]] = ()
    """Names of the trace columns that it writes."""
    colour: ClassVar[str] = "source"
    """The trace's column to look at first."""
    station: ClassVar[str] = "generation"
    """Shown in the trace's header."""
    carries: ClassVar[frozenset[str] | None] = frozenset()
    """Model inputs that it passes on beside those that ``generate`` prepares; None: all. Others are refused by name."""
    continues: ClassVar[bool] = True
    """Whether a call may go on from a filled cache."""
    extrapolates: ClassVar[bool] = False
    """Whether prompts may be longer than the model's context."""
    lossless: ClassVar[bool] = True
    """Whether greedy decoding gives the text of plain greedy decoding."""
    samples_only: ClassVar[bool] = False
    """Whether greedy decoding is refused."""
    processes_once: ClassVar[bool] = False
    """Whether ``row.processed`` is asked exactly once for every token, in order: processors that remember earlier calls
    may take part then."""
    compiled: ClassVar[bool] = False
    """Whether it reads through ``decoding.lean``, and so gains from a model's compiled forward."""
    recurrent: ClassVar[bool] = False
    """Whether it decodes models that keep a recurrent state beside their cache."""
    reads_by_steps: ClassVar[bool] = False
    """Whether ``generate``'s own steps are enough for it (``steps.py``): then it decodes every model that ``generate``
    does, and passes on every input of a row that is alone."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in cls.__dict__:
            raise TypeError(
                f"{cls.__name__} overrides __call__, which is final: implement decode_row, decode_rows, or (in a "
                "LoopDecoder) applied."
            )

    # -- what a method says about itself -------------------------------------------------------------------------------
    @property
    def streams(self) -> bool:
        """Whether tokens are final as they appear, so that a streamer can follow."""
        return True

    def check_model(self, config: PreTrainedConfig) -> None:
        """Refuses a model by its configuration alone; trials ask before weights are read.

        Raises:
            UnsupportedModelError: a model with an encoder, or one that this decoder lacks something for.
        """
        check_decoder_only(type(self).__name__, config)

    def prepare(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Self:
        """Tells the decoder of the tokenizer and the width of the logits, where it needs them; returns it."""
        return self

    def load_helpers(self, model: PreTrainedModel) -> None:
        """Loads further models that were named by hub id or folder, or that ship with the package, before time is
        taken."""

    def check_call(self, call: DecodingCall[Any]) -> None:
        """Refuses what this decoder alone cannot honour, before any forward.

        Helpers are loaded by then. It may change ``call.config``, ``call.processors``, ``call.model_kwargs`` and
        ``call.input_ids``.
        """

    def matcher_for(self, call: DecodingCall[Any], row: int) -> Matcher | None:
        """The ``Matcher`` that row number ``row`` must obey, in its initial state."""
        return None

    def decode_rows(self, call: DecodingCall[Any]) -> None:
        """Decodes all of ``call.rows``; by default one after the other, each with a cache of its own."""
        from .row_cache import restore_padding, strip_padding

        given = call.cache
        for row in call.rows:
            if call.by_steps:
                self.decode_row(call, row)
                continue
            row.cache = given if given is not None and len(call.rows) == 1 else self.new_row_cache(call)
            # a row alone has no padding, but plain generate counts it as part of what its cache holds
            padding = len(row.padding) if len(call.rows) == 1 else 0
            if row.cache is not None and padding:
                strip_padding(row.cache, padding)
            self.decode_row(call, row)
            if row.cache is not None and padding:
                restore_padding(row.cache, padding)
            if len(call.rows) > 1:
                row.cache = None  # no more than one is kept

    def decode_row(self, call: DecodingCall[Any], row: DecodingRow) -> None:
        """Decodes one prompt: appends tokens to ``row`` until it ends; ``row.cache`` may hold the prompt's
        beginning."""
        raise NotImplementedError(f"{type(self).__name__} implements neither decode_row nor decode_rows.")

    def new_row_cache(self, call: DecodingCall[Any]) -> Cache:
        """An empty cache for one row."""
        from transformers import DynamicCache

        return DynamicCache(config=call.model.config)

    @classmethod
    def examples(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Example]:
        """Decoders of this class for a tiny model, for the conformance battery of ``everytoken.testing``.

        Args:
            model: of a dozen tokens and a few layers.
            tokenizer: one token a character.
        """
        raise NotImplementedError(f"{cls.__name__} gives no examples of itself.")

    # -- the last call -------------------------------------------------------------------------------------------------
    @property
    def stats(self) -> DecodingStats:
        """Counters of this thread's last call; zeros before the first."""
        return self._last()[0]

    @property
    def trace(self) -> list[TokenTrace]:
        """A TokenTrace for each row of this thread's last call; empty unless ``trace_enabled``."""
        return self._last()[1]

    def figures(self) -> dict[str, float]:
        """What is worth comparing after a call, beside speed."""
        figures = {"target forwards": float(self.stats.target_forwards)}
        if self.stats.draft_forwards or self.stats.proposed:
            figures |= {"accepted a round": self.stats.mean_accepted, "proposed": float(self.stats.proposed)}
        return figures

    def _last(self) -> tuple[DecodingStats, list[TokenTrace]]:
        shown = getattr(self.__dict__.get("_calls"), "last", None)
        return (self.stats_type(), []) if shown is None else shown

    def _remember(self, stats: DecodingStats, trace: list[TokenTrace]) -> None:
        calls = self.__dict__.setdefault("_calls", threading.local())  # one step, so threads cannot both make one
        calls.last = (stats, trace)

    def __getstate__(self) -> dict[str, Any]:
        """Settings alone are copied and pickled; what a thread's last call showed stays here."""
        return {name: value for name, value in self.__dict__.items() if name != "_calls"}

    # -- a call --------------------------------------------------------------------------------------------------------
    @final
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> DecodingOutput | BeamDecodingOutput | torch.Tensor:
        """Decodes; returns what ``generate`` would.

        Args:
            model: a causal language model.
            input_ids: ``[B, T]``, padded on the left.
            logits_processor, stopping_criteria, generation_config, synced_gpus: as ``generate`` prepares them.
            model_kwargs: further inputs, as ``generate`` prepares them.
            streamer: gets every new token; for one row only.

        Returns:
            ids ``[B, T + new]``; with ``return_dict_in_generate`` a dict with ``sequences``, ``scores``, ``logits``,
            ``past_key_values``, ``stats`` and ``trace``.

        Raises:
            BadInputError: an empty or too long prompt, padding on the right, or an argument that this decoder cannot
                honour.
            UnsupportedModelError: a model that it cannot decode with.
        """
        asked = callers_arguments(("streamer", "assistant_model", "synced_gpus"))
        streamer = asked.get("streamer") if streamer is None else streamer
        with ended_on_errors(streamer):
            if "assistant_model" in asked:
                raise BadInputError(
                    f"{type(self).__name__} takes no assistant_model.", "Leave it out; a draft is a decoder's setting."
                )
            return self._answer(
                model,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus or bool(asked.get("synced_gpus")),
                streamer,
                model_kwargs,
            )

    def _answer(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList | None,
        stopping_criteria: StoppingCriteriaList | None,
        generation_config: GenerationConfig | None,
        synced_gpus: bool,
        streamer: BaseStreamer | None,
        model_kwargs: dict[str, Any],
    ) -> DecodingOutput | BeamDecodingOutput | torch.Tensor:
        """Checks, then decodes."""
        import torch
        from transformers import LogitsProcessorList, StoppingCriteriaList

        began = time.perf_counter()
        call: DecodingCall[Any] = DecodingCall(
            model,
            input_ids,
            copy.copy(generation_config if generation_config is not None else model.generation_config),
            LogitsProcessorList(logits_processor or []),
            StoppingCriteriaList(stopping_criteria or []),
            streamer,
            synced_gpus or must_sync(model),
            dict(model_kwargs),
            self.stats_type(),
        )
        self.check_model(model.config)
        self._check(call)
        with torch.inference_mode(False):  # weights outlive this call
            self.load_helpers(model)
        self.check_call(call)
        self._remember(call.stats, call.trace)
        output = self._run(call)
        call.stats.seconds = time.perf_counter() - began
        return output

    def _check(self, call: DecodingCall[Any]) -> None:
        """What a loop over rows can honour of a call; ``LoopDecoder`` asks for less."""
        from .steps import needs_steps

        name, cache = type(self).__name__, call.cache
        refuse_unsupported(name, call.config, call.synced_gpus)
        if not self.reads_by_steps:
            check_reads_text(name, call.model, self.recurrent)
            check_unchanged_inputs(name, call.model)
        self._check_common(call)
        if self.reads_by_steps:
            device_of(call.model)
            check_undivided(name, len(call.input_ids), call.model_kwargs)
            call.by_steps = needs_steps(call)
        else:
            check_prepared_inputs(name, call.model, call.input_ids, call.model_kwargs)
        if not self.processes_once:
            refuse_processors(name, call.processors)
        check_whole_text(name, call.input_ids, call.model_kwargs, call.config)
        longest = max(len(ids) for ids, _ in split_rows(call.input_ids, call.attention_mask))
        if not self.extrapolates:
            check_prompt(call.model, longest)
        if not call.by_steps or len(call.input_ids) > 1:
            check_positions(name, call.model_kwargs.get("position_ids"), call.attention_mask, call.input_ids.shape[1])
        check_one_row(name, call.input_ids.shape[0], call.streamer, cache)
        if cache is not None and longest < call.input_ids.shape[1] and not call.by_steps:
            from .row_cache import check_strippable

            check_strippable(name, call.model, cache)

    def _check_common(self, call: DecodingCall[Any]) -> None:
        """What is checked alike for all decoders."""
        name = type(self).__name__
        if self.carries is not None:
            refuse_inputs(name, call.model_kwargs, self.carries)
        if call.model_kwargs.get("inputs_embeds") is None:
            check_not_empty(call.input_ids.shape[1])
        if not self.continues:
            check_empty_cache(name, call.cache)
        if self.samples_only and not call.config.do_sample:
            raise BadInputError(f"{name} samples; greedy decoding was asked for.", "Pass do_sample=True.")
        if call.streamer is not None:
            self._check_streamer()

    def _check_streamer(self) -> None:
        if not self.streams:
            raise BadInputError(
                f"{type(self).__name__} cannot feed a streamer: its tokens are not final as they appear.",
                "Leave the streamer out.",
            )

    def _run(self, call: DecodingCall[Any]) -> DecodingOutput | BeamDecodingOutput | torch.Tensor:
        """The rows of a call, decoded; ``LoopDecoder`` hands them to transformers instead."""
        import torch

        from .output import collect
        from .processors import criteria_for_rows, processors_for_row
        from .row import DecodingRow

        count = call.input_ids.shape[0]
        criteria = criteria_for_rows(type(self).__name__, call.criteria, count)
        columns = self.trace_columns if self.trace_enabled else None
        with torch.inference_mode():
            for number, (ids, padding) in enumerate(split_rows(call.input_ids, call.attention_mask)):
                processors = processors_for_row(
                    call.processors, number, count, type(self).__name__, self.processes_once
                )
                matcher = self.matcher_for(call, number)
                call.rows.append(
                    DecodingRow(ids, padding, processors, criteria, call.config, call.streamer, matcher, columns)
                )
            self.decode_rows(call)
        if call.streamer is not None:
            call.streamer.end()
        for row in call.rows:
            if row.columns is not None:
                call.trace.append(TokenTrace(row.new, columns=row.columns, station=self.station))
        return collect(call)

    def generate(
        self, model: PreTrainedModel, *args: Any, streamer: BaseStreamer | None = None, **kwargs: Any
    ) -> DecodingOutput | BeamDecodingOutput | torch.Tensor:
        """``model.generate`` through this decoder, with a streamer and with stop strings (``tokenizer=``).

        Raises:
            BadInputError: stop strings without a tokenizer, or a streamer for a decoder that cannot feed one.
        """
        if streamer is not None:
            with ended_on_errors(streamer):
                self._check_streamer()
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
                kwargs["generation_config"] = copy.copy(config)
                kwargs["generation_config"].stop_strings = None
        call = functools.partial(self, streamer=streamer) if streamer is not None else self
        return model.generate(*args, custom_generate=call, streamer=streamer, **kwargs)
