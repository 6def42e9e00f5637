"""Weights that ship: licences, scripts, the budget; and that nothing here ever reads a pickle."""

from __future__ import annotations

import ast
import json
import pickle
from pathlib import Path

import pytest
import torch

from everytoken.core.errors import BadInputError, UnknownNameError
from everytoken.core.loading import load_model, load_tokenizer
from everytoken.core.weights import (
    BUDGET,
    WEIGHTS,
    list_weights,
    read_weights,
    safetensors_file,
    weights_folder,
    weights_for,
)

from ..conftest import tiny_llama

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("item", list_weights(), ids=lambda item: item.name)
def test_each_tells_its_licence_and_its_script(item):
    assert item.licence and item.origin and item.summary
    assert (ROOT / item.script).is_file() and (ROOT / item.documentation).is_file()
    assert item.name in (ROOT / item.script).read_text() and item.name in (ROOT / item.documentation).read_text()
    json.loads((item.folder / "config.json").read_text())
    assert json.loads((item.folder / "training.json").read_text())
    assert read_weights(item.folder)


def test_the_budget_holds():
    every = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in every) == sum(item.size for item in list_weights()) <= BUDGET
    elsewhere = [path for path in (ROOT / "src").rglob("*.safetensors") if not path.is_relative_to(WEIGHTS)]
    assert not elsewhere, "weights ship from one place"


def test_names():
    folder = weights_folder("dynamic-smollm2-135m")
    assert weights_folder("smollm2-135m", "hypernetwork") == folder
    assert weights_folder("smollm2-135m", "draft") == weights_folder("dyspec-smollm2-135m")
    for name, kind in (("smollm2-135m", None), ("dyspec-smollm2-135m", "hypernetwork"), ("nothing", None)):
        with pytest.raises(UnknownNameError, match=name):
            weights_folder(name, kind)
    assert weights_for(tiny_llama(16).config, "draft") is None


def test_weights_are_found_by_the_shape_of_the_model(embedded):
    assert weights_for(embedded[0].config, "draft") == weights_folder("dyspec-smollm2-135m")


# -- no pickles --------------------------------------------------------------------------------------------------------
class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused_and_never_read(name, tmp_path):
    from everytoken.generation.speculative import load_draft
    from everytoken.tokenization.hyper import HyperEmbedding

    tiny_llama(16).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    loaders = (load_model, safetensors_file, read_weights, HyperEmbedding.from_pretrained)
    for load in (*loaders, lambda folder: load_draft(tiny_llama(16), folder)):
        with pytest.raises(BadInputError, match="may run any code") as caught:
            load(tmp_path)
        assert "save_pretrained" in caught.value.hint
    with pytest.raises(BadInputError, match="would read a pickle"):
        load_model(tmp_path, use_safetensors=False)
    assert not (tmp_path / "exploded").exists()


def test_a_folder_without_any_weights(tmp_path):
    with pytest.raises(BadInputError, match=r"holds no model\.safetensors"):
        read_weights(tmp_path)


def test_code_of_a_repository_runs_only_if_asked(tmp_path):
    """A folder with a model class of its own: refused, unless trusted."""
    model = tiny_llama(16)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer_config = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (tmp_path / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    for load in (load_model, load_tokenizer):
        with pytest.raises(BadInputError, match="code of its own") as caught:
            load(tmp_path)
        assert "trust_remote_code=True" in caught.value.hint
    assert not (tmp_path / "ran").exists()
    loaded = load_model(tmp_path, trust_remote_code=True)
    assert type(loaded).__name__ == "Model" and (tmp_path / "ran").exists()
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])


@pytest.mark.slow
def test_no_source_reads_a_pickle():
    """Every ``torch.load`` says ``weights_only=True``, every model's ``from_pretrained`` ``use_safetensors=True``."""
    wrong, seen = [], 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner, name = ast.unparse(node.func.value), node.func.attr
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if owner in ("torch", "pickle") and name in ("load", "loads"):
                seen += 1
                right = owner == "torch" and given.get("weights_only") == "True"
            elif name == "from_pretrained" and ("Model" in owner or "LM" in owner or "Router" in owner):
                seen += 1
                right = given.get("use_safetensors") == "True" or "gguf_file" in given
            else:
                continue
            if not right:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:80]}")
    assert seen >= 5 and not wrong, wrong
