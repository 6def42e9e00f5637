"""M3's own trial: all tokens, fewer of a model that was trained on nested scales, and fewer of one that was not."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ..core.vision import load_vlm
from ..core.weights import weights_for
from ..decoding.trial import TrialRequest, TrialResult
from ..training.vision import image_features
from .m3 import block_side, pool_scale, square_of
from .scene_trial import BASELINE, SceneArm, opened, trace_columns
from .vision_training import reduced_forward

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

KIND = "nested scales"
"""The kind of shipped weights."""
__all__ = ["trace_columns", "trial"]


def trial(request: TrialRequest) -> TrialResult:
    """Right answers of 256 about scenes; see ``decoding.trial``.

    Raises:
        BadInputError: a number of tokens that the grid has not.
        UnsupportedModelError: a model that does not know scenes.
    """
    work, pools, plain = opened(request)
    full = plain.config.image_seq_length
    for pool in pools.values():  # said before anything is answered
        block_side(pool.num_tokens, square_of(full))
    folder = None if request.model is not None else weights_for(plain.config, KIND)
    trained = plain if folder is None else load_vlm(folder)
    work.run(BASELINE, SceneArm(plain, full))
    for name, pool in pools.items():
        models = {name: trained} if trained is plain else {name: trained, f"{name}, untrained": plain}
        for label, model in models.items():
            forward, features = reduced_forward(model, pool), partial(_pooled, model, pool.num_tokens)
            work.run(label, SceneArm(model, pool.num_tokens, forward, features, placeholders=full))
    return work.result


def _pooled(model: PreTrainedModel, count: int, pixels: torch.Tensor) -> torch.Tensor:
    return pool_scale(image_features(model, pixels), count)  # type: ignore[arg-type]
