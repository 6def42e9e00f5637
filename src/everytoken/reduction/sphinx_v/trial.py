"""SPHINX-V's own trial: questions about an object that is pointed at, and the same questions with nothing pointed at."""

from __future__ import annotations

import time

import torch

from ...core.errors import BadInputError
from ...core.trace import TokenTrace
from ...core.vision import load_vlm
from ...decoding.trial import Trial, TrialRequest, TrialResult
from ...training.datasets.scenes import pixel_values
from ...training.vision import held_out, image_features
from ..vision_training import scene_maker
from .prompting import VisualPrompting, prompting
from .prompts import Box, Point, encode_prompts
from .training import answered

COUNT = 256
BASELINE = "nothing pointed at"
COLUMN = "likeness to the prompt"


def trace_columns(_trial: Trial) -> tuple[str, ...]:
    """The columns of this trial's traces."""
    return (COLUMN,)


def trial(request: TrialRequest) -> TrialResult:
    """Right answers of 256 about scenes; see ``decoding.trial``.

    Raises:
        BadInputError: a prompt or data of the user's; or no trained encoder for the model.
        UnsupportedModelError: a model that does not know scenes.
    """
    if request.prompt is not None or request.data is not None:
        raise BadInputError("This trial asks about scenes of its own.", "Leave --prompt and --data out.")
    ways: dict[str, VisualPrompting] = {item.name: item.factory(**item.settings) for item in request.trials}
    request.report("loading the model", 0, 0)
    model = load_vlm(request.model)
    maker = scene_maker(model)
    for way in ways.values():
        way.folder(model)
    seed = int(request.options.get("seed", 0)) + 1000
    scenes, _ = held_out(COUNT, seed, maker)
    result = TrialResult({}, "right answers", column=COLUMN)
    for name, way in ways.items():
        with prompting(model, way) as encoder:
            for label, shape in ((BASELINE, None), (name, way.shape)):
                if label in result.rows:
                    continue
                request.report(f"answering with {label}", 0, 0)
                began = time.perf_counter()
                right = answered(model, encoder, scenes, shape, seed)
                result.rows[label] = {
                    "right answers": sum(right) / COUNT,
                    "prompt tokens": float(encoder.config.max_prompts + 2),
                    "milliseconds a question": 1e3 * (time.perf_counter() - began) / COUNT,
                }
            thing = scenes[0].things[0]
            mark = Point(*thing.centre) if way.shape == "point" else Box(*thing.box)
            encoded = encode_prompts([[mark]], [(maker.size, maker.size)], encoder.config.max_prompts)
            with torch.no_grad():
                features = image_features(model, pixel_values(scenes[:1]).to(model.device))[0]  # type: ignore[arg-type]
                token = encoder.tokens(encoded)[0][1]
            likeness = torch.cosine_similarity(features.float(), token.float()[None], dim=-1)
            ids = [model.config.image_token_id] * len(features)
            title = f"{name}: a {way.shape} on the {thing.colour} {thing.shape}"
            trace = TokenTrace(ids, title=title, station="reduction").add(COLUMN, likeness)
            trace.texts = ["<image>"] * len(ids)
            result.traces.append(trace)
    return result
