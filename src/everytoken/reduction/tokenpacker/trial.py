"""TokenPacker's own trial: all tokens, the trained projector, and the mean over the same regions without training."""

from __future__ import annotations

import functools

from ...core.vision import load_vlm
from ...decoding.trial import Trial, TrialRequest, TrialResult
from ..scene_trial import BASELINE, COLUMN, SceneArm, SceneWork
from ..vision_training import scene_maker
from .packing import TokenPacker, packed


def trace_columns(_trial: Trial) -> tuple[str, ...]:
    """The columns of this trial's traces."""
    return (COLUMN,)


def trial(request: TrialRequest) -> TrialResult:
    """Right answers of 256 about scenes; see ``decoding.trial``.

    Raises:
        BadInputError: no trained projector of this scale for the model.
        UnsupportedModelError: a model that does not know scenes.
    """
    work = SceneWork(request)
    packers: dict[str, TokenPacker] = {item.name: item.factory(**item.settings) for item in request.trials}
    request.report("loading the model", 0, 0)
    model = load_vlm(request.model)
    scene_maker(model)
    projectors = {name: packer.load(model) for name, packer in packers.items()}  # before anything is answered
    work.run(BASELINE, SceneArm(model, model.config.image_seq_length))
    for name, packer in packers.items():
        inside = functools.partial(packed, model, TokenPacker(packer.scale, weights=str(packer.folder(model))))
        work.run(name, SceneArm(model, projectors[name].config.num_tokens, inside=inside))
    return work.result
