"""What a service takes: how often it may be asked, and how long a request may be."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from .errors import BadInputError

if TYPE_CHECKING:
    from starlette.requests import Request


class RateLimit:
    """At most ``count`` calls in any ``seconds``."""

    def __init__(self, count: int, seconds: float, clock: Callable[[], float] = time.monotonic):
        if count < 1 or seconds <= 0:
            raise BadInputError(f"A rate is at least one call in a positive time; got {count} in {seconds}.")
        self.count, self.seconds, self.clock = count, seconds, clock
        self._times: deque[float] = deque()

    def allow(self) -> bool:
        """Whether one more call may be made now; counts it."""
        now = self.clock()
        while self._times and now - self._times[0] >= self.seconds:
            self._times.popleft()
        if len(self._times) >= self.count:
            return False
        self._times.append(now)
        return True


async def body_within(request: Request, limit: int) -> bytes | None:
    """A request's body; None where it is longer than ``limit`` bytes, which is known before the rest is read."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            return None
    return bytes(data)
