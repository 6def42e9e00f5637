"""What trials of trained methods of this station share: the same questions about scenes, answered by every arm."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..core.errors import BadInputError
from ..core.trace import TokenTrace
from ..core.vision import load_vlm
from ..decoding.trial import Trial, TrialRequest, TrialResult
from ..training.datasets.scenes import IDS, WORDS, Question, Scene, pixel_values
from ..training.vision import by_kind, held_out, image_features, right_answers
from .vision_training import scene_maker

Inputs = dict[str, torch.Tensor]
BASELINE = "all tokens"
COUNT = 256
"""Questions of a trial."""
COLUMN = "names the answer"


def trace_columns(_trial: Trial) -> tuple[str, ...]:
    """The columns of these trials' traces."""
    return (COLUMN,)


def opened(request: TrialRequest) -> tuple[SceneWork, dict[str, Any], PreTrainedModel]:
    """The work of a request, its methods by name with their settings checked, and the model.

    Raises:
        BadInputError: a prompt or data of the user's, or a setting out of range; before the model is loaded.
        UnsupportedModelError: a model that does not know scenes.
    """
    work = SceneWork(request)
    methods = {item.name: item.factory(**item.settings) for item in request.trials}
    request.report("loading the model", 0, 0)
    model = load_vlm(request.model)
    scene_maker(model)
    return work, methods, model


@dataclass
class SceneArm:
    """One way of answering.

    Attributes:
        model: what answers.
        image_tokens: that it reads of an image.
        forward: ``inputs -> logits [B, V]`` behind the question; None is the model's own.
        features: ``pixel_values -> [B, M, d]``, what the language model reads of images; None is the model's own.
        placeholders: tokens of an image in the inputs; None is ``image_tokens``.
        inside: entered while the arm runs.
    """

    model: PreTrainedModel
    image_tokens: int
    forward: Callable[[Inputs], torch.Tensor] | None = None
    features: Callable[[torch.Tensor], torch.Tensor] | None = None
    placeholders: int | None = None
    inside: Callable[[], AbstractContextManager[object]] | None = None


@dataclass
class SceneWork:
    """Questions that all arms answer, and what came out.

    Attributes:
        request: of the command line.
        result: filled arm by arm.
    """

    request: TrialRequest
    result: TrialResult = field(default_factory=lambda: TrialResult({}, "right answers", column=COLUMN))
    scenes: list[Scene] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.request.prompt is not None or self.request.data is not None:
            raise BadInputError(
                "This trial asks questions about scenes of its own.",
                "Leave --prompt and --data out; --seed draws others.",
            )

    def run(self, name: str, arm: SceneArm) -> None:
        """One row, the text of the first answer, and its trace."""
        request = self.request
        if not self.scenes:
            seed = int(request.options.get("seed", 0)) + 1000
            self.scenes, self.questions = held_out(COUNT, seed, scene_maker(arm.model))
        request.report(f"answering with {name}", 0, 0)
        with (arm.inside or nullcontext)():
            began = time.perf_counter()
            right = right_answers(
                arm.model, self.scenes, self.questions, arm.forward, arm.placeholders or arm.image_tokens
            )
            seconds = time.perf_counter() - began
            self.result.rows[name] = {
                "right answers": sum(right) / COUNT,
                "image tokens": float(arm.image_tokens),
                "milliseconds a question": 1e3 * seconds / COUNT,
            }
            kinds = by_kind(right, self.questions)
            self.result.rows[name] |= {f"right, {kind}": share for kind, share in kinds.items()}
            self.result.traces.append(self._trace(name, arm))

    @torch.no_grad()
    def _trace(self, name: str, arm: SceneArm) -> TokenTrace:
        """The first question: how much each image token resembles the word that is the answer."""
        asked, model = self.questions[0], arm.model
        pixels = pixel_values(self.scenes[:1]).to(model.device)
        features = (arm.features or (lambda images: image_features(model, images)))(pixels)[0]  # type: ignore[arg-type]
        word = model.get_input_embeddings().weight[IDS[asked.answer]]
        similar = torch.cosine_similarity(features.float(), word.float()[None], dim=-1)
        ids = [model.config.image_token_id] * len(features) + [IDS[asked.kind], IDS[asked.about]]
        trace = TokenTrace(ids, title=f"{name}: {asked.kind} {asked.about} -> {asked.answer}", station="reduction")
        trace.texts = [WORDS[item] for item in ids]
        return trace.add(COLUMN, [*similar.tolist(), None, None])
