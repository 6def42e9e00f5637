"""Small real models for fast tests: random Llamas of a few thousand weights, and the embedded model where it matters."""

from __future__ import annotations

import os

import pytest

from everytoken.core.loading import cache_dir

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# the converted model is shared by all tests, read-only, while each test's cache is its own; the first that needs it converts it
os.environ.setdefault("EVERYTOKEN_MODELS", str(cache_dir() / "models"))
# processes side by side: each on one thread, or their threads wait for each other
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("everytoken", deadline=None)  # the first example may compile kernels
settings.load_profile("everytoken")


def tiny_llama(
    vocab: int = 11, seed: int = 0, layers: int = 2, hidden: int = 16, scale: float = 1.0, eos: int | None = None
):
    """A random Llama; ``scale`` sharpens its next-token distributions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=eos,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
        model.lm_head.weight.mul_(3 * scale)
    return model


@pytest.fixture(scope="session")
def embedded():
    """The embedded model and its tokenizer (converted on first use)."""
    from everytoken.core.loading import load_model, load_tokenizer

    return load_model(), load_tokenizer()


@pytest.fixture(scope="session")
def embedded_tokenizer():
    from everytoken.core.loading import load_tokenizer

    return load_tokenizer()
