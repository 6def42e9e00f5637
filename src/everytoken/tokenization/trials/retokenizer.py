"""The trial of a ``Retokenizer``: the tokenizer's own tokens and each method's, on the same text."""

from __future__ import annotations

import time
from collections import Counter

from ...core.errors import BadInputError
from ...core.loading import load_tokenizer
from ...core.trace import TokenTrace
from ...decoding.trial import TrialRequest, TrialResult
from ..base import spell
from .inputs import EXAMPLE, seed_of, text_of

TIMED_TOKENS = 200_000
"""About so many tokens are rewritten to measure the speed."""


def trial(request: TrialRequest) -> TrialResult:
    """Length, bytes per token and speed of each method; see ``decoding.trial``."""
    text = text_of(request, EXAMPLE)
    request.report("loading the tokenizer", 0, 0)
    tokenizer = load_tokenizer(request.model)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise BadInputError("The tokenizer makes no tokens of this text.")
    size, seed = len(text.encode()), seed_of(request)
    rows = {"tokenizer": {"tokens": float(len(ids)), "bytes per token": size / len(ids)}}
    result = TrialResult(rows, "tokens", column="part", texts={"tokenizer": text})
    for item in request.trials:
        request.report(f"running {item.name}", 0, 0)
        method = item.factory(tokenizer, **{"seed": seed} | item.settings)
        method.expand(ids[:64])  # compile
        repeats = max(1, TIMED_TOKENS // len(ids))
        began = time.perf_counter()
        for _ in range(repeats):
            method.expand(ids)
        seconds = time.perf_counter() - began
        new = method.expand(ids, seed=seed)
        sources = new.source.tolist()
        counts = Counter(sources)
        lossless = spell(tokenizer, new.ids) == spell(tokenizer, ids)
        rows[item.name] = {
            "tokens": float(len(new.ids)),
            "bytes per token": size / len(new.ids),
            "million tokens per second": repeats * len(ids) / seconds / 1e6,
        }
        trace = TokenTrace(new.ids.tolist(), title=item.name, station="tokenization")
        trace.add("part", ["whole" if counts[source] == 1 else f"one of {counts[source]}" for source in sources])
        trace.add("source", [ids[source] for source in sources])
        result.traces.append(trace.with_text(tokenizer))
        result.texts[item.name] = tokenizer.decode(new.ids.tolist())
        result.notes.append(f"{item.name}: the bytes are {'unchanged' if lossless else 'CHANGED'}.")
    return result
