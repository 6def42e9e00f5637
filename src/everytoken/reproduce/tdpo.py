"""TDPO's claim: a better frontier of reward against divergence from the reference than DPO's (controlled sentiment)."""

from __future__ import annotations

from .base import Arms, Claim, Context, Reproduction
from .beds.frontier import WHY, compare_losses


def run(context: Context) -> Arms:
    from ..preference.dpo import DPOLoss
    from ..preference.tdpo import TDPOLoss

    return compare_losses(
        context,
        {
            "DPO": DPOLoss(beta=0.1),
            "TDPO1": TDPOLoss(beta=0.1, variant="tdpo1"),
            "TDPO2": TDPOLoss(beta=0.1, alpha=0.5),
        },
    )


REPRODUCTION = Reproduction(
    name="tdpo",
    summary=(
        "DPO, TDPO1 and TDPO2 from one start on the same sentiment pairs, equal steps; reward against sequential KL"
    ),
    run=run,
    claims=[
        Claim("KL at the end", "TDPO2", "DPO", "lower at like reward", higher_is_better=False, why=WHY),
        Claim("reward at the end", "TDPO2", "DPO", "like DPO's", kind="difference", why=WHY),
        Claim("reward at equal KL", "TDPO2", "DPO", "higher", kind="difference", why=WHY),
        Claim(
            "reward at half that KL",
            "TDPO2",
            "DPO",
            "higher",
            kind="difference",
            why=(
                "The same curves earlier on (added after seeing them): TDPO2's step costs less KL, until it stops "
                "gaining."
            ),
        ),
        Claim("reward at equal KL", "TDPO2", "TDPO1", "TDPO2 above TDPO1", kind="difference", why=WHY),
    ],
    extra=("train", "trl"),
    bed="sentiment",
)
