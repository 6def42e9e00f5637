"""Classifier-free guidance and its schedules (Ho and Salimans, arXiv 2207.12598).

A network that was trained with its class left out now and then gives two answers, with the class (c) and without (u).
What is used is::

    u + w (c - u)

The scale w may change on the way of an image, where ``share`` goes from 0 at its beginning to 1 at its end::

    constant      w
    linear        1 + (w - 1) share
    half-linear   1 + (w - 1) min(1, 2 share)
"""

from __future__ import annotations

import math

import torch

from ...core.errors import BadInputError

SCHEDULES = ("constant", "linear", "half-linear")


def guidance_scale(schedule: str, scale: float, share: float) -> float:
    """The scale at one place of an image.

    Args:
        schedule: one of ``SCHEDULES``.
        scale: w, the full scale; 1 is no guidance.
        share: how far the image is, from 0 to 1.

    Raises:
        BadInputError: an unknown schedule, a scale that is negative or no number, or a share outside of 0 to 1.
    """
    check_guidance(schedule, scale)
    if not 0 <= share <= 1:
        raise BadInputError(f"The share of an image lies from 0 to 1; got {share}.")
    if schedule == "constant":
        return scale
    return 1 + (scale - 1) * min(1.0, share if schedule == "linear" else 2 * share)


def check_guidance(schedule: str, scale: float) -> None:
    """Raises BadInputError for an unknown schedule, or a scale that is negative or no number."""
    if schedule not in SCHEDULES:
        raise BadInputError(f"A guidance schedule is {' or '.join(SCHEDULES)}; got {schedule!r}.")
    if not (math.isfinite(scale) and scale >= 0):
        raise BadInputError(f"guidance is a number of 0 or more; got {scale}.", "1 is no guidance.")


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """``u + w (c - u)``, for tensors of one shape."""
    return torch.lerp(unconditional, conditional, scale)


def both_ways(labels: torch.Tensor, null: int) -> torch.Tensor:
    """Labels ``[B]`` followed by as many null classes: ``[2 B]``, for one pass that gives both answers."""
    return torch.cat([labels, torch.full_like(labels, null)])


def drop_labels(
    labels: torch.Tensor, null: int, probability: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Labels ``[B]``, each replaced by the null class with a probability, for training."""
    if probability <= 0:
        return labels
    drawn = torch.rand(len(labels), generator=generator, device=generator.device if generator else labels.device)
    return labels.masked_fill(drawn.to(labels.device) < probability, null)
