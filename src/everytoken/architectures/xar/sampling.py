"""From noise to an entity: the straight path between data and noise, and two ways back along it.

Time t goes from 0 (clean) to 1 (noise); X is data and e noise::

    F = (1 - t) X + t e          v = dF/dt = e - X          score = -((1 - t) v + F) / t

The ordinary differential equation follows v. The stochastic one adds noise of strength 2 t and takes it out again with
the score, which makes its drift ``v - t score = (2 - t) v + F``, without a division by t.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from ...core.errors import BadInputError

SAMPLERS = ("sde", "ode")
LAST = 0.04
"""The time from which the stochastic sampler takes its last step, which adds no noise."""
Velocity = Callable[[torch.Tensor, float, int], torch.Tensor]
"""``(x, t, step) -> v`` of the shape of x."""


def noised(clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """F for tensors of one shape and times that broadcast against them."""
    return (1 - times) * clean + times * noise


def score_of(velocity: torch.Tensor, x: torch.Tensor, time: float) -> torch.Tensor:
    """The score of a noised entity from its velocity.

    Raises:
        BadInputError: a time that is not above 0 and at most 1.
    """
    if not 0 < time <= 1:
        raise BadInputError(f"The score is defined for times above 0 and up to 1; got {time}.")
    return -((1 - time) * velocity + x) / time


def sampling_times(sampler: str, steps: int) -> list[float]:
    """The times ``steps + 1`` of a sampler, from 1 to 0.

    Raises:
        BadInputError: an unknown sampler, or fewer than one step.
    """
    check_sampling(sampler, steps)
    if sampler == "ode":
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    return [*torch.linspace(1, LAST, steps, dtype=torch.float64).tolist(), 0.0]


def check_sampling(sampler: str, steps: int) -> None:
    """Raises BadInputError for an unknown sampler, or fewer than one step."""
    if sampler not in SAMPLERS:
        raise BadInputError(f"A sampler is {' or '.join(SAMPLERS)}; got {sampler!r}.")
    if steps < 1:
        raise BadInputError(f"steps is 1 or more; got {steps}.")


def sample(
    velocity: Velocity,
    noise: torch.Tensor,
    sampler: str = "sde",
    after: Callable[[torch.Tensor, int], None] | None = None,
) -> torch.Tensor:
    """Draws from noise, in one call of ``velocity`` a step.

    Args:
        noise: ``[steps, ...]`` standard normal: the start, and what the stochastic sampler adds after each step but the
            last. The other sampler reads the start only.
        after: called with x and the step's number after every step.

    Returns:
        ``[...]``.

    Raises:
        BadInputError: an unknown sampler, or noise for no step.
    """
    times = sampling_times(sampler, len(noise))
    x = noise[0]
    for step, (time, then) in enumerate(pairwise(times)):
        v = velocity(x, time, step)
        if sampler == "ode":
            x = x + (then - time) * v
        else:
            x = x + (then - time) * ((2 - time) * v + x)
            if step + 1 < len(noise):
                x = x + (2 * time * (time - then)) ** 0.5 * noise[step + 1]
        if after is not None:
            after(x, step)
    return x
