"""What experiments on the tiny model of scenes measure: right answers to the same held-out questions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measured_at(model: PreTrainedModel, tokens: int, count: int, seed: int) -> list[float]:
    """1.0 for every question that is answered right with so many pooled tokens an image, else 0.0."""
    from ...reduction.m3 import MatryoshkaPool
    from ...reduction.vision_training import reduced_forward, scene_maker
    from ...training.vision import held_out, right_answers

    scenes, questions = held_out(count, seed, scene_maker(model))
    return right_answers(model, scenes, questions, reduced_forward(model, MatryoshkaPool(tokens)))
