"""Loading: what a model may be named by."""

from __future__ import annotations

import pytest
import torch

from everytoken.core.errors import BadInputError, EverytokenError
from everytoken.core.loading import load_model, load_tokenizer, resolve

from ..conftest import tiny_llama


def test_embedded_model(embedded):
    model, tokenizer = embedded
    assert model.dtype == torch.float32
    assert not model.training
    assert model.num_parameters() == pytest.approx(134.5e6, rel=0.01)
    assert len(tokenizer) == model.config.vocab_size == 49152
    text = tokenizer.decode(
        model.generate(**tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=4, do_sample=False)[
            0
        ]
    )
    assert "Paris" in text


def test_dtype():
    assert load_model(dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(BadInputError, match="float33"):
        load_model(dtype="float33")


def test_resolve(tmp_path):
    tiny_llama(16).save_pretrained(tmp_path / "model")
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "x.gguf").write_bytes(b"")
    assert resolve(tmp_path / "model") == str(tmp_path / "model")
    assert resolve("owner/name") == "owner/name"
    with pytest.raises(BadInputError, match="is no GGUF file"):
        resolve(str(tmp_path / "ggufs" / "x.gguf"))
    with pytest.raises(BadInputError, match=r"x\.gguf"):
        resolve(tmp_path / "ggufs")
    with pytest.raises(BadInputError, match="no GGUF file"):
        resolve("absent.gguf")
    with pytest.raises(BadInputError, match="no folder or file"):
        resolve("./absent")
    assert load_model(tmp_path / "model").config.vocab_size == 16


def test_hub_ids_without_network(monkeypatch):
    """Offline (as the tests run), a hub id fails with what to do, not with a stack of connection errors."""
    for load in (load_model, load_tokenizer):
        with pytest.raises(EverytokenError, match="embedded"):
            load("nobody/no-such-model-here")
