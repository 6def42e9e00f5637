"""Trials of retokenizers (the tokenizer's own tokens and each method's, on the same text), of merges, of models over bytes, of transplants."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.errors import BadInputError
from ..core.settings import read_text
from ..core.trace import TokenTrace
from ..decoding.trial import TrialRequest, TrialResult
from .base import spell, start_token

CUT = "The capital of France is Par"
FOREIGN = (
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und sollen einander im "
    "Geiste der Brüderlichkeit begegnen. Jeder hat das Recht auf Leben, Freiheit und Sicherheit der Person. Niemand darf in Sklaverei"
)
EXAMPLE = "Strawberry fields: how many r's are in strawberry? Tokenizers rarely know, and 1234 + 5678 is 6912."


def text_of(request: TrialRequest, example: str) -> str:
    """The user's text, or the example.

    Raises:
        BadInputError: an empty text, no such file, or one that is no UTF-8.
    """
    text = request.prompt if request.prompt is not None else example
    if request.data is not None:
        text = read_text(Path(request.data))
    if not text:
        raise BadInputError("The text is empty.", 'Give some: --prompt "Strawberry"')
    return text


def trial(request: TrialRequest) -> TrialResult:
    """Runs methods of one kind; see ``decoding.trial``.

    Raises:
        BadInputError: methods of two kinds at once.
    """
    runners = {
        "on": bytes_trial,
        "transplant": transplant_trial,
        "expand": retokenizer_trial,
        "merges_for": dynamic_trial,
    }
    kinds = {next(kind for kind in runners if hasattr(item.factory, kind)) for item in request.trials}
    if len(kinds) > 1:
        raise BadInputError(
            "Methods that split tokens, merge them, put models over bytes and transplant cannot be compared.",
            "Run them apart.",
        )
    return runners[kinds.pop()](request)


def retokenizer_trial(request: TrialRequest) -> TrialResult:
    """Length, bytes per token and speed of each method; see ``decoding.trial``."""
    text = text_of(request, EXAMPLE)
    from ..core.loading import load_tokenizer

    request.report("loading the tokenizer")
    tokenizer = load_tokenizer(request.model)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise BadInputError("The tokenizer makes no tokens of this text.")
    size = len(text.encode())
    rows = {"tokenizer": {"tokens": float(len(ids)), "bytes per token": size / len(ids)}}
    result = TrialResult(rows, "tokens", column="part", texts={"tokenizer": text})
    for item in request.trials:
        request.report(f"running {item.name}")
        method = item.factory(tokenizer, **{"seed": int(request.options.get("seed", 0))} | item.settings)
        method.expand(ids[:64])  # compile
        repeats = max(1, 200_000 // len(ids))
        began = time.perf_counter()
        for _ in range(repeats):
            method.expand(ids)
        seconds = time.perf_counter() - began
        new = method.expand(ids, seed=int(request.options.get("seed", 0)))
        counts: dict[int, int] = {}
        for source in new.source.tolist():
            counts[source] = counts.get(source, 0) + 1
        parts: list[float | int | str | bool | None] = [
            "whole" if counts[source] == 1 else f"one of {counts[source]}" for source in new.source.tolist()
        ]
        lossless = spell(tokenizer, new.ids) == spell(tokenizer, ids)
        rows[item.name] = {
            "tokens": float(len(new.ids)),
            "bytes per token": size / len(new.ids),
            "million tokens per second": repeats * len(ids) / seconds / 1e6,
        }
        trace = TokenTrace(new.ids.tolist(), title=item.name, station="tokenization").add("part", parts)
        trace.add("source", [ids[source] for source in new.source.tolist()])
        result.traces.append(trace.with_text(tokenizer))
        result.texts[item.name] = tokenizer.decode(new.ids.tolist())
        result.notes.append(f"{item.name}: the bytes are {'unchanged' if lossless else 'CHANGED'}.")
    return result


def bytes_trial(request: TrialRequest) -> TrialResult:
    """What comes after a prompt that ends anywhere: from its own tokens, and from all token sequences that cover it."""
    import numpy as np

    from ..core.loading import load_model, load_tokenizer

    text = text_of(request, CUT)
    settings = [(item.name, item.factory(**item.settings)) for item in request.trials]
    tokenizer = load_tokenizer(request.model)
    request.report("loading the model")
    model = load_model(request.model, dtype=request.options.get("dtype", "auto"), packed=True)
    size = int(request.options.get("max_new_tokens", 24))
    sampling = {"do_sample": request.options.get("temperature", 0.0) > 0, "seed": int(request.options.get("seed", 0))}
    if sampling["do_sample"]:
        sampling["temperature"] = request.options["temperature"]
    rows: dict[str, dict[str, float]] = {}
    result = TrialResult(rows, "next byte, bits of entropy", column="probability")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    arms = [
        ("own tokens", settings[0][1].on(model, tokenizer), True),
        *((n, s.on(model, tokenizer), False) for n, s in settings),
    ]
    for (name, lm, naive), unit in zip(arms, ["token", *(s.unit for _, s in settings)], strict=True):
        request.report(f"running {name}")
        prompt = text
        if naive:
            lm.context, prompt = [*lm.context, *ids], ""
        began, before = time.perf_counter(), lm.forwards
        logps = lm.next_byte_logprobs(prompt)
        new = lm.generate(prompt, size, unit=unit, **sampling)
        kept = np.isfinite(logps)
        rows[name] = {
            "next byte, bits of entropy": float(-(np.exp(logps[kept]) * logps[kept]).sum() / np.log(2)),
            "forwards a byte": (lm.forwards - before) / max(1, len(new)),
            "bytes per second": len(new) / (time.perf_counter() - began),
        }
        result.texts[name] = new.decode("utf-8", "replace")
        best = ", ".join(f"{bytes([b])!r} {np.exp(logps[b]):.2f}" for b in np.argsort(-logps[:256])[:3].tolist())
        result.notes.append(f"{name}: {text!r} goes on with {result.texts[name]!r}; next byte {best}")
        if not naive:
            result.traces.append(lm.trace(prompt))
    return result


def bits_a_byte(model: Any, tokenizer: Any, text: str, window: int = 512) -> float:
    """Bits per byte of a text, in windows of tokens that start from nothing."""
    import math

    import torch

    from ..core.logprobs import token_stats

    ids, start, total = tokenizer(text, add_special_tokens=False)["input_ids"], start_token(tokenizer), 0.0
    with torch.inference_mode():
        for begin in range(0, len(ids), window):
            row = torch.tensor([[start, *ids[begin : begin + window]]])
            hidden = model.base_model(input_ids=row).last_hidden_state[0, :-1]
            total -= float(token_stats(hidden, model.get_output_embeddings().weight, row[0, 1:]).logps.sum())
    return total / math.log(2) / len(text.encode())


def transplant_trial(request: TrialRequest) -> TrialResult:
    """Bits per byte before and after a change of tokenizer; ``data`` names the new one (see ``foreign_tokenizers.load_any_tokenizer``)."""
    from ..core.loading import load_model, load_tokenizer
    from .foreign_tokenizers import load_any_tokenizer

    text = text_of(replace(request, data=None), EXAMPLE)
    new = load_any_tokenizer(request.data or "mistral")
    old = load_tokenizer(request.model)
    request.report("loading the model")
    model = load_model(request.model, dtype="float32")
    rows: dict[str, dict[str, float]] = {}
    result = TrialResult(rows, "bits per byte", column="origin")
    arms: list[tuple[str, Any, Any]] = [("own tokenizer", model, old)]
    for item in request.trials:
        request.report(f"running {item.name} (the text embeddings of two vocabularies take about a minute)")
        method = item.factory(**item.settings)
        arms.append((item.name, method.transplant(model, old, new), new))
        result.traces.append(method.trace(old, new, new(text, add_special_tokens=False)["input_ids"]))
        copied, mixed = int((method.mixture.copied >= 0).sum()), len(method.mixture.rows)
        result.notes.append(f"{item.name}: {copied:,} rows copied, {mixed:,} made.")
    for name, arm, tokenizer in arms:
        count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        rows[name] = {
            "bits per byte": bits_a_byte(arm, tokenizer, text, window=count),
            "tokens": float(count),
            "vocabulary": float(arm.config.get_text_config().vocab_size),
        }
    return result


def dynamic_trial(request: TrialRequest) -> TrialResult:
    """A prompt read in fewer positions, and what the model says after it: no merges, each method, and the mean of the pieces."""
    import torch

    from ..core.loading import load_model, load_tokenizer
    from .dynamic_prefill import DynamicPrefill
    from .dynamic_tokenization import DynamicTokenizer
    from .hyper import Embedder, HyperEmbedding, MeanEmbedding

    text = text_of(request, FOREIGN)
    tokenizer = load_tokenizer(request.model)
    dynamics = [(item.name, item.factory(tokenizer, **item.settings)) for item in request.trials]
    request.report("loading the model")
    model = load_model(request.model, dtype=request.options.get("dtype", "auto"), packed=True)
    mean = MeanEmbedding(model)
    result = TrialResult({}, "positions", column="pieces in the token")
    try:
        best: Embedder = HyperEmbedding.from_pretrained("smollm2-135m").attach(model)
    except BadInputError as error:
        best = mean
        result.notes.append(f"{error.message} The mean of the pieces is used.")
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    if ids.shape[1] < 2:
        raise BadInputError("The text is too short to merge anything.", "Give at least two tokens.")
    arms: list[tuple[str, Any, Any]] = [("own tokens", DynamicTokenizer(tokenizer, merges=0), mean)]
    for name, dynamic in dynamics:
        arms.append((name, dynamic, best))
        if best is not mean:
            arms.append((f"{name}, mean of pieces", replace(dynamic), mean))
    options: dict[str, Any] = {"max_new_tokens": int(request.options.get("max_new_tokens", 32)), "do_sample": False}
    if request.options.get("temperature", 0.0) > 0:
        options |= {"do_sample": True, "temperature": request.options["temperature"]}
    for name, dynamic, embedder in arms:
        request.report(f"running {name}")
        dynamic.embedder = embedder
        prefill = DynamicPrefill(dynamic)
        torch.manual_seed(int(request.options.get("seed", 0)))
        model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0, custom_generate=prefill)  # compile
        began = time.perf_counter()
        model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0, custom_generate=prefill)
        seconds = time.perf_counter() - began
        out = model.generate(ids, pad_token_id=0, custom_generate=prefill, **options)[0, ids.shape[1] :]
        result.rows[name] = {
            "positions": float(prefill.positions),
            "bytes per position": len(text.encode()) / prefill.positions,
            "prefill seconds": seconds,
        }
        result.texts[name] = tokenizer.decode(out, skip_special_tokens=True)
        result.notes.append(f"{name}: ... {result.texts[name]!r}")
        if embedder is best and name != "own tokens":
            result.traces.append(dynamic([ids[0].tolist()]).trace(0, tokenizer))
    return result
