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

settings.register_profile("everytoken", deadline=None)  # the first example may compile kernels
settings.load_profile("everytoken")


def pytest_addoption(parser):
    group = parser.getgroup("everytoken")
    group.addoption(
        "--reproductions",
        choices=("all", "changed"),
        default="all",
        help="quick experiments: all of those collected, or those that the change since --since calls for",
    )
    group.addoption("--since", default="", help="a commit; empty or unknown: a rotation of eight experiments")


def called_for(config):
    """Names of the methods whose quick experiments run."""
    from .selection import changed_since, commits, select

    since = config.getoption("--since")
    return select(changed_since(since) if since else None, commits())


def pytest_collection_modifyitems(config, items):
    """Leaves out the quick experiments that a change does not call for."""
    marked = {item: item.get_closest_marker("reproduction") for item in items}
    if config.getoption("--reproductions") == "all" or not any(marked.values()):
        return
    chosen = called_for(config)
    dropped = [item for item, mark in marked.items() if mark is not None and mark.args[0] not in chosen]
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=dropped)


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--reproductions") == "changed" and not hasattr(config, "workerinput"):
        terminalreporter.write_line(f"quick experiments called for: {', '.join(sorted(called_for(config))) or 'none'}")


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
