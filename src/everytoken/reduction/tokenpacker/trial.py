"""TokenPacker's own trial: all tokens, and the trained projector's fewer."""

from __future__ import annotations

import functools

from ...decoding.trial import TrialRequest, TrialResult
from ..scene_trial import BASELINE, SceneArm, opened, trace_columns
from .packing import TokenPacker, packed

__all__ = ["trace_columns", "trial"]


def trial(request: TrialRequest) -> TrialResult:
    """Right answers of 256 about scenes; see ``decoding.trial``.

    Raises:
        BadInputError: no trained projector of this scale for the model.
        UnsupportedModelError: a model that does not know scenes.
    """
    work, packers, model = opened(request)
    projectors = {name: packer.load(model) for name, packer in packers.items()}  # before anything is answered
    work.run(BASELINE, SceneArm(model, model.config.image_seq_length))
    for name, packer in packers.items():
        inside = functools.partial(packed, model, TokenPacker(packer.scale, weights=str(packer.folder(model))))
        work.run(name, SceneArm(model, projectors[name].config.num_tokens, inside=inside))
    return work.result
