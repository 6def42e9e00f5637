"""TDPO: Token-level Direct Preference Optimization (arXiv 2404.11999).

DPO controls the divergence from the reference only through whole-sequence log-ratios. TDPO also charges each response
for how far it drags the policy away at every position, by the forward KL between the two next-token distributions. With
the mask m over response tokens::

    u(y) = sum_t m_t [log pi(y_t|x,y_<t) - log ref(y_t|x,y_<t)]
    d(y) = sum_t m_t KL( ref(.|x,y_<t) || pi(.|x,y_<t) )

    TDPO1:  z = [u(y_w) - u(y_l)] - [d(y_l) - d(y_w)]
    TDPO2:  z = [u(y_w) - u(y_l)] - alpha [d(y_l) - sg(d(y_w))]        sg = stop-gradient
    loss = -log sigmoid(beta z)

Logged rewards are ``beta (u(y) + d(y))``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.nn import functional as F

from ..core.errors import BadInputError
from ..core.logprobs import masked_sum
from .base import PairScores, PreferenceOutput, log_ratios


@dataclass
class TDPOLoss:
    """Token-level DPO.

    Args:
        beta: strength of the pull towards the reference (paper: 0.1).
        alpha: weight of the KL difference in TDPO2 (paper: 0.5); TDPO1 has none.
        variant: ``"tdpo2"`` (default) or ``"tdpo1"``.

    Raises:
        BadInputError: an unknown variant, or a negative strength.
    """

    beta: float = 0.1
    alpha: float = 0.5
    variant: str = "tdpo2"
    needs: ClassVar[frozenset[str]] = frozenset({"forward_kl"})

    def __post_init__(self) -> None:
        if self.variant not in ("tdpo1", "tdpo2"):
            raise BadInputError(f"Unknown variant {self.variant!r}.", "Use tdpo1 or tdpo2.")
        if self.beta <= 0 or self.alpha < 0:
            raise BadInputError(f"TDPO needs beta > 0 and alpha >= 0; got {self.beta} and {self.alpha}.")

    def __call__(self, policy: PairScores, reference: PairScores) -> PreferenceOutput:
        """See the module's docstring; ``policy.chosen["forward_kl"]`` and ``policy.rejected["forward_kl"]`` are
        ``[B, T]``.
        """
        u_chosen, u_rejected = log_ratios(policy, reference)
        d_chosen = masked_sum(policy.chosen["forward_kl"], policy.chosen_mask)
        d_rejected = masked_sum(policy.rejected["forward_kl"], policy.rejected_mask)
        if self.variant == "tdpo1":
            z = (u_chosen - u_rejected) - (d_rejected - d_chosen)
        else:
            z = (u_chosen - u_rejected) - self.alpha * (d_rejected - d_chosen.detach())
        return PreferenceOutput(
            losses=-F.logsigmoid(self.beta * z),
            chosen_rewards=self.beta * (u_chosen + d_chosen).detach(),
            rejected_rewards=self.beta * (u_rejected + d_rejected).detach(),
            metrics={"kl/chosen": d_chosen.detach().mean(), "kl/rejected": d_rejected.detach().mean()},
        )
