"""The decoder battery over every decoder that the package exports, and over one written outside of it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import everytoken
from everytoken.decoding.base import Decoder, Example
from everytoken.decoding.plain import PlainDecoding
from everytoken.decoding.row import read_on
from everytoken.testing.decoder import DecoderConformance, check_distribution

FLOOR = (PlainDecoding,)
"""Decoders of the floor: no card exports them."""


def exported_decoders():
    found = [getattr(everytoken, name) for name in everytoken.__all__]
    return tuple(item for item in found if isinstance(item, type) and issubclass(item, Decoder)) + FLOOR


class TestExportedDecoders(DecoderConformance):
    decoders = exported_decoders()
    further_marks = (pytest.mark.slow,)
    draws = 120  # each decoder's own tests draw thousands


@dataclass
class Plain(Decoder):
    """Plain decoding, as a decoder of another package would write it."""

    trace_columns = ("source",)

    def decode_row(self, call, row):
        done = False
        while not done:
            logits = read_on(call.model, row.cache, row.text, call.vocab_size)
            call.stats.target_forwards += 1
            scores = row.processed(logits)
            done = row.append(row.choose(scores), scores, logits, source="model")

    @classmethod
    def examples(cls, model, tokenizer=None):
        return {"plain": Example(cls, exact=True)}


class TestAnOutsideDecoder(DecoderConformance):
    decoders = (Plain,)
    draws = 120


def test_every_decoder_of_the_house_is_tested():
    """A decoder that no card exports would escape the battery."""

    def below(cls):
        return {item for child in cls.__subclasses__() for item in {child} | below(child)}

    exported = exported_decoders()
    house = {item for item in below(Decoder) if item.__module__.startswith("everytoken.")}
    names = {item.__name__ for item in house} - {"LoopDecoder"}
    assert names == {item.__name__ for item in exported}


def test_call_cannot_be_overridden():
    with pytest.raises(TypeError, match="final"):

        class Wrong(Decoder):
            def __call__(self, *args, **kwargs):
                return None


def test_the_distribution_check_has_teeth():
    exact = {(0,): 0.5, (1,): 0.5}
    check_distribution({(0,): 205, (1,): 195}, exact)
    with pytest.raises(AssertionError, match="chi-square"):
        check_distribution({(0,): 250, (1,): 150}, exact)
    with pytest.raises(AssertionError, match="impossible"):
        check_distribution({(0,): 400}, {(0,): 0.0, (1,): 1.0})
