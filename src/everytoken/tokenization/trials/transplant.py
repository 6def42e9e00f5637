"""The trial of a ``Transplanter``: bits per byte before and after a change of tokenizer."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.loading import load_model, load_tokenizer
from ...decoding.trial import TrialRequest, TrialResult
from ..base import bits_a_byte
from ..foreign_tokenizers import load_any_tokenizer
from .inputs import EXAMPLE, text_of

DEFAULT_TARGET = "mistral"


def trial(request: TrialRequest) -> TrialResult:
    """Bits per byte of the text under each tokenizer; see ``decoding.trial``.

    ``request.data`` names the new tokenizer (see ``foreign_tokenizers.load_any_tokenizer``).
    """
    text = text_of(replace(request, data=None), EXAMPLE)
    new = load_any_tokenizer(request.data or DEFAULT_TARGET)
    old = load_tokenizer(request.model)
    request.report("loading the model", 0, 0)
    model = load_model(request.model, dtype="float32")
    rows: dict[str, dict[str, float]] = {}
    result = TrialResult(rows, "bits per byte", column="origin")
    arms: list[tuple[str, PreTrainedModel, PreTrainedTokenizerBase]] = [("own tokenizer", model, old)]
    for item in request.trials:
        request.report(f"running {item.name}", 0, 0)
        method = item.factory(**item.settings)
        arms.append((item.name, method.transplant(model, old, new, request.report), new))
        result.traces.append(method.trace(old, new, new(text, add_special_tokens=False)["input_ids"]))
        result.notes.append(f"{item.name}: {method.summary()}")
    for name, arm, tokenizer in arms:
        count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        rows[name] = {
            "bits per byte": bits_a_byte(arm, tokenizer, text, window=count),
            "tokens": float(count),
            "vocabulary": float(arm.config.get_text_config().vocab_size),
        }
    return result
