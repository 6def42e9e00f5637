"""Every loss of the catalogue keeps the contract: the battery that ships, over the cards, and over the forms a loss
has.
"""

from __future__ import annotations

import pytest

from everytoken.catalog import load_catalog
from everytoken.preference.cdpo import CDPOLoss
from everytoken.preference.dpo import DPOLoss
from everytoken.preference.t_reg import TREGLoss
from everytoken.preference.tdpo import TDPOLoss
from everytoken.preference.tgdpo import TGDPOLoss
from everytoken.preference.training import is_preference_loss
from everytoken.testing.preference_loss import CHECKS, check_preference_loss


def losses():
    """Every loss of the catalogue, and DPO."""
    cards = (card for card in load_catalog().values() if card.station == "preference" and card.status != "planned")
    found = {card.slug: card.load() for card in cards}
    return {"dpo": DPOLoss} | {slug: kind for slug, kind in found.items() if is_preference_loss(kind)}


LOSSES = losses()


def test_losses_are_found():
    assert len(LOSSES) > 3


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_keeps_the_contract(name, check):
    check(LOSSES[name]())


FORMS = [
    CDPOLoss(weight_chosen=True),
    CDPOLoss(label_smoothing=0.1),
    CDPOLoss(per_position=True),
    TDPOLoss(variant="tdpo1"),
    TGDPOLoss(clamp=0.1),
    TREGLoss(base="simpo", beta=2.0),
    TREGLoss(pair_weight="none", reduction="mean"),
]


@pytest.mark.parametrize("loss", FORMS, ids=str)
def test_other_forms_of_a_loss_keep_it_too(loss):
    check_preference_loss(loss)
