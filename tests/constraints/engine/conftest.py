"""A real vocabulary, and a schema compiled for it."""

from __future__ import annotations

import pytest

from everytoken.constraints.engine.compiler import GrammarCompiler
from everytoken.constraints.engine.vocabulary import TokenizerInfo

from ..common import PERSON


@pytest.fixture(scope="module")
def info(embedded_tokenizer):
    return TokenizerInfo.from_huggingface(embedded_tokenizer)


@pytest.fixture(scope="module")
def person(info):
    return GrammarCompiler(info).compile_json_schema(PERSON)
