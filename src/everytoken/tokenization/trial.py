"""Trials of retokenizers: the tokenizer's own tokens and each method's, on the same text."""

from __future__ import annotations

import time
from pathlib import Path

from ..core.errors import BadInputError
from ..core.trace import TokenTrace
from ..core.trials import TrialRequest, TrialResult
from .base import spell

EXAMPLE = "Strawberry fields: how many r's are in strawberry? Tokenizers rarely know, and 1234 + 5678 is 6912."


def trial(request: TrialRequest) -> TrialResult:
    """Length, bytes per token and speed of each method; see ``core.trials``."""
    text = request.prompt if request.prompt is not None else EXAMPLE
    if request.data is not None:
        path = Path(request.data)
        if not path.is_file():
            raise BadInputError(f"There is no file {path}.")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BadInputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    if not text:
        raise BadInputError("The text is empty.", 'Give some: --prompt "Strawberry"')
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
