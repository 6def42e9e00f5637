"""RCR: running confidence remasking (MDPO, arXiv 2508.13148), for any masked diffusion model, without training.

Plain sampling never takes a token back. RCR fills every open position at every step and keeps each token's confidence
from when it was chosen, its running confidence C. Then it opens those of the lowest C again, as many as the schedule
leaves open::

    C_i = confidence of y_i, for i masked        reopen the sum_{u > s} n_u positions of lowest C

so an early choice that later ones outrank is made anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..decoding.canvas.base import CanvasSampler
from ..decoding.canvas.denoising import DenoisingSampler, RemaskRule, RemaskState, top


@dataclass
class RunningConfidence:
    """The rule itself, as ``remask`` of a ``DenoisingSampler``.

    Args:
        reopen_blocks: also open positions of finished blocks, as the released code does.
    """

    reopen_blocks: bool = False

    def __call__(self, state: RemaskState) -> torch.Tensor:
        written = state.confidence > -torch.inf
        chosen = written if self.reopen_blocks else written & state.in_block
        kept = (chosen.sum(1) - state.remaining).clamp(min=0)
        return chosen & ~top(state.confidence.masked_fill(~chosen, -torch.inf), kept)


@dataclass
class RCR(DenoisingSampler):
    """A ``DenoisingSampler`` that takes tokens back by running confidence.

    Args:
        reopen_blocks: also take back tokens of finished blocks, as the released code does.
    """

    reopen_blocks: bool = False
    remask: RemaskRule | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.remask = RunningConfidence(self.reopen_blocks)

    @classmethod
    def examples(cls) -> dict[str, CanvasSampler]:
        return {
            "six steps": cls(steps=6),
            "blocks": cls(steps=6, block_length=4),
            "blocks that reopen": cls(steps=6, block_length=4, reopen_blocks=True),
            "sampled": cls(steps=4, temperature=1.0),
        }
