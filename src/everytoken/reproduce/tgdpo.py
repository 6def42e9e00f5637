"""TGDPO's claim: token rewards of a DPO-trained model make DPO better than alone (controlled sentiment)."""

from __future__ import annotations

from .base import Arms, Claim, Context, Reproduction
from .beds.frontier import WHY, figures, make_work, train_arm


def run(context: Context) -> Arms:
    from ..preference.columns import ModelLogps
    from ..preference.dpo import DPOLoss
    from ..preference.tgdpo import TGDPOLoss

    work = make_work(context)
    guide, dpo = train_arm(context, work, "DPO", DPOLoss(beta=0.1))  # the first stage is the baseline
    curves = {"DPO": dpo}
    for name, loss in {
        "TGDPO": TGDPOLoss(beta=0.1, alpha=0.5),
        "TGDPO, clamped": TGDPOLoss(beta=0.1, alpha=0.5, clamp=0.5),
    }.items():
        _, curves[name] = train_arm(context, work, name, loss, [ModelLogps(guide)])
    return figures(context, curves)


REPRODUCTION = Reproduction(
    name="tgdpo",
    summary=(
        "DPO gives the guide; TGDPO and DPO from one start on the same sentiment pairs, equal steps; reward against "
        "sequential KL"
    ),
    run=run,
    claims=[
        Claim("reward at equal KL", "TGDPO", "DPO", "higher win rates (up to +7.5)", kind="difference", why=WHY),
        Claim("reward at the end", "TGDPO", "DPO", "higher", kind="difference", why=WHY),
        Claim(
            "reward at equal KL", "TGDPO, clamped", "DPO", "higher (weights in 0.5 to 1.5)", kind="difference", why=WHY
        ),
    ],
    extra=("train", "trl"),
    bed="sentiment",
)
