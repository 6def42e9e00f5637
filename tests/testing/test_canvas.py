"""The battery of canvas samplers over the floor's own and those of every card."""

from __future__ import annotations

from everytoken.catalog import load_catalog
from everytoken.decoding.canvas.base import CanvasSampler
from everytoken.decoding.canvas.denoising import DenoisingSampler
from everytoken.testing.canvas import CanvasConformance, TinyDenoiser


def samplers():
    found = (card.load() for card in load_catalog().values() if card.implementation)
    return tuple(item for item in found if isinstance(item, type) and issubclass(item, CanvasSampler))


class TestSamplers(CanvasConformance):
    samplers = (DenoisingSampler, *(item for item in samplers() if item.writes_masks))


def test_cards_are_found():
    assert any(item.__name__ == "RCR" for item in samplers())
    assert TinyDenoiser().config.vocab_size == 11
