"""Supervised tuning through the scored forward: TRL's own loss and gradient, and a copy tuned on rows."""

from __future__ import annotations

import copy

import pytest
import torch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from everytoken.core.errors import BadInputError
from everytoken.core.scoring import response_logps
from everytoken.training.supervised import SupervisedTrainer, tune_copy

from ..conftest import tiny_llama
from ..trainer_settings import trainer_settings

ROWS = [
    {"input_ids": [1, 5, 6, 7, 8], "labels": [-100, -100, 6, 7, 8]},
    {"input_ids": [1, 3, 9], "labels": [-100, 3, 9]},
    {"input_ids": [1, 4, 4, 2], "labels": [-100, -100, -100, 2]},
]


class PerToken(SupervisedTrainer):
    reduction = "token"


def make(kind, folder, tokenizer, **changes):
    args = trl.SFTConfig(**trainer_settings(folder, per_device_train_batch_size=3, max_steps=1, **changes))
    model = tiny_llama(49152, seed=1, eos=2)
    data = datasets.Dataset.from_list(ROWS)
    return kind(model, args=args, train_dataset=data, processing_class=copy.deepcopy(tokenizer))


def loss_and_gradient(trainer):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return loss.item(), torch.cat([weight.grad.flatten() for weight in trainer.model.parameters()]), batch


def test_by_tokens_it_is_trls_sft(tmp_path, embedded_tokenizer):
    ours, theirs = (loss_and_gradient(make(kind, tmp_path, embedded_tokenizer)) for kind in (PerToken, trl.SFTTrainer))
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
    assert torch.allclose(ours[1], theirs[1], atol=1e-6)


def test_by_sequences_every_row_counts_alike(tmp_path, embedded_tokenizer):
    trainer = make(SupervisedTrainer, tmp_path, embedded_tokenizer)
    loss, _, batch = loss_and_gradient(trainer)
    mask = batch["labels"] != -100
    with torch.no_grad():
        logps = response_logps(trainer.model, batch["input_ids"], mask, batch["attention_mask"])
    assert loss == pytest.approx(-(logps.sum(-1) / mask.sum(-1)).mean().item(), abs=1e-5)


def test_rows_that_would_mix_are_refused(tmp_path, embedded_tokenizer):
    with pytest.raises(BadInputError, match="SupervisedTrainer does not support packing=True"):
        make(SupervisedTrainer, tmp_path, embedded_tokenizer, packing=True)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_tuned_copy_prefers_its_rows_and_is_frozen(embedded_tokenizer, rank):
    if rank:
        pytest.importorskip("peft")
    start, seen = tiny_llama(49152, seed=1, eos=2), []
    made = tune_copy(
        copy.deepcopy(start),
        embedded_tokenizer,
        ROWS,
        steps=4,
        lr=1e-2,
        lora_r=rank,
        report=lambda *step: seen.append(step),
        stage="tuning it",
    )
    assert seen == [("tuning it", step, 4) for step in range(1, 5)]
    assert not any(weight.requires_grad for weight in made.parameters())
    assert not hasattr(made, "peft_config") or not made.peft_config
    ids = torch.tensor([ROWS[0]["input_ids"]])
    mask = torch.tensor([ROWS[0]["labels"]]) != -100
    assert response_logps(made, ids, mask).sum() > response_logps(start, ids, mask).sum()
