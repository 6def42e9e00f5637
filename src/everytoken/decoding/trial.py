"""What ``everytoken try`` and ``compare`` ask of a station: its ``trial`` module.

``everytoken.STATION.trial`` holds ``trial(requests) -> TrialResult``: it runs the station's baseline and every
requested method on the same work in one process, and returns one row of figures for each. A new method of the station
needs no trial of its own: the contract that all methods of a station share is enough to run them.

Which columns a method's traces have is said by its ``trace_columns``, a tuple on its class; where that depends on more,
by ``trace_columns(trial) -> names`` in the module of the trial.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..core.errors import BadInputError, EverytokenError, UnsupportedModelError
from ..core.progress import Report, silent
from ..core.scoring import check_prompt, encode_prompt, end_tokens
from ..core.trace import TokenTrace

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    from .base import Decoder


@dataclass
class Trial:
    """One method to run.

    Attributes:
        name: the card's slug (with a suffix where one method runs twice).
        factory: its implementation.
        settings: arguments for it, already typed.
    """

    name: str
    factory: Any
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrialRequest:
    """The work.

    Attributes:
        trials: the methods.
        model: as for ``load_model``.
        prompt: the user's text, or None for the station's own example.
        data: a file of the user's, or None.
        options: further options by name (``max_new_tokens``, ``temperature``, ``dtype``, ``seed``; ``weights`` and
            ``calibrate``, see ``core.choosing``; ``peer``, see ``decoding.llama_cpp``; ``image``, a file).
        stream: called with pieces of text as they appear.
        report: called with ``(stage, done, total)``.
    """

    trials: list[Trial]
    model: str | None = None
    prompt: str | None = None
    data: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    stream: Callable[[str], None] = lambda _text: None
    report: Report = silent


@dataclass
class TrialResult:
    """What came out.

    Attributes:
        rows: method (the baseline first) -> metric -> figure.
        headline: the metric to plot and to compare with the baseline.
        traces: what the methods decided, for ``--trace`` and the terminal.
        column: the trace column to colour.
        texts: method -> text, where there is one.
        notes: sentences worth saying.
        pictures: pieces of HTML for the top of the trace's page.
    """

    rows: dict[str, dict[str, float]]
    headline: str
    traces: list[TokenTrace] = field(default_factory=list)
    column: str | None = None
    texts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)

    @property
    def baseline(self) -> str:
        return next(iter(self.rows))

    def ratio(self, name: str) -> float:
        """A method's headline figure over the baseline's."""
        base = self.rows[self.baseline][self.headline]
        return self.rows[name][self.headline] / base if base else float("nan")


EXAMPLE = "Why do cats purr? Answer in a few sentences."


def trial(request: TrialRequest) -> TrialResult:
    """Runs plain decoding, then every decoder, on a question about cats unless the user gives a prompt."""
    return run_decoders(request, EXAMPLE)


def run_decoders(request: TrialRequest, example: str) -> TrialResult:
    """Plain decoding and every decoder on one prompt.

    Args:
        example: the prompt if none is given.

    Raises:
        BadInputError: the prompt is too long for the model, or a decoder cannot honour what is asked for.
        UnsupportedModelError: a decoder cannot decode with this model; said before any weights are read.
    """
    prompt = example if request.prompt is None else request.prompt
    check_prompt(prompt)
    decoders: dict[str, Decoder] = {
        item.name: item.factory(**item.settings, trace_enabled=True) for item in request.trials
    }
    from ..core.choosing import load_fastest
    from ..core.loading import load_config, load_tokenizer
    from .lean import lean_forward
    from .llama_cpp import runs_beside
    from .plain import PlainDecoding

    options = request.options
    config = load_config(request.model)
    for decoder in decoders.values():
        decoder.check_model(config)
    peer = runs_beside(str(options.get("peer", "none")), request.model)
    request.report("loading the model", 0, 0)
    tokenizer = load_tokenizer(request.model)
    inputs = encode_prompt(tokenizer, prompt)
    new_tokens = int(options.get("max_new_tokens", 128))
    length = inputs["input_ids"].shape[1]
    extends = all(decoder.extrapolates for decoder in decoders.values())
    beyond = check_context(config, length, new_tokens, extends)
    model, choice = load_fastest(
        request.model,
        str(options.get("weights", "auto")),
        str(options.get("dtype", "auto")),
        compiled=all(getattr(item.factory, "compiled", False) for item in request.trials),
        measure=bool(options.get("calibrate", True)),
        report=request.report,
    )
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    temperature = float(options.get("temperature", 0.0))
    arguments: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        arguments |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    result = TrialResult({}, "tokens per second", notes=[beyond] if beyond else [])
    work = _Work(request, result, model, tokenizer, inputs, arguments)
    request.report("warming up", 0, 0)
    model.generate(**inputs, max_new_tokens=4, do_sample=False)
    counted = work.streamer("plain decoding", lambda _text: None)
    output, seconds = work.timed(lambda: model.generate(**inputs, **arguments, streamer=counted))
    work.record("plain generate", output, seconds, {"target forwards": float(output.shape[1] - length)})
    name = "plain, compiled" if lean_forward(model) is not None else "plain, lean loop"
    if beyond is None:  # our own loop stops where the model's positions do
        with contextlib.suppress(UnsupportedModelError):  # not every model's cache is read row by row
            work.run(name, PlainDecoding(), prompt, shown=False)
    # the baseline comes first: the fastest way of decoding plainly
    result.rows = dict(sorted(result.rows.items(), key=lambda item: -item[1][result.headline]))
    report = getattr(model, "weights_report", None)
    result.notes.append(f"Weights: {choice}{f'; {report}' if report else ''} (choose with --weights).")
    if choice.advice:
        result.notes.append(choice.advice)
    for name, decoder in decoders.items():
        work.run(name, decoder, prompt)
        if temperature == 0 and decoder.lossless:
            same = result.texts[name] == result.texts["plain generate"]
            result.notes.append(
                f"{name}: the text is {'identical to' if same else 'different from'} plain greedy decoding"
                + ("." if same else " (rounding of the low-precision model, or a lossy method).")
            )
    if peer:
        work.beside(temperature)
    wanted = [decoder.colour for decoder in decoders.values()]
    result.column = next((name for name in wanted if all(name in trace.columns for trace in result.traces)), None)
    return result


def check_context(config: PreTrainedConfig, length: int, new_tokens: int, extends: bool) -> str | None:
    """A note where prompt and answer are longer than the model's context, or None.

    Raises:
        BadInputError: they are, and not all decoders can go beyond it.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is None or length + new_tokens <= context:
        return None
    if not extends:
        raise BadInputError(
            f"The prompt has {length} tokens and {new_tokens} more are asked for; the model's context is {context}.",
            "Shorten the prompt, or lower --max-new-tokens.",
        )
    return f"The text is longer than the model's context of {context} tokens: plain decoding was not trained for it."


WARM_PROMPT, WARM_TOKENS = 64, 8
"""Tokens of the prompt, and new ones, that a decoder reads and writes before its time is taken."""


@dataclass
class _Work:
    """One prompt, and what every method made of it."""

    request: TrialRequest
    result: TrialResult
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    inputs: dict[str, torch.Tensor]
    arguments: dict[str, Any]

    def timed(self, decode: Callable[[], Any]) -> tuple[Any, float]:
        """What ``decode()`` returns from the trial's seed, and its seconds."""
        from ..core.rng import seed_everything

        seed_everything(int(self.request.options.get("seed", 0)))
        began = time.perf_counter()
        output = decode()
        return output, time.perf_counter() - began

    def record(self, name: str, output: torch.Tensor, seconds: float, figures: dict[str, float]) -> None:
        """A method's row of figures, and its text."""
        new = output[0, self.inputs["input_ids"].shape[1] :]
        row = {"tokens per second": len(new) / seconds, "new tokens": float(len(new)), "seconds": seconds}
        self.result.rows[name] = row | figures
        self.result.texts[name] = self.tokenizer.decode(new, skip_special_tokens=True)

    def run(self, name: str, decoder: Decoder, prompt: str, shown: bool = True) -> None:
        """Decodes with one method; loading its helpers and preparing it is not part of the time.

        Args:
            shown: stream its text.
        """
        notes, arguments = self.result.notes, self.arguments
        decoder.load_helpers(self.model)
        began = time.perf_counter()
        decoder.prepare(self.tokenizer, self.model.config.get_text_config().vocab_size)
        if (spent := time.perf_counter() - began) > 1e-3:
            notes.append(f"{name}: prepared in {1e3 * spent:.0f} ms.")
        if decoder.samples_only and not arguments["do_sample"]:
            arguments = arguments | {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
            notes.append(f"{name} samples; it ran at temperature 1 (choose with --temperature).")
        self.request.report("warming up", 0, 0)
        self.warm(decoder, arguments)
        stage = f"decoding with {name}"
        self.request.report(stage, 0, 0)
        streamer = (
            self.streamer(stage, self.request.stream if shown else lambda _text: None) if decoder.streams else None
        )
        output, seconds = self.timed(
            lambda: decoder.generate(self.model, **self.inputs, **arguments, streamer=streamer)
        )
        self.record(name, output, seconds, decoder.figures())
        for trace in decoder.trace:
            trace.title = f"{name}: {prompt}"
            self.result.traces.append(trace.with_text(self.tokenizer))

    def warm(self, decoder: Decoder, arguments: dict[str, Any]) -> None:
        """A few tokens after the prompt's end: kernels are loaded and speeds known before the time counts, as plain
        generation's are.
        """
        end = {name: value[:, -WARM_PROMPT:] for name, value in self.inputs.items()}
        few = min(WARM_TOKENS, int(arguments["max_new_tokens"]))
        with contextlib.suppress(EverytokenError):  # what is refused is refused by the run itself
            decoder.generate(self.model, **end, **arguments | {"max_new_tokens": few})

    def beside(self, temperature: float) -> None:
        """llama.cpp's row; loading the file is not part of the time."""
        import torch

        from ..core.converted import gguf_of
        from .llama_cpp import NAME, LlamaCpp

        path, prompt = gguf_of(self.request.model), self.inputs["input_ids"][0].tolist()
        assert path is not None
        self.request.report(f"decoding with {NAME}", 0, 0)
        wanted = int(self.arguments["max_new_tokens"])
        engine = LlamaCpp(path, len(prompt) + wanted + 8, torch.get_num_threads(), end_tokens(self.model))
        engine.decode(prompt, 1, temperature)
        new, seconds = engine.decode(prompt, wanted, temperature)
        self.record(NAME, torch.tensor([prompt + new]), seconds, {})
        self.result.notes.append(engine.note)

    def streamer(self, stage: str, stream: Callable[[str], None]) -> BaseStreamer:
        """Hands text to ``stream`` as it becomes final, and reports how many tokens there are of those asked for."""
        from transformers import TextStreamer

        report, total = self.request.report, int(self.arguments["max_new_tokens"])
        done = -self.inputs["input_ids"].shape[1]  # the prompt comes first
        report(stage, 0, total)

        class Streamer(TextStreamer):
            def put(self, value: torch.Tensor) -> None:
                nonlocal done
                super().put(value)
                done += value.numel()
                report(stage, max(done, 0), total)

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                stream(text)

        return Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
