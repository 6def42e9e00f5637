"""A few threads that run one compiled function together, each on its share, and meet at barriers inside it.

torch's and numba's own pools would each keep spinning for a while on the processors that the other needs. A team's
threads sleep between two calls, and a barrier within a call takes less than a microsecond.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_size = 0


def _forget() -> None:
    """A forked process has none of its parent's threads."""
    global _pool, _size, _lock
    _pool, _size, _lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def run_together(function: Callable[..., Any], members: int, *arguments: Any) -> None:
    """Calls ``function(meeting, member, members, *arguments)`` in so many threads, this one among them.

    Args:
        function: compiled without Python's lock (``nogil``), so that its calls run at the same time. ``meeting`` is an
            int64 array for ``kernels.meet``: those who wait, rounds so far, and whether the others have given up.
    """
    global _pool, _size
    meeting = np.zeros(3, np.int64)
    if members == 1:
        function(meeting, 0, 1, *arguments)
        return
    with _lock:  # two calls would share the threads, and each would wait for those that the other holds
        if _pool is None or _size < members - 1:
            if _pool is not None:
                _pool.shutdown(wait=False)
            _pool, _size = ThreadPoolExecutor(members - 1, thread_name_prefix="everytoken"), members - 1
        others = []
        try:
            others = [_pool.submit(function, meeting, member, members, *arguments) for member in range(1, members)]
            function(meeting, 0, members, *arguments)
        except BaseException:
            meeting[2] = 1
            raise
        finally:
            for other in others:
                other.result()
