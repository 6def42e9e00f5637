"""Dynamic tokenization's own trial: a prompt read in fewer positions, and what the model says after it.

The prompt is read without merges, with each method, and with the mean of the pieces in place of the hypernetwork.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from ..core.errors import BadInputError
from ..core.loading import load_model, load_tokenizer
from ..decoding.trial import TrialRequest, TrialResult
from .dynamic_prefill import DynamicPrefill
from .dynamic_tokenization import DynamicTokenizer
from .embedding import Embedder
from .hyper import HyperEmbedding, MeanEmbedding
from .trials.inputs import sampling_of, seed_of, text_of

EXAMPLE = (
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und "
    "sollen einander im Geiste der Brüderlichkeit begegnen. Jeder hat das Recht auf Leben, Freiheit und Sicherheit der "
    "Person. Niemand darf in Sklaverei"
)
BASELINE = "own tokens"


def trial(request: TrialRequest) -> TrialResult:
    """Positions, bytes per position and prefill time; see ``decoding.trial``."""
    text = text_of(request, EXAMPLE)
    tokenizer = load_tokenizer(request.model)
    dynamics = {item.name: item.factory(tokenizer, **item.settings) for item in request.trials}
    request.report("loading the model", 0, 0)
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
    arms: dict[str, tuple[DynamicTokenizer, Embedder]] = {BASELINE: (DynamicTokenizer(tokenizer, merges=0), mean)}
    for name, dynamic in dynamics.items():
        arms[name] = dynamic, best
        if best is not mean:
            arms[f"{name}, mean of pieces"] = replace(dynamic), mean
    length = int(request.options.get("max_new_tokens", 32))
    one = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    for name, (dynamic, embedder) in arms.items():
        request.report(f"running {name}", 0, 0)
        dynamic.embedder = embedder
        prefill = DynamicPrefill(dynamic)
        torch.manual_seed(seed_of(request))
        model.generate(ids, custom_generate=prefill, **one)  # compile
        began = time.perf_counter()
        model.generate(ids, custom_generate=prefill, **one)
        seconds = time.perf_counter() - began
        out = model.generate(
            ids, pad_token_id=0, custom_generate=prefill, max_new_tokens=length, **sampling_of(request)
        )
        result.rows[name] = {
            "positions": float(prefill.positions),
            "bytes per position": len(text.encode()) / prefill.positions,
            "prefill seconds": seconds,
        }
        result.texts[name] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        result.notes.append(f"{name}: ... {result.texts[name]!r}")
        if name in dynamics:
            result.traces.append(dynamic([ids[0].tolist()]).trace(0, tokenizer))
    return result
