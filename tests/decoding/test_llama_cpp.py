"""llama.cpp beside our own arms, with an engine of the test's own in its place."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.decoding.llama_cpp import LlamaCpp, runs_beside
from everytoken.decoding.plain import PlainDecoding
from everytoken.decoding.trial import Trial, TrialRequest, run_decoders

from ..core.gguf_files import write_gguf


class Engine:
    """Writes 5 6 7 and so on."""

    made: list[dict[str, object]] = []

    def __init__(self, path, **settings):
        self.made.append({"path": path} | settings)

    def reset(self):
        pass

    def token_eos(self):
        return 9

    def generate(self, prompt, **settings):
        assert all(type(token) is int for token in prompt)
        self.made[-1]["sampling"] = settings
        yield from range(5, 100)


@pytest.fixture
def installed(monkeypatch):
    module = types.ModuleType("llama_cpp")
    module.Llama = Engine
    module.__spec__ = importlib.machinery.ModuleSpec("llama_cpp", None)
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    Engine.made.clear()


def test_text_ends_with_its_length_or_an_end(installed, tmp_path):
    engine = LlamaCpp(tmp_path / "a.gguf", 64, 2)
    assert engine.decode([1, 2], 3)[0] == [5, 6, 7]
    assert engine.decode([1, 2], 30)[0] == [5, 6, 7, 8, 9]
    assert LlamaCpp(tmp_path / "a.gguf", 64, 2, frozenset({6})).decode([1], 9, 0.7)[0] == [5, 6]
    made = Engine.made[-1]
    assert made["n_threads"] == made["n_threads_batch"] == 2 and made["n_ctx"] == 64
    assert made["sampling"] == {"temp": 0.7, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
    assert "another engine" in engine.note


def test_where_it_runs(installed, tmp_path):
    assert runs_beside("auto", "a.gguf") and not runs_beside("none", "a.gguf")
    assert not runs_beside("auto", tmp_path)
    with pytest.raises(BadInputError, match="GGUF"):
        runs_beside("llama.cpp", tmp_path)
    with pytest.raises(BadInputError, match="no peer"):
        runs_beside("vllm", tmp_path)


def test_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("everytoken.decoding.llama_cpp.find_spec", lambda name: None)
    assert not runs_beside("auto", "a.gguf")
    with pytest.raises(BadInputError, match="not installed"):
        runs_beside("llama.cpp", "a.gguf")


def test_its_row_stands_beside_ours_and_is_no_baseline(installed, tmp_path, monkeypatch):
    monkeypatch.setenv("EVERYTOKEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EVERYTOKEN_MODELS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path, _ = write_gguf(tmp_path / "tiny.gguf", kind=None)
    options = {"max_new_tokens": 3, "peer": "llama.cpp", "weights": "as they come"}
    result = run_decoders(TrialRequest([Trial("plain", PlainDecoding)], str(path), "abc", options=options), "")
    assert list(result.rows)[-2:] == ["plain", "llama.cpp"]
    assert result.rows["llama.cpp"]["new tokens"] == 3
    assert result.baseline in ("plain generate", "plain, lean loop")
    speeds = {name: result.rows[name]["tokens per second"] for name in ("plain generate", "plain, lean loop")}
    assert result.baseline == max(speeds, key=speeds.get)
    assert any(note.startswith("Weights: as they come (asked for") for note in result.notes)
    assert any("another engine" in note for note in result.notes)
