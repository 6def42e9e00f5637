"""Checkpoints that were cut off are skipped, and the one before goes on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

from everytoken.core.errors import BadInputError
from everytoken.preference.trainer import PreferenceTrainer
from everytoken.testing.models import tiny_llama, tiny_tokenizer
from everytoken.training.checkpoints import defect, newest_whole

from ..trainer_settings import trainer_settings


def trainer(folder, **changes):
    vocab = len(tiny_tokenizer())
    own = dict(per_device_train_batch_size=2, max_steps=4, learning_rate=1e-3, save_strategy="steps", save_steps=2)
    return PreferenceTrainer(
        tiny_llama(vocab, seed=1, eos=0), ref_model=tiny_llama(vocab, seed=1, eos=0),
        args=trl.DPOConfig(**trainer_settings(folder, **own | changes)), processing_class=tiny_tokenizer(),
        train_dataset=datasets.Dataset.from_list([{"prompt": "ab", "chosen": "cde", "rejected": "fgh"}] * 4),
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    trainer(folder).train()
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


SPOILS = {
    "trainer_state.json": lambda folder: (folder / "trainer_state.json").unlink(),
    "trainer_state.json cannot be read": lambda folder: cut(folder / "trainer_state.json"),
    "model.safetensors was cut off": lambda folder: cut(folder / "model.safetensors"),
    "optimizer.pt was cut off": lambda folder: cut(folder / "optimizer.pt"),
    "no optimizer state": lambda folder: (folder / "optimizer.pt").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no model-2.safetensors": lambda folder: (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
    ),
}


@pytest.mark.parametrize("why", SPOILS)
def test_a_checkpoint_that_is_not_whole_is_skipped(saved, tmp_path, why):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    last, before = folder / "checkpoint-4", folder / "checkpoint-2"
    assert newest_whole(folder) == (last, [])
    SPOILS[why](last)
    found, skipped = newest_whole(folder)
    assert found == before
    assert len(skipped) == 1
    assert str(last) in skipped[0]
    assert why in skipped[0]


@pytest.mark.slow
def test_training_goes_on_from_the_one_before_and_says_so(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    (folder / "checkpoint-4" / "trainer_state.json").unlink()
    again = trainer(folder)
    with pytest.warns(UserWarning, match="Skipped .*checkpoint-4"):
        again.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "whole", save_strategy="no")
    whole.train()
    assert again.state.global_step == 4
    for one, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert newest_whole(folder) == (folder / "checkpoint-4", [])  # written anew


def test_nothing_to_go_on_from(tmp_path):
    assert newest_whole(tmp_path / "nowhere") == (None, [])
    (tmp_path / "checkpoint-7").mkdir()
    assert newest_whole(tmp_path)[0] is None
    assert defect(tmp_path / "checkpoint-7", ["rto.pt"]) is not None
    with pytest.raises(BadInputError, match="no whole checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
