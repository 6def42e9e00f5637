"""Sentence embeddings that are kept."""

from __future__ import annotations

import numpy as np
import pytest

from everytoken.core import embedding
from everytoken.core.embedding import embed_once


@pytest.fixture
def made(monkeypatch, tmp_path):
    """What was embedded, by a stand-in for the encoder; the cache folder is a private one."""
    calls = []

    def embed(texts, purpose, report):
        calls.append(list(texts))
        return np.array([[len(text)] * 384 for text in texts], np.float32)

    monkeypatch.setattr(embedding, "embed", embed)
    monkeypatch.setattr(embedding, "require_embedder", lambda purpose: None)
    monkeypatch.setattr(embedding, "version", lambda name: "1")
    monkeypatch.setattr(embedding, "WORTH_KEEPING", 2)
    monkeypatch.setenv("EVERYTOKEN_CACHE", str(tmp_path))
    return calls


def test_the_same_texts_are_embedded_once(made, tmp_path):
    first = embed_once(["a", "bc"], "A test")
    assert np.array_equal(embed_once(["a", "bc"], "A test"), first) and len(made) == 1
    for others in (["ab", "c"], ["a", "bc", ""], ["\ud800", "bc"]):  # other lists, one with half of a character
        embed_once(others, "A test")
    assert len(made) == 4
    embed_once(["a"], "A test")
    embed_once(["a"], "A test")
    assert len(made) == 6 and len(list((tmp_path / "embeddings").iterdir())) == 4


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00v\x00", b"nothing"])
def test_a_damaged_file_is_made_anew(made, tmp_path, content):
    first = embed_once(["a", "bc"], "A test")
    (path,) = (tmp_path / "embeddings").iterdir()
    path.write_bytes(content)
    assert np.array_equal(embed_once(["a", "bc"], "A test"), first) and len(made) == 2
    assert np.array_equal(np.load(path), first)


def test_a_cache_that_cannot_be_written_is_done_without(made, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EVERYTOKEN_CACHE", str(tmp_path / "file"))
    assert embed_once(["a", "bc"], "A test").shape == (2, 384)
