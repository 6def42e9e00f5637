"""M3's own trial: all tokens, fewer of a model that was trained on nested scales, and fewer of one that was not."""

from __future__ import annotations

from ..core.errors import BadInputError
from ..core.vision import load_vlm
from ..core.weights import weights_for
from ..decoding.trial import Trial, TrialRequest, TrialResult
from ..training.vision import image_features
from .m3 import MatryoshkaPool, pool_scale
from .scene_trial import BASELINE, COLUMN, SceneArm, SceneWork
from .vision_training import reduced_forward, scene_maker

KIND = "nested scales"


def trace_columns(_trial: Trial) -> tuple[str, ...]:
    """The columns of this trial's traces."""
    return (COLUMN,)


def trial(request: TrialRequest) -> TrialResult:
    """Right answers of 256 about scenes; see ``decoding.trial``.

    Raises:
        BadInputError: a number of tokens that the grid has not.
        UnsupportedModelError: a model that does not know scenes.
    """
    work = SceneWork(request)
    pools: dict[str, MatryoshkaPool] = {item.name: item.factory(**item.settings) for item in request.trials}
    request.report("loading the model", 0, 0)
    plain = load_vlm(request.model)
    scene_maker(plain)
    folder = weights_for(plain.config, KIND)
    trained = plain if folder is None or request.model is not None else load_vlm(folder)
    full = plain.config.image_seq_length
    for pool in pools.values():  # said before anything is answered
        pool_scale(plain.get_input_embeddings().weight[:1].expand(full, -1), pool.num_tokens)
    work.run(BASELINE, SceneArm(plain, full))
    for name, pool in pools.items():
        for label, model in ((name, trained), (f"{name}, untrained", plain)):
            if label != name and trained is plain:
                continue

            def pooled(pixels, model=model, count=pool.num_tokens):  # type: ignore[no-untyped-def]
                return pool_scale(image_features(model, pixels), count)

            arm = SceneArm(model, pool.num_tokens, reduced_forward(model, pool), pooled, placeholders=full)
            work.run(label, arm)
    if not pools:
        raise BadInputError("There is no method to try.")
    return work.result
