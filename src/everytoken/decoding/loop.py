"""Decoders that change how the model computes and not how a token is chosen: transformers' own loops run them.

A ``LoopDecoder`` says in ``applied`` what is different about the model during a call; everything else (sampling, beams, ragged
batches, streamers, scores, stopping, past key values) is ``generate``'s own code, so it is honoured by construction.
"""

from __future__ import annotations

import copy
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..core.errors import BadInputError
from ..core.trace import Value
from .base import Decoder, DecodingStats, check_not_empty
from .matcher import fill_mask

LOOPS = {"sample": "_sample", "greedy_search": "_sample", "beam_search": "_beam_search", "beam_sample": "_beam_search"}


class MatcherLogitsProcessor(LogitsProcessor):
    """Keeps each row inside what a ``Matcher`` (constraints station) allows; follows rows that beams reorder.

    Args:
        matcher: in its initial state, directly behind the prompt; each row follows a fork of it.
        prompt_length: padded length of the prompts.
        strict: raise where a row holds a forbidden token. Beam search is not: it fills up its beams with impossible ones.
    """

    def __init__(self, matcher: Any, prompt_length: int, strict: bool = True):
        self.prompt_length, self.strict = prompt_length, strict
        self.states: dict[tuple[int, ...], Any] = {(): matcher}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        states: dict[tuple[int, ...], Any] = {(): self.states[()]}
        for row, text in enumerate(input_ids[:, self.prompt_length :].tolist()):
            matcher = self.follow(tuple(text))
            states[tuple(text)] = matcher
            if matcher is not None:
                fill_mask(matcher, scores[row])
        self.states = states
        return scores

    def follow(self, text: tuple[int, ...]) -> Any:
        """The matcher behind ``text``; a finished one stays where it is (``generate`` pads such rows). None: the text is impossible."""
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

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = input_ids[:, self.processor.prompt_length :].tolist()
        matchers = [self.processor.follow(tuple(text)) for text in texts]
        done = [matcher is not None and matcher.is_terminated() for matcher in matchers]
        return torch.tensor(done, device=input_ids.device)


@dataclass
class LoopDecoder(Decoder):
    """Base of decoders that run in transformers' loops.

    Args:
        matcher: a ``Matcher`` in its initial state: the text stays inside what it allows.
    """

    matcher: Any = field(default=None, kw_only=True, repr=False)

    def applied(
        self, model: Any, input_ids: torch.Tensor, config: Any, model_kwargs: dict[str, Any]
    ) -> AbstractContextManager[Any]:
        """What is different about ``model`` during a call; may change ``config`` (a copy) and ``model_kwargs``."""
        raise NotImplementedError

    def mode(self, config: Any) -> str:
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

    def finished(
        self,
        model: Any,
        input_ids: torch.Tensor,
        model_kwargs: dict[str, Any],
        sequences: torch.Tensor,
        new: list[list[int]],
    ) -> None:
        """Called with what ``applied`` got and the result, still inside it: fills ``self.trace`` and counters."""

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decodes as ``generate`` would; see ``Decoder``.

        Raises:
            BadInputError: an empty prompt, ``use_cache=False``, or a generation mode other than sampling, greedy and beams.
        """
        began = time.perf_counter()
        config = copy.copy(generation_config if generation_config is not None else model.generation_config)
        mode = self.mode(config)
        check_not_empty(input_ids.shape[1])
        self.stats, self.trace = DecodingStats(), []
        arguments = {
            "logits_processor": LogitsProcessorList(logits_processor or []),
            "stopping_criteria": StoppingCriteriaList(stopping_criteria or []),
            "generation_config": config,
            "synced_gpus": synced_gpus,
        }
        if self.matcher is not None:
            processor = MatcherLogitsProcessor(self.matcher, input_ids.shape[1], LOOPS[mode] == "_sample")
            arguments["logits_processor"].insert(0, processor)
            arguments["stopping_criteria"].append(MatcherStoppingCriteria(processor))
        if LOOPS[mode] == "_sample":
            arguments["streamer"] = streamer
        elif streamer is not None:
            raise BadInputError("A streamer cannot follow beam search.", "Leave it out.")

        def count(*_: Any) -> None:
            self.stats.target_forwards += 1

        hook = model.register_forward_pre_hook(count)
        try:
            with torch.no_grad(), self.applied(model, input_ids, config, model_kwargs):
                output = getattr(model, LOOPS[mode])(input_ids, **arguments, **model_kwargs)
                sequences = output if isinstance(output, torch.Tensor) else output.sequences
                new = new_tokens(sequences, input_ids.shape[1], config)
                self.stats.new_tokens = sum(map(len, new))
                self.finished(model, input_ids, model_kwargs, sequences, new)
        finally:
            hook.remove()
        self.stats.seconds = time.perf_counter() - began
        return output


def new_tokens(sequences: torch.Tensor, prompt_length: int, config: Any) -> list[list[int]]:
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
