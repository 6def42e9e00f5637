"""Ensembles of models with different vocabularies."""

from __future__ import annotations

import numpy as np
import pytest

from everytoken.core.errors import BadInputError
from everytoken.tokenization.ensemble import ByteEnsemble

from .common import build_lm


def test_ensembles_mix_vocabularies():
    one, two = build_lm("byte-level"), build_lm("sentencepiece", seed=2)
    both = ByteEnsemble([one, two], [3, 1])
    mixed = np.exp(both.next_byte_logprobs("hel"))
    assert np.allclose(
        mixed, 0.75 * np.exp(one.next_byte_logprobs("hel")) + 0.25 * np.exp(two.next_byte_logprobs("hel"))
    )
    text = b"hello"
    assert both.logprob(text) == pytest.approx(sum(both.next_byte_logprobs(text[:k])[text[k]] for k in range(5)))
    alone = ByteEnsemble([one])
    assert both.generate("hel", 4, do_sample=True, seed=3) != b"" and alone.generate("he", 5) == one.generate(
        "he", 5, unit="byte"
    )


def test_bad_input():
    lm = build_lm("byte-level")
    for models, weights in (([], None), ([lm], [0.0]), ([lm], [1.0, 1.0])):
        with pytest.raises(BadInputError, match="positive weights"):
            ByteEnsemble(models, weights)
