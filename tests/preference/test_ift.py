"""IFT: weights by brute force and limits, reductions to supervised tuning in value and gradient, the two passes by
hand.
"""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.preference.ift import IFTSettings, IFTTrainer, relation_weights
from everytoken.training.finite_check import NonFiniteLossError

from ..conftest import tiny_llama
from ..trainer_settings import trainer_settings

SEEDS = st.integers(0, 300)


def losses_and_mask(seed, batch=4, length=8):
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, length, (batch, 1), generator=generator)
    counts = torch.randint(0, length, (batch, 1), generator=generator)
    places = torch.arange(length)
    mask = (places >= starts) & (places < starts + counts)
    return torch.rand(batch, length, generator=generator, dtype=torch.float64) + 0.01, mask


# -- relation weights
# ----------------------------------------------------------------------------------------------------
@given(seed=SEEDS, gamma=st.sampled_from([0.3, 0.95, 1.0]))
@settings(max_examples=50, deadline=None)
def test_weights_by_a_double_loop(seed, gamma):
    losses, mask = losses_and_mask(seed)
    found = relation_weights(losses, mask, IFTSettings(gamma=gamma))
    for row in range(len(mask)):
        targets = [t for t in range(mask.shape[1]) if mask[row, t]]
        n = len(targets)
        c = {t: sum(gamma ** (i - t) * losses[row, i].item() for i in targets if i >= t) / n for t in targets}
        for t in range(mask.shape[1]):
            expected = c[t] * n / sum(c.values()) if t in c else 0.0
            assert found[row, t].item() == pytest.approx(expected, rel=1e-6)


NORMED = {
    "left": {
        "l1": lambda c, m: c, "l2": lambda c, m: c**2, "softmax": lambda c, m: math.exp(c),
        "log": lambda c, m: math.log(1 + c),
    },
    "right": {
        "l1": lambda c, m: 1 / (c + m), "l2": lambda c, m: 1 / (c + m) ** 2,
        "softmax": lambda c, m: math.exp(1 / (c + m)), "log": lambda c, m: 1 / math.log(c + m + 1),
    },
}  # fmt: skip


@given(
    seed=SEEDS, gamma=st.sampled_from([0.5, 1.0]), side=st.sampled_from(["left", "right"]),
    norm=st.sampled_from(["l1", "l2", "softmax", "log"]), propagation=st.sampled_from(["loss", "logps", "mask"]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_every_variant_is_that_of_the_authors_code(seed, gamma, side, norm, propagation):
    """Sums ahead or behind, turned round on the right with the smallest sum of the batch, then brought to average 1."""
    losses, mask = losses_and_mask(seed)
    found = relation_weights(losses, mask, IFTSettings(gamma=gamma, side=side, norm=norm, propagation=propagation))
    sums = []
    for row in range(len(mask)):
        targets = [t for t in range(mask.shape[1]) if mask[row, t]]
        item = {"loss": losses[row] / max(len(targets), 1), "logps": losses[row], "mask": torch.ones(8)}[propagation]
        ahead = side == "left"
        sums.append({
            t: sum(gamma ** abs(i - t) * item[i].item() for i in targets if (i >= t if ahead else i <= t))
            for t in targets
        })  # fmt: skip
    smallest = min((value for row in sums for value in row.values()), default=0.0)
    for row, c in enumerate(sums):
        shaped = {t: NORMED[side][norm](value, smallest) for t, value in c.items()}
        for t in range(mask.shape[1]):
            expected = shaped[t] * len(c) / sum(shaped.values()) if t in c else 0.0
            assert found[row, t].item() == pytest.approx(expected, rel=1e-5)


def test_equal_losses_at_gamma_one_weigh_by_what_remains():
    mask = torch.tensor([[False, True, True, True, True]])
    found = relation_weights(torch.full((1, 5), 0.7), mask, IFTSettings(gamma=1.0))
    assert torch.allclose(found, torch.tensor([[0, 4, 3, 2, 1]]) * 4 / 10)
    by_mask = relation_weights(torch.ones(1, 5), mask, IFTSettings(gamma=1.0, propagation="mask"))
    assert torch.allclose(by_mask, found)


def test_gamma_zero_switches_weights_off():
    losses, mask = losses_and_mask(1)
    assert torch.equal(relation_weights(losses, mask, IFTSettings(gamma=0.0)), mask.double())
    zeros = relation_weights(torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), IFTSettings())
    assert torch.equal(zeros, torch.ones(1, 3))  # nothing to propagate


# -- the trainer
# ---------------------------------------------------------------------------------------------------------
ROWS = [
    {"prompt": "The film was", "completion": " a joy from the first scene on."},
    {"prompt": "Our hotel", "completion": " was quiet, clean and kind to us all."},
    {"prompt": "My day:", "completion": " sunny"},
    {"prompt": "In short,", "completion": " never again, and never there."},
]


def config(folder, **changes):
    return trl.SFTConfig(**trainer_settings(folder, **changes))


def make(folder, tokenizer, settings_=None, rows=ROWS, **changes):
    extra = {} if settings_ is None else {"ift": settings_}
    return (trl.SFTTrainer if settings_ is None else IFTTrainer)(
        tiny_llama(49152, seed=1, eos=2),
        args=config(folder, **changes),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
        **extra,
    )


def loss_and_gradient(trainer, num_items=None):
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_items)
    loss.backward()
    return loss.item(), torch.cat([weight.grad.flatten() for weight in trainer.model.parameters()]), batch


@pytest.mark.parametrize("num_items", [None, torch.tensor(40)])
def test_residual_and_gamma_zero_is_trls_sft_in_value_and_gradient(tmp_path, embedded_tokenizer, num_items):
    ours = make(tmp_path, embedded_tokenizer, IFTSettings(residual=0, gamma=0, reduction="token"))
    theirs = make(tmp_path, embedded_tokenizer)
    (loss, grad, _), (expected, plain, _) = (loss_and_gradient(trainer, num_items) for trainer in (ours, theirs))
    assert loss == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(grad, plain, atol=1e-6)


def plain_logits(model, ids, attention, embeds=None):
    arguments = {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds}
    return model(**arguments, attention_mask=attention).logits


def test_the_whole_loss_by_hand(tmp_path, embedded_tokenizer):
    trainer = make(tmp_path, embedded_tokenizer, IFTSettings(residual=0.3, gamma=0.9))
    loss, grad, batch = loss_and_gradient(trainer)
    model, ids, labels = trainer.model, batch["input_ids"], batch["labels"]
    attention = batch["attention_mask"]
    with torch.no_grad():
        guesses = plain_logits(model, ids, attention).argmax(-1)
    other = ids.clone()
    for row in range(len(ids)):
        for t in range(1, ids.shape[1]):
            if labels[row, t] != -100:
                other[row, t] = guesses[row, t - 1]
    embed = model.get_input_embeddings()
    logits = plain_logits(model, None, attention, 0.7 * embed(ids) + 0.3 * embed(other))
    logp = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    total = 0
    for row in range(len(ids)):
        targets = [t for t in range(ids.shape[1] - 1) if labels[row, t + 1] != -100]
        n, l = len(targets), {t: -logp[row, t] for t in targets}  # noqa: E741
        c = {t: sum(0.9 ** (i - t) * l[i] for i in targets if i >= t) / n for t in targets}
        norm = sum(c.values())
        total = total + sum(n * c[t] / norm * l[t] for t in targets) / n
    expected = total / len(ids)
    model.zero_grad()
    expected.backward()
    plain = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert (grad - plain).abs().max() < 1e-5 * plain.abs().max()


def test_without_residual_the_second_pass_is_the_first(tmp_path, embedded_tokenizer):
    trainer = make(tmp_path, embedded_tokenizer, IFTSettings(residual=0.0, gamma=0.9))
    _, _, batch = loss_and_gradient(trainer)
    found = trainer.token_losses(trainer.model, batch)
    losses, mask = found.losses, found.mask
    assert torch.equal(found.predicted, batch["input_ids"])
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logp = torch.log_softmax(logits[:, :-1], -1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    assert torch.allclose(losses[mask], -logp[mask], atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        dict(propagation="logps"),
        dict(propagation="mask"),
        dict(side="right"),
        dict(norm="softmax"),
        dict(norm="l2"),
        dict(top_k=None, temperature=0.7),
        dict(top_k=5),
        dict(residual_warmup=0.5, noise=0.1),
        dict(detach_weights=True),
        dict(reduction="token"),
    ],
    ids=str,
)
@pytest.mark.slow
def test_every_variant_trains(tmp_path, embedded_tokenizer, changes):
    trainer = make(tmp_path, embedded_tokenizer, IFTSettings(**changes), max_steps=6)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "nll" in entry]
    assert history[-1]["nll"] < history[0]["nll"]
    assert all(entry["weights/largest"] >= 1 for entry in history)


def test_detaching_changes_the_gradient_and_not_the_loss(tmp_path, embedded_tokenizer):
    one = loss_and_gradient(make(tmp_path, embedded_tokenizer, IFTSettings()))
    other = loss_and_gradient(make(tmp_path, embedded_tokenizer, IFTSettings(detach_weights=True)))
    assert one[0] == pytest.approx(other[0], abs=1e-6)
    assert not torch.allclose(one[1], other[1], atol=1e-6)


def test_predictions_replace_targets_only(tmp_path, embedded_tokenizer):
    trainer = make(tmp_path, embedded_tokenizer, IFTSettings())
    _, _, batch = loss_and_gradient(trainer)
    predicted = trainer.token_losses(trainer.model, batch).predicted
    kept = batch["labels"] == -100
    assert torch.equal(predicted[kept], batch["input_ids"][kept])
    assert not torch.equal(predicted[~kept], batch["input_ids"][~kept])


@pytest.mark.slow
def test_lora_accumulation_checkpointing_and_resume(tmp_path, embedded_tokenizer):
    peft = pytest.importorskip("peft")

    def trainer(folder, **changes):
        return IFTTrainer(
            tiny_llama(49152, seed=1, eos=2),
            args=config(
                folder,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                gradient_checkpointing=True,
                max_steps=4,
                **changes,
            ),
            train_dataset=datasets.Dataset.from_list(ROWS),
            processing_class=copy.deepcopy(embedded_tokenizer),
            peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        )

    whole = trainer(tmp_path, save_strategy="steps", save_steps=2)
    whole.train()
    again = trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.slow
def test_accumulation_changes_no_weight(tmp_path, embedded_tokenizer, reduction):
    weights = []
    for changes in ({}, dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)):
        settings_ = IFTSettings(reduction=reduction)
        # plain SGD: Adam would turn rounding in gradients near zero into whole steps
        trainer = make(tmp_path, embedded_tokenizer, settings_, max_steps=2, learning_rate=1e-2, optim="sgd", **changes)
        start = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()]).clone()
        trainer.train()
        weights.append(torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()]))
    assert (weights[0] - weights[1]).abs().max() < 1e-4 * (weights[0] - start).abs().max()


def test_bad_input(tmp_path, embedded_tokenizer):
    for bad in (
        dict(residual=2),
        dict(gamma=-1),
        dict(norm="l3"),
        dict(propagation="x"),
        dict(top_k=0),
        dict(temperature=0),
    ):
        with pytest.raises(BadInputError):
            IFTSettings(**bad)
    with pytest.raises(BadInputError, match="packing"):
        make(tmp_path, embedded_tokenizer, IFTSettings(), packing=True)
    trainer = make(tmp_path, embedded_tokenizer, IFTSettings())
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match="learning rate"):
        trainer.train()
    saved = json.loads((tmp_path / "bad_batch.json").read_text())
    assert {row["text"].split("<|im_end|>")[0] for row in saved["rows"]} == {
        r["prompt"] + r["completion"] for r in ROWS
    }
    model = tiny_llama(49152, eos=2)
    type(model).get_input_embeddings, kept = (lambda self: None), type(model).get_input_embeddings
    try:
        from everytoken.training.scored_forward import input_embeddings

        with pytest.raises(UnsupportedModelError, match="input embeddings"):
            input_embeddings(model)
    finally:
        type(model).get_input_embeddings = kept
