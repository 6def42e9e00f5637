"""The trial of canvas samplers: one text with open positions, written in confidence order and by each method."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..core.errors import BadInputError
from ..core.loading import load_tokenizer
from ..core.rng import derive_seed
from ..core.scoring import check_prompt
from ..core.weights import weights_folder
from .canvas.base import CanvasSampler
from .canvas.loading import load_denoiser
from .canvas.replay import replay_html, step_lines
from .trial import TrialRequest, TrialResult

EXAMPLE = "1.3. .... ..2. 4..."
HEADLINE = "mean probability of a choice"


def trial(request: TrialRequest) -> TrialResult:
    """Fills the open positions of the prompt; where it has none, ``--max-new-tokens`` are written behind it.

    Raises:
        BadInputError: an empty prompt, a tokenizer without a mask token, or settings that do not fit the text.
        UnsupportedModelError: a causal model.
    """
    prompt = EXAMPLE if request.prompt is None else request.prompt
    check_prompt(prompt)
    options = request.options
    samplers: dict[str, CanvasSampler] = {}
    for item in request.trials:
        settings = dict(item.settings)
        if float(options.get("temperature", 0.0)) > 0:
            settings.setdefault("temperature", float(options["temperature"]))
        samplers[item.name] = item.factory(**settings, trace_enabled=True)
    request.report("loading the model", 0, 0)
    first = next(iter(samplers.values()))
    plain, baseline = first.baseline()
    # the model first: what it is becomes known to the Auto classes by this
    model = load_denoiser(request.model, first.weights)
    tokenizer = load_tokenizer(str(weights_folder(first.weights)) if request.model is None else request.model)
    encoded = tokenizer(prompt, return_tensors="pt")
    ids = encoded["input_ids"].to(model.device)
    result = TrialResult({}, HEADLINE, column="step")
    seed = derive_seed(int(options.get("seed", 0)), "canvas")
    for name, sampler in {plain: baseline, **samplers}.items():
        mask_id = sampler.mask_id if sampler.mask_id is not None else tokenizer.mask_token_id
        if mask_id is None:
            raise BadInputError("This tokenizer has no mask token.", "Give one: --set mask_id=...")
        open_ = ids == mask_id
        given: dict[str, Any] = {"editable": open_} if bool(open_.any()) else {}
        length = None if given else sampler.gen_length or int(options.get("max_new_tokens", 128))
        ready = dataclasses.replace(sampler, mask_id=mask_id, gen_length=length)
        request.report(f"writing with {name}", 0, 0)
        found = ready(model, ids, seeds=[seed], **given)
        stats = ready.stats
        result.rows[name] = {
            HEADLINE: float(found.choice_prob[0][found.editable[0]].mean()),
            "forwards": float(stats.target_forwards),
            "tokens per forward": stats.tokens_per_forward,
            "taken back": float(stats.revised),
            "milliseconds": 1e3 * stats.seconds,
        }
        result.texts[name] = tokenizer.decode(found.final_ids[0], skip_special_tokens=False)
        if name == plain:
            continue
        for line in step_lines(found, 0, tokenizer):
            request.stream(f"{name}, {line}\n")
        for trace in ready.trace:
            trace.title = f"{name}: {prompt}"
            result.traces.append(trace.with_text(tokenizer))
        result.pictures.append(replay_html(found, 0, tokenizer, f"{name}: every step of the canvas"))
    result.notes += [f"{name} wrote: {text!r}" for name, text in result.texts.items()]
    return result
