"""What ``everytoken try`` and ``compare`` ask of a station: its ``trial`` module.

``everytoken.STATION.trial`` holds ``trial(requests) -> TrialResult``: it runs the station's baseline and every requested method
on the same work in one process, and returns one row of figures for each. A new method of the station needs no trial of its
own: the contract that all methods of a station share is enough to run them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import BadInputError
from ..core.progress import Report, silent
from ..core.scoring import check_prompt, encode_prompt
from ..core.trace import TokenTrace


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
        options: further options by name (``max_new_tokens``, ``temperature``, ``dtype``, ``seed``).
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
    """

    rows: dict[str, dict[str, float]]
    headline: str
    traces: list[TokenTrace] = field(default_factory=list)
    column: str | None = None
    texts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def baseline(self) -> str:
        return next(iter(self.rows))

    def ratio(self, name: str) -> float:
        """A method's headline figure over the baseline's."""
        base = self.rows[self.baseline][self.headline]
        return self.rows[name][self.headline] / base if base else float("nan")


EXAMPLE = "Why do cats purr? Answer in a few sentences."


def trial(request: TrialRequest) -> TrialResult:
    """Runs plain decoding, then every decoder; see ``decoding.trial``."""
    return run_decoders(request, EXAMPLE)


def run_decoders(request: TrialRequest, example: str) -> TrialResult:
    """Plain decoding and every decoder on one prompt.

    Args:
        example: the prompt if none is given.
    """
    prompt = example if request.prompt is None else request.prompt
    check_prompt(prompt)
    decoders = {item.name: item.factory(**item.settings, trace_enabled=True) for item in request.trials}
    from transformers import TextStreamer

    from ..core.loading import load_model, load_tokenizer
    from ..core.rng import seed_everything

    options = request.options
    request.report("loading the model", 0, 0)
    tokenizer = load_tokenizer(request.model)
    inputs = encode_prompt(tokenizer, prompt)
    length = inputs["input_ids"].shape[1]
    model = load_model(request.model, dtype=options.get("dtype", "auto"), packed=bool(options.get("packed", True)))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    new_tokens = int(options.get("max_new_tokens", 128))
    extends = all(decoder.extrapolates for decoder in decoders.values())
    if context is not None and length + new_tokens > context and not extends:
        raise BadInputError(
            f"The prompt has {length} tokens and {new_tokens} more are asked for; the model's context is {context}.",
            "Shorten the prompt, or lower --max-new-tokens.",
        )
    beyond = context is not None and length + new_tokens > context
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    temperature = float(options.get("temperature", 0.0))
    arguments: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        arguments |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            request.stream(text)

    request.report("warming up", 0, 0)
    model.generate(**inputs, max_new_tokens=4, do_sample=False)
    rows: dict[str, dict[str, float]] = {}
    result = TrialResult(rows, "tokens per second")
    if beyond:
        result.notes.append(
            f"The text is longer than the model's context of {context} tokens: plain decoding was not trained for it."
        )
    seed = int(options.get("seed", 0))

    def record(name: str, output: Any, seconds: float, extra: dict[str, float]) -> None:
        new = output[0, length:]
        rows[name] = {"tokens per second": len(new) / seconds, "new tokens": len(new), "seconds": seconds} | extra
        result.texts[name] = tokenizer.decode(new, skip_special_tokens=True)

    request.report("plain decoding", 0, 0)
    seed_everything(seed)
    began = time.perf_counter()
    output = model.generate(**inputs, **arguments)
    record("plain generate", output, time.perf_counter() - began, {"target forwards": float(output.shape[1] - length)})
    for name, decoder in decoders.items():
        request.report(f"decoding with {name}", 0, 0)
        decoder.load_helpers(model)  # loading is not decoding: keep it out of the time
        began = time.perf_counter()
        decoder.prepare(tokenizer, model.config.get_text_config().vocab_size)
        if (spent := time.perf_counter() - began) > 1e-3:
            result.notes.append(f"{name}: prepared in {1e3 * spent:.0f} ms.")
        mine = arguments
        if decoder.samples_only and temperature == 0:
            mine = arguments | {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
            result.notes.append(f"{name} samples; it ran at temperature 1 (choose with --temperature).")
        seed_everything(seed)
        streamer = (
            None
            if getattr(decoder, "particles", 1) > 1 or not decoder.streams
            else Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        )
        began = time.perf_counter()
        output = decoder.generate(model, **inputs, **mine, streamer=streamer)
        record(name, output, time.perf_counter() - began, decoder.figures())
        for trace in decoder.trace:
            trace.title = f"{name}: {prompt}"
            result.traces.append(trace.with_text(tokenizer))
        if temperature == 0 and decoder.lossless:
            same = result.texts[name] == result.texts["plain generate"]
            result.notes.append(
                f"{name}: the text is {'identical to' if same else 'different from'} plain greedy decoding"
                + ("." if same else " (rounding of the low-precision model, or a lossy method).")
            )
    wanted = [decoder.colour for decoder in decoders.values()]
    result.column = next((name for name in wanted if all(name in trace.columns for trace in result.traces)), None)
    return result
