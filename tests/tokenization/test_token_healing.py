"""Token healing, the cheap baseline of exact bytes."""

from __future__ import annotations

import pytest

from everytoken.core.errors import BadInputError
from everytoken.tokenization.token_healing import TokenHealing


def test_a_word_cut_in_the_middle(embedded):
    model, tokenizer = embedded
    healed = model.generate(
        **tokenizer("The capital of France is Par", return_tensors="pt"), max_new_tokens=4, do_sample=False,
        custom_generate=TokenHealing(tokenizer),
    )  # fmt: skip
    assert "France is Paris" in tokenizer.decode(healed[0])


def test_bad_settings(embedded_tokenizer):
    with pytest.raises(BadInputError, match="back is at least 1"):
        TokenHealing(embedded_tokenizer, back=0)
