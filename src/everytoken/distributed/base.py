"""What the methods of this station share: a link between ranks, and what happens when on the two lanes of a rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ..core.errors import BadInputError

COMPUTE, COMMUNICATION = "compute", "communication"
"""The lanes."""


class Event(NamedTuple):
    """Something that ran on a lane.

    Attributes:
        lane: ``"compute"`` or ``"communication"``.
        kind: ``"attention"``, ``"mlp"``, ``"norm"`` or ``"exchange"``.
        layer: of the model, from 0; an exchange belongs to the layer whose result it carries.
        part: of the step's tokens, 0 or 1.
        start, stop: seconds from the step's begin.
    """

    lane: str
    kind: str
    layer: int
    part: int
    start: float
    stop: float


@dataclass(frozen=True)
class Timeline:
    """What happened when in one step.

    Attributes:
        events: in the order in which they were issued.
    """

    events: tuple[Event, ...]

    @property
    def seconds(self) -> float:
        """Until the last event has ended."""
        return max((event.stop for event in self.events), default=0.0)

    def busy(self, lane: str) -> float:
        """Seconds in which a lane works."""
        return sum(event.stop - event.start for event in self.events if event.lane == lane)

    @property
    def exposed(self) -> float:
        """Seconds in which nothing computes: communication that nothing hides, and waiting."""
        return self.seconds - self.busy(COMPUTE)


@dataclass(frozen=True)
class Link:
    """What joins the ranks, as an all-reduce in a ring uses it.

    Args:
        latency: seconds of one collective (a reduce-scatter or an all-gather) that do not depend on its size.
        bandwidth: bytes a second of each rank; ``inf`` is a free link.

    Raises:
        BadInputError: a negative latency, or a bandwidth that is not above 0.
    """

    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        if not 0 <= self.latency < math.inf or not self.bandwidth > 0:
            raise BadInputError(
                f"A link has a latency of 0 s or more and a bandwidth above 0 bytes/s; got {self.latency}, "
                f"{self.bandwidth}."
            )

    def seconds(self, rows: int, hidden: int, itemsize: int, world: int, reduce: bool = True) -> float:
        """Seconds of a reduce-scatter and an all-gather of ``[rows, hidden]``, or of the all-gather alone.

        Each carries ``(world - 1) / world`` of the tensor's bytes. So both together carry what an all-reduce carries.

        Args:
            rows, hidden: the tensor's shape.
            itemsize: bytes of an element.
            world: ranks; one rank needs no link.
            reduce: whether the reduce-scatter is there.
        """
        if world == 1 or rows == 0:
            return 0.0
        collectives = 2 if reduce else 1
        size = (world - 1) / world * rows * hidden * itemsize
        return collectives * (self.latency + size / self.bandwidth)
