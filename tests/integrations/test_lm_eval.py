"""The adapter to lm-eval without it: the module can be read, and a model says what is missing."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from everytoken.core.errors import MissingExtraError
from everytoken.integrations.lm_eval import DecodedModel, register


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is here")
def test_without_it_a_model_says_what_is_missing():
    for make in (DecodedModel, register):
        with pytest.raises(MissingExtraError, match="lm-eval"):
            make()
