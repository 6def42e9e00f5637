"""Decoders that change how the model computes and not how a token is chosen: transformers' own loops run them.

A ``LoopDecoder`` says in ``applied`` what is different about the model during a call; everything else (sampling, beams,
ragged batches, streamers, scores, stopping, past key values) is ``generate``'s own code, so it is honoured by
construction.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, StoppingCriteria

from ..core.errors import BadInputError
from ..core.trace import Value
from .base import Decoder
from .call import DecodingCall
from .inputs import check_unchanged_inputs
from .matcher import Matcher, fill_mask
from .output import BeamDecodingOutput, DecodingOutput, with_stats

LOOPS = {"sample": "_sample", "greedy_search": "_sample", "beam_search": "_beam_search", "beam_sample": "_beam_search"}


class MatcherLogitsProcessor(LogitsProcessor):
    """Keeps each row inside what a ``Matcher`` allows; follows rows that beams reorder.

    Args:
        matcher: in its initial state, directly behind the prompt; each row follows a fork of it.
        prompt_length: padded length of the prompts.
        strict: raise where a row holds a forbidden token. Beam search is not: it fills up its beams with impossible
            ones.
    """

    def __init__(self, matcher: Matcher, prompt_length: int, strict: bool = True):
        self.prompt_length, self.strict = prompt_length, strict
        self.states: dict[tuple[int, ...], Matcher | None] = {(): matcher}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        states: dict[tuple[int, ...], Matcher | None] = {(): self.states[()]}
        for row, text in enumerate(input_ids[:, self.prompt_length :].tolist()):
            matcher = self.follow(tuple(text))
            states[tuple(text)] = matcher
            if matcher is not None:
                fill_mask(matcher, scores[row])
        self.states = states
        return scores

    def follow(self, text: tuple[int, ...]) -> Matcher | None:
        """The matcher behind ``text``, or None if the text is impossible. A finished one stays (``generate`` pads such
        rows)."""
        known = len(text)
        while text[:known] not in self.states:
            known -= 1
        matcher = self.states[text[:known]]
        if known == len(text) or matcher is None:
            return matcher
        matcher = matcher.fork()
        for token in text[known:]:
            if matcher.is_terminated():
                break
            if not matcher.accept_token(token):
                if not self.strict:
                    return None
                raise BadInputError(
                    f"A logits processor chose token {token}, which the matcher forbids.",
                    "Drop forced tokens, or the processor.",
                )
        return matcher


class MatcherStoppingCriteria(StoppingCriteria):
    """Ends a row whose matcher is finished."""

    def __init__(self, processor: MatcherLogitsProcessor):
        self.processor = processor

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        texts = input_ids[:, self.processor.prompt_length :].tolist()
        matchers = [self.processor.follow(tuple(text)) for text in texts]
        done = [matcher is not None and matcher.is_terminated() for matcher in matchers]
        return torch.tensor(done, device=input_ids.device)


_locks: WeakKeyDictionary[PreTrainedModel, threading.RLock] = WeakKeyDictionary()
_locks_guard = threading.Lock()


def model_lock(model: PreTrainedModel) -> AbstractContextManager[bool]:
    """The lock of calls that change how ``model`` computes: two threads take turns."""
    with _locks_guard:
        return _locks.setdefault(model, threading.RLock())


@dataclass
class LoopDecoder(Decoder):
    """Base of decoders that run in transformers' loops.

    Args:
        matcher: a ``Matcher`` in its initial state: the text stays inside what it allows.
    """

    matcher: Matcher | None = field(default=None, kw_only=True, repr=False)
    carries: ClassVar[frozenset[str] | None] = None
    changes_model: ClassVar[bool] = True
    """Whether ``applied`` changes the model itself, so that calls on one model must take turns."""

    counts_text: ClassVar[bool] = False
    """Whether it counts the text's tokens in the cache, so that nothing else may stand before them."""

    def applied(self, call: DecodingCall[Any]) -> AbstractContextManager[Any]:
        """What is different about ``call.model`` during a call; may change ``call.config`` and
        ``call.model_kwargs``."""
        raise NotImplementedError(f"{type(self).__name__} does not implement applied.")

    def finished(self, call: DecodingCall[Any], sequences: torch.Tensor, new: list[list[int]]) -> None:
        """Called with the result, still inside ``applied``: fills ``call.trace`` and counters.

        Args:
            sequences: ``[B, T + new]``.
            new: each row's new tokens, without padding.
        """

    def mode(self, config: GenerationConfig) -> str:
        """The generation mode that a configuration asks for.

        Raises:
            BadInputError: one that transformers' loops here do not cover, or no cache.
        """
        mode, name = str(config.get_generation_mode().value), type(self).__name__
        if mode not in LOOPS:
            readable = mode.replace("_", " ")
            raise BadInputError(f"{name} does not support {readable}.", "Use greedy decoding, sampling or beam search.")
        if config.use_cache is False:
            raise BadInputError(f"{name} does not support use_cache=False.", "Leave it out.")
        return mode

    def _check(self, call: DecodingCall[Any]) -> None:
        mode = self.mode(call.config)
        if self.carries is not None or self.counts_text:
            check_unchanged_inputs(type(self).__name__, call.model)
        self._check_common(call)
        if LOOPS[mode] != "_sample" and call.streamer is not None:
            raise BadInputError("A streamer cannot follow beam search.", "Leave it out.")

    def _run(self, call: DecodingCall[Any]) -> DecodingOutput | BeamDecodingOutput | torch.Tensor:
        loop, prompt, thread = LOOPS[self.mode(call.config)], call.input_ids.shape[1], threading.get_ident()
        if self.matcher is not None:
            processor = MatcherLogitsProcessor(self.matcher, prompt, loop == "_sample")
            call.processors.insert(0, processor)
            call.criteria.append(MatcherStoppingCriteria(processor))

        def count(*_: Any) -> None:
            call.stats.target_forwards += threading.get_ident() == thread  # another thread's call is not ours

        streamer = {"streamer": call.streamer} if loop == "_sample" else {}
        with model_lock(call.model) if self.changes_model else nullcontext():
            hook = call.model.register_forward_pre_hook(count)
            try:
                with torch.no_grad(), self.applied(call):
                    output = getattr(call.model, loop)(
                        call.input_ids,
                        logits_processor=call.processors,
                        stopping_criteria=call.criteria,
                        generation_config=call.config,
                        synced_gpus=call.synced_gpus,
                        **streamer,
                        **call.model_kwargs,
                    )
                    sequences = output if isinstance(output, torch.Tensor) else output.sequences
                    new = new_tokens(sequences, prompt, call.config)
                    call.stats.new_tokens = sum(map(len, new))
                    self.finished(call, sequences, new)
            finally:
                hook.remove()
        return with_stats(output, call)


def new_tokens(sequences: torch.Tensor, prompt_length: int, config: GenerationConfig) -> list[list[int]]:
    """Each row's new tokens, up to and with its first end token (what follows is padding)."""
    ends = getattr(config, "_eos_token_tensor", None)
    stops = set() if ends is None else set(ends.flatten().tolist())
    rows = []
    for row in sequences[:, prompt_length:].tolist():
        end = next((place for place, token in enumerate(row) if token in stops), len(row) - 1)
        rows.append(row[: end + 1])
    return rows


def by_row(new: list[list[int]], steps: list[Value]) -> list[list[Value]]:
    """One value a step, the same for all rows, cut to each row's tokens."""
    return [steps[: len(row)] for row in new]
