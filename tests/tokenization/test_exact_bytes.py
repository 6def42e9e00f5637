"""The settings of exact bytes."""

from __future__ import annotations

import pytest

from everytoken.core.errors import BadInputError
from everytoken.tokenization.exact_bytes import ExactBytes

from ..conftest import tiny_llama
from .common import byte_level


def test_the_unit_is_honoured():
    """One forward pass a byte, or one a token: what the settings say holds without saying it again."""
    tokenizer = byte_level()
    model = tiny_llama(len(tokenizer), eos=None, scale=0.3)
    for unit in ("byte", "token"):
        lm = ExactBytes(unit=unit).on(model, tokenizer)
        assert lm.generate("hel", 12) == lm.generate("hel", 12, unit=unit)
        other = "token" if unit == "byte" else "byte"
        assert lm.generate("hel", 12, do_sample=True, seed=3) == lm.generate(
            "hel", 12, do_sample=True, seed=3, unit=unit
        )
        assert lm.generate("hel", 12, do_sample=True, seed=3) != lm.generate(
            "hel", 12, do_sample=True, seed=3, unit=other
        )
    with pytest.raises(BadInputError, match="unit is"):
        lm.generate("a", unit="word")


def test_bad_settings():
    for settings, message in (
        ({"unit": "word"}, "unit is"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"tolerance": -1}, "tolerance"),
    ):
        with pytest.raises(BadInputError, match=message):
            ExactBytes(**settings)
