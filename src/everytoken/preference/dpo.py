"""DPO: Direct Preference Optimization (arXiv 2305.18290), the baseline of this station.

With ``u(y) = log pi(y|x) - log ref(y|x)``, summed over the response's tokens::

    loss = -log sigmoid(beta [u(y_w) - u(y_l)])

Implicit rewards are ``beta u(y)``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn import functional as F

from ..core.errors import BadInputError
from .base import PairScores, PreferenceOutput, log_ratios


@dataclass
class DPOLoss:
    """Sequence-level DPO.

    Args:
        beta: strength of the pull towards the reference.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise BadInputError(f"beta must be positive; got {self.beta}.")

    def __call__(self, policy: PairScores, reference: PairScores) -> PreferenceOutput:
        chosen, rejected = log_ratios(policy, reference)
        losses = -F.logsigmoid(self.beta * (chosen - rejected))
        return PreferenceOutput(losses, self.beta * chosen.detach(), self.beta * rejected.detach())
