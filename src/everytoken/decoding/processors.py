"""Logits processors and stopping criteria of a batch, as one of its rows has to be shown to them.

``generate`` asks a processor once a step about the whole batch. A decoder with a loop of its own asks about one row, or
about many drafted texts that all belong to one row. transformers' own processors are turned into the row's; whether
they may be asked about any text at any time, or once a token in order, is known here. A processor of the user's is
taken as it is and asked about one text at a time; one that remembers earlier calls is refused where it would remember
the wrong ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import logits_process, stopping_criteria

from ..core.errors import BadInputError

STATELESS = tuple(
    getattr(logits_process, name)
    for name in (
        "EncoderNoRepeatNGramLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "MinPLogitsWarper",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "PrefixConstrainedLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
        "WatermarkLogitsProcessor",
    )
    if hasattr(logits_process, name)
)
"""Processors whose answer follows from the text and its scores alone, once they are a row's own."""
ROW_OWN = (
    logits_process.SynthIDTextWatermarkLogitsProcessor,
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
"""Processors that remember the text so far; every row gets one of its own."""
CRITERIA = (
    stopping_criteria.ConfidenceCriteria,
    stopping_criteria.EosTokenCriteria,
    stopping_criteria.MaxLengthCriteria,
    stopping_criteria.MaxTimeCriteria,
    stopping_criteria.StopStringCriteria,
)
"""Criteria that remember nothing."""


def stateless(processors: Iterable[LogitsProcessor]) -> LogitsProcessorList:
    """Those that may be asked about any number of texts, in any order: drafted texts are shown to no others."""
    return LogitsProcessorList(item for item in processors if type(item) in STATELESS)


def processors_for_row(
    processors: Iterable[LogitsProcessor],
    row: int,
    rows: int = 1,
    decoder: str = "This decoder",
    once: bool = True,
) -> LogitsProcessorList:
    """A call's processors as row number ``row`` of ``rows`` alone has to be shown to them.

    Args:
        decoder: its name, for errors.
        once: the decoder asks exactly once for every token, in order.
    """
    return LogitsProcessorList(_for_row(item, row, rows, decoder, once) for item in processors)


def criteria_for_rows(decoder: str, criteria: Iterable[StoppingCriteria], rows: int) -> StoppingCriteriaList:
    """A call's stopping criteria for rows that are decoded one after the other: one of the user's own must not
    remember what it was asked before."""
    return StoppingCriteriaList(
        item if rows == 1 or type(item) in CRITERIA else _WatchedCriterion(item, decoder, rows) for item in criteria
    )


def processors_for_beams(processors: LogitsProcessorList, width: int) -> LogitsProcessorList:
    """A call's processors where a decoder turns every row into ``width`` beams by itself.

    Raises:
        BadInputError: one that follows the rows of a batch from step to step.
    """
    return LogitsProcessorList(_for_beams(item, width) for item in processors)


def _for_row(item: LogitsProcessor, row: int, rows: int, decoder: str, once: bool) -> LogitsProcessor:
    kind = type(item)
    if kind is logits_process.PrefixConstrainedLogitsProcessor:
        return logits_process.PrefixConstrainedLogitsProcessor(_told(item._prefix_allowed_tokens_fn, row), 1)
    if kind is logits_process.RepetitionPenaltyLogitsProcessor:
        ignored = item.prompt_ignore_length
        return _changed(item, prompt_ignore_length=int(ignored[row])) if isinstance(ignored, torch.Tensor) else item
    if kind is logits_process.EncoderRepetitionPenaltyLogitsProcessor:
        return _changed(item, encoder_input_ids=_of_row(item.encoder_input_ids, row, rows))
    if kind is logits_process.EncoderNoRepeatNGramLogitsProcessor:
        ngrams = item.generated_ngrams[row * len(item.generated_ngrams) // rows]
        return _changed(item, generated_ngrams=[ngrams], batch_size=1)
    if kind is logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor:
        context = dict(item.unconditional_context)
        for name in ("input_ids", "attention_mask"):
            if context[name] is not None and rows > 1:
                context[name] = _of_row(context[name], row, rows)
        return _changed(item, unconditional_context=context)
    if kind in ROW_OWN:
        return copy.copy(item)
    if kind in STATELESS or (once and rows == 1):
        return item
    return _Watched(item, decoder, rows)


def _for_beams(item: LogitsProcessor, width: int) -> LogitsProcessor:
    kind = type(item)
    if kind is logits_process.PrefixConstrainedLogitsProcessor:
        return logits_process.PrefixConstrainedLogitsProcessor(item._prefix_allowed_tokens_fn, width)
    if kind is logits_process.RepetitionPenaltyLogitsProcessor:
        ignored = item.prompt_ignore_length
        if not isinstance(ignored, torch.Tensor):
            return item
        return _changed(item, prompt_ignore_length=ignored.repeat_interleave(width, 0))
    if kind in ROW_OWN:
        raise BadInputError(
            f"{kind.__name__} follows the rows of a batch and not beams.", f"Pass num_beams={width} to generate."
        )
    return item


def _told(function: Callable[[int, torch.Tensor], list[int]], row: int) -> Callable[[int, torch.Tensor], list[int]]:
    """A function of a row's number that is told this one, whichever text of the row it is asked about."""
    return lambda _batch_id, text: function(row, text)


def _of_row(values: torch.Tensor, row: int, rows: int) -> torch.Tensor:
    """``[1, ..]`` of ``[B, ..]``; several rows may belong to one prompt."""
    place = row * values.shape[0] // rows
    return values[place : place + 1]


def _changed(item: LogitsProcessor, **values: Any) -> LogitsProcessor:
    """A copy with other attributes."""
    other = copy.copy(item)
    vars(other).update(values)
    return other


# -- what users bring --------------------------------------------------------------------------------------------------
def _state(item: Any) -> dict[str, tuple[Any, ...]]:
    """What can be seen of an object's memory: which values it holds, and how long or how often written they are."""
    seen: dict[str, tuple[Any, ...]] = {}
    for name, value in getattr(item, "__dict__", {}).items():
        if isinstance(value, torch.Tensor):
            seen[name] = (id(value), 0 if value.is_inference() else value._version)
        elif isinstance(value, (bool, int, float, str)):
            seen[name] = (value,)
        else:
            seen[name] = (id(value), len(value) if isinstance(value, Sized) else 0)
    return seen


def _check_unchanged(item: Any, before: dict[str, tuple[Any, ...]], decoder: str, rows: int) -> None:
    after = _state(item)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if not changed:
        return
    why, hint = "asks it more than once about a token", "Leave it out, or decode without custom_generate."
    if rows > 1:
        why, hint = "decodes the rows one after the other", "Pass the rows one at a time."
    raise BadInputError(
        f"{type(item).__name__} remembers earlier calls ({', '.join(changed)} changed), but {decoder} {why}.", hint
    )


class _Watched(LogitsProcessor):
    """A processor of the user's that is asked in another order than ``generate`` would ask."""

    def __init__(self, item: LogitsProcessor, decoder: str, rows: int):
        self.item, self.decoder, self.rows = item, decoder, rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        before = _state(self.item)
        scores = self.item(input_ids, scores)
        _check_unchanged(self.item, before, self.decoder, self.rows)
        return scores


class _WatchedCriterion(StoppingCriteria):
    """A criterion of the user's that follows several texts, one after the other."""

    def __init__(self, item: StoppingCriteria, decoder: str, rows: int):
        self.item, self.decoder, self.rows = item, decoder, rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        before = _state(self.item)
        done = self.item(input_ids, scores, **kwargs)
        _check_unchanged(self.item, before, self.decoder, self.rows)
        return done
