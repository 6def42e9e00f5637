"""One model and one thread that writes with it: grammars, tools, samples, stop texts, log-probabilities, streams.

Requests wait in line and are written one after another, so a long queue is bounded by whoever takes requests. A request
that was cancelled ends at its next token.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from ..constraints.engine.compiler import GrammarCompiler
from ..constraints.engine.vocabulary import TokenizerInfo
from ..constraints.logits_processor import GrammarLogitsProcessor
from ..core.errors import BadInputError
from ..core.rng import derive_seed
from ..core.vocabulary import token_bytes
from ..decoding.base import Decoder
from .decoders import make_decoder, ready
from .requests import Ask, RequestError
from .text import PieceStreamer, StopCutter, StopTexts
from .tools import ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..constraints.engine.compiled import CompiledGrammar

KEPT = 8
"""Decoders of requests, and grammars of tools, that are kept."""
GREEDY = 1e-3
"""Temperatures below are 0: dividing by them leaves nothing to draw from."""
Say = Callable[[int, str], None]
"""Gets the index of a choice and the next piece of its text."""


@dataclass
class Choice:
    """One answer: its text, how it ended (``stop``, ``length``, ``tool_calls``), its tokens and what was asked of them.

    Attributes:
        logprobs: of each token, ``(token id, its log-probability, the likeliest as (id, log-probability))``.
    """

    index: int
    text: str
    finish: str
    tokens: list[int]
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[tuple[int, float, list[tuple[int, float]]]] | None = None


@dataclass
class Job:
    """A request with its prompts as ids and its grammar compiled."""

    ask: Ask
    prompts: list[list[int]]
    texts: list[str]
    max_tokens: list[int]
    compiled: CompiledGrammar | None
    decoder: Decoder | None

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


class _Penalties(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's penalties, of tokens in the answer, and biases of tokens."""

    def __init__(self, ask: Ask, prompt: int):
        self.ask, self.prompt = ask, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        written = input_ids[:, self.prompt :]
        if written.shape[1] and (self.ask.presence_penalty or self.ask.frequency_penalty):
            counts = torch.zeros_like(scores).scatter_add_(1, written, torch.ones_like(written, dtype=scores.dtype))
            scores = scores - self.ask.frequency_penalty * counts - self.ask.presence_penalty * (counts > 0)
        if self.ask.logit_bias:
            places = torch.tensor(list(self.ask.logit_bias), device=scores.device)
            values = torch.tensor(list(self.ask.logit_bias.values()), device=scores.device, dtype=scores.dtype)
            scores = scores.index_add(1, places, values.expand(scores.shape[0], -1))
        return scores


class _Cancelled(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class Engine:
    """Writes answers with a model.

    Args:
        model, tokenizer: of transformers; a causal language model.
        decoder: what writes where a request names nothing else; None is transformers' own generation.
        most_tokens: of one answer.
        per_request: whether a request may name a decoder. Its settings may name files and models, so only where every
            client is trusted.

    Raises:
        BadInputError: a model that is no causal language model, or that the decoder cannot work with.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        decoder: Decoder | None = None,
        most_tokens: int = 1024,
        per_request: bool = False,
    ):
        if not model.can_generate() or model.config.is_encoder_decoder:
            raise BadInputError(f"{type(model).__name__} writes no text from left to right.", "Serve a causal model.")
        if most_tokens < 1:
            raise BadInputError(f"An answer has at least one token; got {most_tokens}.")
        self.model, self.tokenizer, self.most_tokens, self.per_request = model, tokenizer, most_tokens, per_request
        given = model.generation_config
        ends = given.eos_token_id if given.eos_token_id is not None else tokenizer.eos_token_id
        self.ends: list[int] = ends if isinstance(ends, list) else [] if ends is None else [ends]
        pad = given.pad_token_id if given.pad_token_id is not None else tokenizer.pad_token_id
        self.pad = self.ends[0] if pad is None and self.ends else pad
        # what a request leaves open is neutral: the model's own defaults (a temperature, a penalty, beams) do not count
        model.generation_config = GenerationConfig(
            bos_token_id=given.bos_token_id, eos_token_id=self.ends or None, pad_token_id=self.pad,
            cache_implementation=given.cache_implementation,
        )  # fmt: skip
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.format = ChatFormat(tokenizer)
        self.decoder = None if decoder is None else ready(decoder, model, tokenizer)
        self._compiler: GrammarCompiler | None = None
        self._decoders: dict[tuple[Any, ...], Decoder] = {}
        self._grammars: dict[str, CompiledGrammar] = {}
        self._lock, self._loading = threading.Lock(), threading.Lock()

    def _named(self, name: str, settings: dict[str, Any]) -> Decoder:
        """A request's decoder; the last few are kept, as some load models of their own."""
        key = (name, *sorted((key, str(value)) for key, value in settings.items()))
        with self._loading:
            if key not in self._decoders:
                self._decoders[key] = ready(make_decoder(name, settings), self.model, self.tokenizer)
                if len(self._decoders) > KEPT:
                    self._decoders.pop(next(iter(self._decoders)))
            return self._decoders[key]

    def compiler(self) -> GrammarCompiler:
        with self._lock:
            if self._compiler is None:
                self._compiler = GrammarCompiler(
                    TokenizerInfo.from_huggingface(self.tokenizer, self.vocabulary, self.ends or None)
                )
            return self._compiler

    @cached_property
    def _bytes(self) -> Sequence[bytes | None]:
        """Of every token; empty where nobody knows how this tokenizer spells."""
        try:
            return token_bytes(self.tokenizer)
        except BadInputError:
            return ()

    def spelt(self, token: int) -> tuple[str, list[int] | None]:
        """A token's text and bytes. One that is no whole character is called by its bytes, so that names differ."""
        data = self._bytes[token] if token < len(self._bytes) else None
        if data is None:
            return self.tokenizer.decode([token]), None
        try:
            return data.decode(), list(data)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), list(data)

    def prepare(self, ask: Ask) -> Job:
        """Everything that can be refused: prompts read, lengths checked, the grammar compiled. Takes no model.

        Raises:
            RequestError, GrammarError, BadInputError: what cannot be honoured.
        """
        decoder = self.decoder
        if ask.decoder is not None:
            if not self.per_request:
                raise RequestError("This server lets no request choose a decoder.", "decoder")
            decoder = self._named(*ask.decoder)
        if ask.stream and ask.logprobs is not None:
            raise RequestError("A stream tells no logprobs here: ask without stream.", "logprobs")
        if ask.stream and len(ask.prompts) > 1:
            raise RequestError("A stream has one prompt.", "prompt")
        if ask.stream and ask.echo:
            raise RequestError("A stream does not echo its prompt: ask without stream.", "echo")
        if ask.stream and decoder is not None and not decoder.streams:
            raise RequestError(f"{type(decoder).__name__} cannot stream.", "stream")
        if any(token >= self.vocabulary for token in ask.logit_bias):
            raise RequestError(f"logit_bias names a token beyond the vocabulary of {self.vocabulary}.", "logit_bias")
        texts = [self.format.prompt(ask.messages, ask.tools)] if ask.chat else ["" for _ in ask.prompts]
        prompts = []
        for place, prompt in enumerate(texts if ask.chat else ask.prompts):
            if isinstance(prompt, str):
                texts[place] = prompt
                prompts.append(list(self.tokenizer(prompt, add_special_tokens=not ask.chat)["input_ids"]))
            else:
                prompts.append(list(prompt))
                if max(prompts[-1]) >= self.vocabulary:
                    raise RequestError(f"The prompt has a token beyond the vocabulary of {self.vocabulary}.", "prompt")
                texts[place] = self.tokenizer.decode(prompts[-1])
        return Job(ask, prompts, texts, [self._room(ask, prompt) for prompt in prompts], self._compiled(ask), decoder)

    def _room(self, ask: Ask, prompt: list[int]) -> int:
        """How many tokens an answer to this prompt may have."""
        if not prompt:
            raise RequestError("The prompt has no tokens.", "prompt")
        room = self.most_tokens if self.context is None else min(self.most_tokens, self.context - len(prompt))
        if room < 1:
            raise RequestError(f"The prompt has {len(prompt)} tokens and the model reads {self.context}.", "messages")
        if ask.max_tokens is not None and ask.max_tokens > room:
            raise RequestError(
                f"max_tokens is {ask.max_tokens}; this server gives {room} behind a prompt of {len(prompt)} tokens.",
                "max_tokens",
            )
        return ask.max_tokens or room

    def _compiled(self, ask: Ask) -> CompiledGrammar | None:
        if ask.tools:
            return self._tools_compiled(ask)
        if ask.constraint is None:
            return None
        kind, source = ask.constraint
        if kind == "schema":
            return self.compiler().compile_json_schema(source)
        return self.compiler().compile_regex(source) if kind == "regex" else self.compiler().compile_grammar(source)

    def _tools_compiled(self, ask: Ask) -> CompiledGrammar:
        key = json.dumps([ask.tools, ask.tool_choice, ask.one_call])
        with self._lock:
            kept = self._grammars.get(key)
        if kept is None:
            grammar = self.format.tools.grammar(ask.tools, ask.tool_choice, ask.one_call)
            kept = self.compiler().compile_grammar(grammar)
            with self._lock:
                self._grammars[key] = kept
                if len(self._grammars) > KEPT:
                    self._grammars.pop(next(iter(self._grammars)))
        return kept

    def run(self, job: Job, cancelled: threading.Event, say: Say | None = None) -> list[Choice]:
        """All choices of a request, in the order of prompts and then of samples. Call it from one thread at a time."""
        found: list[Choice] = []
        ask = job.ask
        with torch.random.fork_rng(devices=[self.model.device] if self.model.device.type == "cuda" else []):
            torch.seed()
            for prompt, most in zip(job.prompts, job.max_tokens, strict=True):
                if cancelled.is_set():
                    break
                first = len(found)
                # a stream has one row, a decoder of one row after the other wants a grammar of its own for each, scores
                # of all rows at once would be large, and rows that stopped earlier would count their padding
                apart = ask.logprobs is not None or bool(ask.stop) or say is not None or ask.seed is not None
                alone = apart or (job.decoder is not None and job.compiled is not None)
                if alone and (say is not None or ask.temperature >= GREEDY):
                    for index in range(first, first + ask.n):
                        if cancelled.is_set():
                            break
                        if ask.seed is not None:  # the same choices, whole and as a stream
                            torch.manual_seed(derive_seed(ask.seed, "choice", index))
                        found += self._write(job, prompt, most, 1, cancelled, first=index, say=say)
                else:
                    found += self._write(job, prompt, most, ask.n, cancelled, first=first, say=say)
        return found

    def _write(
        self, job: Job, prompt: list[int], most: int, count: int, cancelled: threading.Event, first: int,
        say: Say | None = None,
    ) -> list[Choice]:  # fmt: skip
        ask, ids = job.ask, torch.tensor([prompt], device=self.model.device)
        rows = 1 if ask.temperature < GREEDY else count
        config = self._config(ask, most, rows)
        processors: list[LogitsProcessor] = []
        if ask.presence_penalty or ask.frequency_penalty or ask.logit_bias:
            processors.append(_Penalties(ask, len(prompt)))
        if job.compiled is not None:
            processors.append(GrammarLogitsProcessor(job.compiled))
        arguments: dict[str, Any] = {
            "attention_mask": torch.ones_like(ids),
            "generation_config": config,
            "logits_processor": processors,
            "stopping_criteria": [
                _Cancelled(cancelled),
                *([StopTexts(self.tokenizer, ask.stop, len(prompt))] if ask.stop else []),
            ],
        }
        if say is not None:
            cutter = StopCutter(ask.stop, lambda text: say(first, text))
            arguments["streamer"] = PieceStreamer(self.tokenizer, cutter, self.ends)
        with torch.no_grad():
            output: Any = (
                self.model.generate(ids, **arguments)
                if job.decoder is None
                else job.decoder.generate(self.model, ids, **arguments)
            )
        answers = output.sequences[:, len(prompt) :].tolist()
        told = None if ask.logprobs is None else _told(output.logits, output.sequences[:, len(prompt) :], ask.logprobs)
        choices = [self._choice(ask, first + row, answers[row], told[row] if told else None) for row in range(rows)]
        return choices + [replace(choices[0], index=first + row) for row in range(rows, count)]

    def _config(self, ask: Ask, most: int, rows: int) -> GenerationConfig:
        """Sampling is the request's own: the model's defaults (a temperature, a repetition penalty) do not count."""
        sampling: dict[str, Any] = {}
        if ask.temperature >= GREEDY:
            sampling = {"do_sample": True, "temperature": ask.temperature, "top_p": ask.top_p, "top_k": ask.top_k}
            sampling |= {"num_return_sequences": rows} | ({"min_p": ask.min_p} if ask.min_p else {})
        return GenerationConfig(
            max_new_tokens=most, eos_token_id=self.ends or None, pad_token_id=self.pad,
            bos_token_id=self.model.generation_config.bos_token_id, repetition_penalty=ask.repetition_penalty,
            return_dict_in_generate=True, output_logits=ask.logprobs is not None, **({"do_sample": False} | sampling),
        )  # fmt: skip

    def _choice(self, ask: Ask, index: int, tokens: list[int], told: Any) -> Choice:
        length = next((place for place, token in enumerate(tokens) if token in self.ends), None)
        ended, size = length is not None, len(tokens) if length is None else length + 1
        tokens = tokens[:size]
        text = self.tokenizer.decode(
            tokens[:length], skip_special_tokens=True
        )  # an end is no part of it, special or not
        cuts = [place for stop in ask.stop if (place := text.find(stop)) >= 0]
        spelt = self.tokenizer.decode(tokens, skip_special_tokens=False) if ask.stop else ""
        finish = "stop" if ended or any(stop in spelt for stop in ask.stop) else "length"
        text = text[: min(cuts)] if cuts else text
        calls: list[dict[str, Any]] = []
        if ask.tools:
            text, calls = self.format.tools.split(text, list(ask.tools))
            finish = "tool_calls" if calls else finish
        return Choice(index, text, finish, tokens, calls, None if told is None else told[:size])


def _told(logits: Sequence[torch.Tensor], tokens: torch.Tensor, top: int) -> list[list[Any]]:
    """For each row and place: the token, its log-probability by the model, and the likeliest tokens."""
    own, likeliest = [], []
    for step, scores in enumerate(logits):
        logps = scores.float().log_softmax(-1)
        own.append(logps.gather(1, tokens[:, step : step + 1])[:, 0])
        likeliest.append(logps.topk(max(top, 1), dim=-1))
    values = torch.stack(own, 1).tolist()
    ids = torch.stack([item.indices for item in likeliest], 1).tolist()
    best = torch.stack([item.values for item in likeliest], 1).tolist()
    ids_written = tokens.tolist()
    return [
        [
            (ids_written[row][step], value, list(zip(ids[row][step], best[row][step], strict=True))[:top])
            for step, value in enumerate(line)
        ]
        for row, line in enumerate(values)
    ]
