"""The trial of a ``ByteMethod``: what comes after a prompt that ends anywhere.

The baseline goes on after the prompt's own tokens, each method after the bytes of the prompt.
"""

from __future__ import annotations

import time

import numpy as np

from ...core.loading import load_model, load_tokenizer, model_shell
from ...decoding.trial import TrialRequest, TrialResult
from ..base import ByteModel, start_token
from ..byte_view import ByteView
from .inputs import sampling_of, seed_of, text_of

EXAMPLE = "The capital of France is Par"
BASELINE = "own tokens"


def trial(request: TrialRequest) -> TrialResult:
    """Entropy of the next byte, forward passes a byte and speed; see ``decoding.trial``."""
    text = text_of(request, EXAMPLE)
    methods = {item.name: item.factory(**item.settings) for item in request.trials}
    tokenizer = load_tokenizer(request.model)
    ByteView.of(tokenizer)  # a tokenizer that changes texts is refused before weights are read
    shell = model_shell(request.model)
    for method in methods.values():
        method.check_model(shell)  # an architecture that it cannot read too
    request.report("loading the model", 0, 0)
    model = load_model(request.model, dtype=request.options.get("dtype", "auto"), packed=True)
    size = int(request.options.get("max_new_tokens", 24))
    sampling, seed = sampling_of(request), seed_of(request)
    own = [start_token(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]]
    # the baseline has the prompt's tokens as its context and goes on token by token from there
    first = next(iter(methods.values()))
    arms: dict[str, tuple[ByteModel, str]] = {BASELINE: (first.on(model, tokenizer, own), "")}
    arms |= {name: (method.on(model, tokenizer), text) for name, method in methods.items()}
    rows: dict[str, dict[str, float]] = {}
    result = TrialResult(rows, "next byte, bits of entropy", column="probability")
    for name, (lm, prompt) in arms.items():
        request.report(f"running {name}", 0, 0)
        began, before = time.perf_counter(), lm.forwards
        logps = lm.next_byte_logprobs(prompt)
        new = lm.generate(prompt, size, seed=seed, unit="token" if name == BASELINE else None, **sampling)
        kept = np.isfinite(logps)
        rows[name] = {
            "next byte, bits of entropy": float(-(np.exp(logps[kept]) * logps[kept]).sum() / np.log(2)),
            "forwards a byte": (lm.forwards - before) / max(1, len(new)),
            "bytes per second": len(new) / (time.perf_counter() - began),
        }
        result.texts[name] = new.decode("utf-8", "replace")
        best = ", ".join(f"{bytes([b])!r} {np.exp(logps[b]):.2f}" for b in np.argsort(-logps[:256])[:3].tolist())
        result.notes.append(f"{name}: {text!r} goes on with {result.texts[name]!r}; next byte {best}")
        if name != BASELINE:
            result.traces.append(lm.trace(prompt))
    return result
