"""Small real models for fast tests: random Llamas of a few thousand weights, and the embedded model where it matters."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# processes side by side: each on one thread, or their threads wait for each other
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

from everytoken.testing.models import tiny_llama as tiny_llama  # tests import it from here

settings.register_profile("everytoken", deadline=None)  # the first example may compile kernels
settings.load_profile("everytoken")


@pytest.fixture(scope="session")
def embedded():
    """The embedded model and its tokenizer (converted on first use)."""
    from everytoken.core.loading import load_model, load_tokenizer

    return load_model(), load_tokenizer()


@pytest.fixture(scope="session")
def embedded_tokenizer():
    from everytoken.core.loading import load_tokenizer

    return load_tokenizer()
