"""The trial of this station: what a network decides on the user's own text, beside its baseline where it has one."""

from __future__ import annotations

import html
import time
from pathlib import Path

import torch

from ..core.errors import BadInputError
from ..core.loading import load_tokenizer
from ..core.rng import seed_everything
from ..core.settings import read_text
from ..decoding.trial import TrialRequest, TrialResult
from .base import Architecture

LIMIT = 20_000
"""Characters of a text that are shown."""


def trial(request: TrialRequest) -> TrialResult:
    """Every method's network on one text: its trace, its figures and the time; see ``decoding.trial``.

    Raises:
        BadInputError: an empty text, one longer than ``LIMIT``, or a folder of another method's network.
    """
    methods: dict[str, Architecture] = {item.name: item.factory(**item.settings) for item in request.trials}
    text = _text(request)
    for method in methods.values():
        method.folder(request.model)  # before anything is loaded
    only = next(iter(methods.values())) if len(methods) == 1 else None
    result = TrialResult({}, only.headline if only else Architecture.headline)
    seed = int(request.options.get("seed", 0))
    for name, method in methods.items():
        request.report(f"loading the network of {name}", 0, 0)
        model = method.load(request.model)
        folder = method.folder(request.model)
        tokenizer = load_tokenizer(folder) if (folder / "tokenizer_config.json").is_file() else None
        result.column = result.column or method.trace_columns[0]
        arms = {**method.arms(), name: method}
        for label, arm in arms.items():
            shown = label if only or label == name else f"{label} ({name})"
            request.report(f"reading with {shown}", 0, 0)
            asked = text or method.example, int(request.options.get("max_new_tokens", 0))
            with torch.no_grad():
                arm.observe(
                    model, tokenizer, *asked
                )  # kernels are loaded at the first use, which is not the method's time
                seed_everything(seed)
                began = time.perf_counter()
                seen = arm.observe(model, tokenizer, *asked)
            figures = seen.figures | {"milliseconds": 1e3 * (time.perf_counter() - began)}
            result.rows[shown] = figures
            if seen.text:
                result.texts[shown] = seen.text
                result.notes.append(f"{shown} wrote: {seen.text!r}")
            if seen.drawing:
                request.stream((f"{shown}:\n" if len(arms) > 1 or len(methods) > 1 else "") + seen.drawing + "\n")
            if seen.pictures and (len(arms) > 1 or len(methods) > 1):
                result.pictures.append(f"<h3>{html.escape(shown)}</h3>")  # whose pictures these are
            result.pictures += seen.pictures
            result.notes += seen.notes
            if arm is method:
                result.traces += seen.traces
    return result


def _text(request: TrialRequest) -> str | None:
    if request.prompt is not None and request.data is not None:
        raise BadInputError("A text comes from --prompt or from --data, not from both.")
    text = read_text(Path(request.data)) if request.data is not None else request.prompt
    if text is not None and not text.strip():
        raise BadInputError("The text is empty.", "Give one: --prompt 'Some words of yours.'")
    if text is not None and len(text) > LIMIT:
        raise BadInputError(f"The text has {len(text):,} characters; a trial shows {LIMIT:,} at most.", "Cut it.")
    return text
