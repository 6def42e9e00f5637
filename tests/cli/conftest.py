"""A model that commands can load in a moment."""

from __future__ import annotations

import pytest

from ..conftest import tiny_llama


@pytest.fixture(scope="session")
def letters_model(tmp_path_factory):
    """A folder with a random model of two layers and its tokenizer of letters."""
    from everytoken.reproduce.beds.small_models import character_tokenizer

    folder = tmp_path_factory.mktemp("letters")
    tokenizer = character_tokenizer("abcdefgh .,!?")
    tiny_llama(len(tokenizer), seed=1, scale=0.5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
