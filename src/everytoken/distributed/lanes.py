"""The two lanes of a rank: computing and communicating at the same time on CUDA, one after the other elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Lanes:
    """Runs one thing on each lane at a time; the lanes meet after every stage.

    On CUDA what communicates runs on a stream of its own. Both streams wait for each other between stages. So every
    tensor that one stage makes is ready for the next, on either lane, and memory that a stage gave back is not taken
    again while the other lane reads it. Collectives are issued in the order of the code, the same on all ranks.
    Elsewhere the same calls run in plain order, and communication comes first.

    Args:
        device: where the model is.
        log: gets ``(lane, what)`` in the order of issue; None keeps nothing.
    """

    def __init__(self, device: torch.device, log: list[tuple[str, str]] | None = None):
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.log = log

    def stage(
        self,
        compute: Callable[[], Any] | None,
        communicate: Callable[[], Any] | None = None,
        names: tuple[str, str] = ("", ""),
    ) -> tuple[Any, Any]:
        """Runs both and lets the lanes meet.

        Args:
            compute, communicate: each on its lane; None leaves the lane idle.
            names: of the two, for the log.

        Returns:
            What each returned; None for an idle lane.
        """
        done = sent = None
        if communicate is not None:
            if self.log is not None:
                self.log.append(("communication", names[1]))
            if self.stream is None:
                sent = communicate()
            else:
                self.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.stream):
                    sent = communicate()
        if compute is not None:
            if self.log is not None:
                self.log.append(("compute", names[0]))
            done = compute()
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        return done, sent
