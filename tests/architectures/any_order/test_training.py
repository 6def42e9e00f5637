"""``everytoken train diffusion-lm`` and the Trainer: what they learn from, that they go on, what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

from everytoken.architectures.any_order.training import TRAINING, AnyOrderTrainer, DiffusionTraining, source_of
from everytoken.core.errors import BadInputError
from everytoken.training.base import TrainingContext, read_config
from everytoken.training.datasets import sudoku

from .test_modeling import IDS, network

SMALL = ["steps=4", "batch=4", "layers=1", "width=16", "heads=2"]


def test_sudokus():
    grids = sudoku.all_grids()
    assert grids.shape == (288, 16) and len({tuple(grid) for grid in grids.tolist()}) == 288
    assert sudoku.is_solved(grids).all()
    wrong = grids.copy()
    wrong[:, 0] = wrong[:, 1]
    assert not sudoku.is_solved(wrong).any() and not sudoku.is_solved(np.full((1, 16), -1)).any()
    ids = sudoku.puzzles(50, seed=1)
    holes = (ids == sudoku.OPEN).sum(1)
    assert torch.equal(ids, sudoku.puzzles(50, seed=1)) and 6 <= int(holes.min()) <= int(holes.max()) <= 10
    held = {tuple(grid) for grid in sudoku.grids(True).tolist()}
    for row in ids[:10]:
        kept = row != sudoku.OPEN
        assert any(all(g[i] + 2 == row[i] for i in kept.nonzero()[:, 0]) for g in sudoku.grids(True))
    assert not held & {tuple(grid) for grid in sudoku.grids(False).tolist()}
    tokenizer = sudoku.sudoku_tokenizer()
    assert tokenizer("1.3.\n| 2")["input_ids"] == [2, 1, 4, 1, 3] and tokenizer.decode([2, 1, 3]) == "1.2"
    with pytest.raises(BadInputError, match="open cells"):
        sudoku.puzzles(1, 0, holes=(0, 3))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sudoku", "text", "rows", "two streams"])
def test_it_trains_goes_on_and_reports(tmp_path, task):
    data, settings = None, ["task=sudoku"] if task in ("sudoku", "two streams") else ["length=24"]
    settings += ["streams=2"] if task == "two streams" else []
    if task == "rows":
        data = str(tmp_path / "rows.jsonl")
        rows = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(40)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = read_config(TRAINING, None, [*SMALL, *settings])
    result = TRAINING.run(config, TrainingContext(None, data, tmp_path / "out"))
    assert result.figures["nats per token, at most"] > 0
    again = TRAINING.run(config, TrainingContext(None, data, tmp_path / "out"))
    assert again.figures == result.figures
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out" / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert tokenizer.mask_token_id == model.config.mask_token_id
    assert ('figure class="canvas"' in (tmp_path / "out" / "report.html").read_text()) == (task != "two streams")


def test_rows_learn_their_completions_alone(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "a" * (n % 3 + 1), "completion": "bc"}) + "\n" for n in range(20)))
    batch = source_of(DiffusionTraining(length=8), str(file)).batch(6, 0)
    assert torch.equal(batch.response, torch.arange(8).expand(6, -1) >= 3)
    assert bool((batch.ids[:, 3:] == torch.tensor([98 + 3, 99 + 3, 1, 1, 1])).all())
    assert bool((batch.ids[batch.attention & ~batch.response] == 97 + 3).all())
    assert bool((batch.attention[:, 2:]).all()) and not bool(batch.attention[:, 0].all())
    for text, message in (('{"prompt": "a"}\n' * 20, "completion"), ('{"prompt": "a", "completion": "b"}\n', "ten")):
        file.write_text(text)
        with pytest.raises(BadInputError, match=message):
            source_of(DiffusionTraining(length=8), str(file))


def test_what_is_refused(tmp_path):
    for settings in ({"task": "chess"}, {"steps": 0}, {"width": 18}, {"warmup": 0.9}):
        with pytest.raises(BadInputError):
            DiffusionTraining(**settings)
    with pytest.raises(BadInputError, match="scratch"):
        TRAINING.run(DiffusionTraining(), TrainingContext("model", None, tmp_path))
    with pytest.raises(BadInputError, match="own grids"):
        source_of(DiffusionTraining(task="sudoku"), "file.txt")
    for settings, message in (({"loss": "dpo"}, "mdlm"), ({"mask_rates": (0, 1)}, "shares")):
        with pytest.raises(BadInputError, match=message):
            AnyOrderTrainer(network(), **settings)
    with pytest.raises(BadInputError, match="streams=2"):
        AnyOrderTrainer(network(), loss="any_subset")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["mdlm", "any_subset"])
def test_the_trainer(tmp_path, loss):
    model = network(streams=2)
    rows = [{"input_ids": row, "labels": torch.where(torch.arange(6) < 2, -100, row)} for row in IDS.repeat(8, 1)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=30, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_steps=5,
    )  # fmt: skip
    trainer = AnyOrderTrainer(model, arguments, loss=loss, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
