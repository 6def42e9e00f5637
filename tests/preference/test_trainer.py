"""The one trainer: the same numbers as TRL's DPOTrainer, TDPO on real batches, LoRA, resuming, and errors."""

from __future__ import annotations

import json

import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.preference.dpo import DPOLoss
from everytoken.preference.tdpo import TDPOLoss

from ..conftest import tiny_llama
from ..trainer_settings import trainer_settings

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

ROWS = [
    {"prompt": "The film was", "chosen": " a delight from start to end.", "rejected": " dull."},
    {"prompt": "We found the food", "chosen": " fresh and warm.", "rejected": " cold, and the staff unkind to us."},
    {"prompt": "My day:", "chosen": " sunny", "rejected": " a long and grey one without end"},
    {"prompt": "In short,", "chosen": " well done!", "rejected": " never again."},
]


def config(folder, **changes):
    return trl.DPOConfig(**trainer_settings(folder, **changes))


def make(folder, tokenizer, loss=None, rows=ROWS, trainer_class=None, annotators=None, monitor_kl=False, **changes):
    from everytoken.preference.trainer import PreferenceTrainer

    model, reference = tiny_llama(49152, seed=1, eos=2), tiny_llama(49152, seed=1, eos=2)
    with torch.no_grad():  # a policy that has already moved
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    extra = {"loss": loss, "annotators": annotators or [], "monitor_kl": monitor_kl} if trainer_class is None else {}
    return (trainer_class or PreferenceTrainer)(
        model,
        ref_model=reference,
        args=config(folder, **changes),
        train_dataset=datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows,
        processing_class=tokenizer,
        **extra,
    )


def first_batch(trainer):
    trainer.model.train()
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def test_dpo_equals_trls_own_in_loss_gradient_and_rewards(tmp_path, embedded_tokenizer):
    ours = make(tmp_path, embedded_tokenizer, DPOLoss(0.1))
    theirs = make(tmp_path, embedded_tokenizer, trainer_class=trl.DPOTrainer)
    grads, losses, metrics = [], [], []
    for trainer in (ours, theirs):
        loss = trainer.compute_loss(trainer.model, first_batch(trainer))
        loss.backward()
        losses.append(loss.item())
        grads.append(torch.cat([weight.grad.flatten() for weight in trainer.model.parameters()]))
        metrics.append({name: values[-1] for name, values in trainer._metrics["train"].items()})
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert torch.allclose(grads[0], grads[1], atol=1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], abs=1e-3)


def test_tdpo_from_the_trainer_equals_the_plain_formula(tmp_path, embedded_tokenizer):
    trainer = make(tmp_path, embedded_tokenizer, TDPOLoss(alpha=0.5))
    batch = first_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    mask = batch["completion_mask"][:, 1:].bool()
    labels = batch["input_ids"][:, 1:]
    log_p, log_q = [
        torch.log_softmax(model(**inputs).logits[:, :-1].float(), -1) for model in (trainer.model, trainer.ref_model)
    ]
    u = ((log_p - log_q).gather(-1, labels[..., None])[..., 0] * mask).sum(1)
    d = ((log_q.exp() * (log_q - log_p)).sum(-1) * mask).sum(1)
    z = (u[:4] - u[4:]) - 0.5 * (d[4:] - d[:4])
    assert loss.item() == pytest.approx(-torch.nn.functional.logsigmoid(0.1 * z).mean().item(), abs=1e-5)
    assert trainer._metrics["train"]["kl/rejected"][-1] == pytest.approx(d[4:].mean().item(), abs=1e-4)


@pytest.mark.slow
def test_training_moves_the_margin_and_resumes(tmp_path, embedded_tokenizer):
    trainer = make(
        tmp_path, embedded_tokenizer, TDPOLoss(), max_steps=8, save_strategy="steps", save_steps=4, learning_rate=3e-3
    )
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[-1] > margins[0]
    assert (tmp_path / "checkpoint-4").is_dir()
    again = make(tmp_path, embedded_tokenizer, TDPOLoss(), max_steps=8, save_strategy="no", learning_rate=3e-3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 8
    for one, other in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.slow
def test_lora_uses_the_base_model_as_reference(tmp_path, embedded_tokenizer):
    peft = pytest.importorskip("peft")
    from everytoken.preference.trainer import PreferenceTrainer

    trainer = PreferenceTrainer(
        tiny_llama(49152, seed=1, eos=2),
        loss=TDPOLoss(),
        args=config(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2),
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=embedded_tokenizer,
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )
    assert trainer.ref_model is None
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # adapters start at zero: policy == reference
    assert history[-1]["loss"] < history[0]["loss"]


def test_evaluation(tmp_path, embedded_tokenizer):
    trainer = make(tmp_path, embedded_tokenizer, TDPOLoss())
    trainer.eval_dataset = trainer.train_dataset
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_rewards/margins", "eval_kl/chosen"} <= set(metrics)


BAD_ROWS = [
    ({"prompt": "a", "chosen": " b", "rejected": " b"}, "row 2: chosen and rejected are identical"),
    ({"prompt": "a", "chosen": " b", "rejected": ""}, "row 2: 'rejected' must be non-empty"),
    ({"prompt": "", "chosen": " b", "rejected": " c"}, "row 2: 'prompt' must be non-empty"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=[message for _, message in BAD_ROWS])
def test_bad_rows_are_named(tmp_path, embedded_tokenizer, row, message):
    with pytest.raises(BadInputError, match=message):
        make(tmp_path, embedded_tokenizer, TDPOLoss(), rows=[*ROWS[:2], row])


@pytest.mark.parametrize("setting", [dict(padding_free=True), dict(use_weighting=True)])
def test_settings_without_meaning_are_refused(tmp_path, embedded_tokenizer, setting):
    with pytest.raises(BadInputError, match=next(iter(setting))):
        make(tmp_path, embedded_tokenizer, TDPOLoss(), **setting)


def common():
    """What two tests of references give besides model and settings."""
    return dict(loss=TDPOLoss(), train_dataset=datasets.Dataset.from_list(ROWS))


def test_a_model_without_a_name_needs_its_reference_given(tmp_path, embedded_tokenizer, monkeypatch):
    """TRL loads the reference by the policy's name; where there is none, nothing may be read or prepared first."""
    from everytoken.preference.trainer import PreferenceTrainer

    model = tiny_llama(49152, seed=1, eos=2)
    monkeypatch.setattr(PreferenceTrainer, "_prepare_dataset", lambda *_: pytest.fail("data were prepared"))
    for given in (dict(model=model), dict(model=model, ref_model=None)):
        with pytest.raises(BadInputError, match=r"no reference.*\n.*ref_model=copy.deepcopy"):
            PreferenceTrainer(args=config(tmp_path), processing_class=embedded_tokenizer, **given, **common())


@pytest.mark.slow
def test_a_reference_that_is_not_given_is_loaded_by_name_or_precomputed(tmp_path, embedded_tokenizer):
    from everytoken.preference.trainer import PreferenceTrainer

    model, own = tiny_llama(49152, seed=1, eos=2), dict(processing_class=embedded_tokenizer)
    settings = config(tmp_path, precompute_ref_log_probs=True)
    assert PreferenceTrainer(model, args=settings, **common() | {"loss": None}, **own).ref_model is None
    model.save_pretrained(tmp_path / "named")
    model.config._name_or_path = str(tmp_path / "named")
    named = PreferenceTrainer(model, args=config(tmp_path), **common(), **own)
    for one, other in zip(model.parameters(), named.ref_model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_loss_that_is_not_finite_stops_training_and_saves_the_batch(tmp_path, embedded_tokenizer):
    from everytoken.training.finite_check import NonFiniteLossError

    trainer = make(tmp_path, embedded_tokenizer, TDPOLoss())
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"bad_batch\.json") as caught:
        trainer.train()
    assert isinstance(caught.value, FloatingPointError)
    saved = json.loads((tmp_path / "bad_batch.json").read_text())
    assert saved["step"] == 0
    assert {pair["chosen"]["prompt"] + pair["chosen"]["response"] for pair in saved["rows"]} == {
        row["prompt"] + row["chosen"] for row in ROWS
    }


@pytest.mark.parametrize(
    "changes",
    [
        dict(gradient_checkpointing=True),
        dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
        dict(gradient_accumulation_steps=2, per_device_train_batch_size=2),
    ],
    ids=str,
)
@pytest.mark.slow
def test_checkpointing_and_accumulation_change_no_weight(tmp_path, embedded_tokenizer, changes):
    weights = []
    for extra in ({"gradient_checkpointing": False}, changes):
        trainer = make(tmp_path, embedded_tokenizer, TDPOLoss(), **{"max_steps": 2, "learning_rate": 1e-3} | extra)
        trainer.train()
        weights.append(torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()]))
    assert (weights[0] - weights[1]).abs().max() < 2e-5


@pytest.mark.parametrize("how", ["autocast", pytest.param("weights", marks=pytest.mark.slow)])
def test_bfloat16(tmp_path, embedded_tokenizer, how):
    """Under autocast and with bfloat16 weights, the loss stays near float32's and training moves on."""
    plain = make(tmp_path, embedded_tokenizer, TDPOLoss())
    expected = plain.compute_loss(plain.model, first_batch(plain)).item()
    trainer = make(tmp_path, embedded_tokenizer, TDPOLoss(), bf16=how == "autocast", learning_rate=1e-3)
    if how == "weights":
        trainer.model.bfloat16()
        trainer.ref_model.bfloat16()
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, first_batch(trainer))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, abs=0.05)
    trainer.train()
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


def test_credit_trace(embedded_tokenizer):
    from everytoken.preference.traces import credit_trace

    policy, reference = tiny_llama(49152, seed=1), tiny_llama(49152, seed=2)
    trace = credit_trace(policy, reference, embedded_tokenizer, "The film was", " a quiet delight.", beta=0.2)
    assert trace.texts == [" a", " quiet", " delight", "."]
    for reward, logp, ref in zip(
        trace.columns["implicit_reward"], trace.columns["logp"], trace.columns["ref_logp"], strict=True
    ):
        assert reward == pytest.approx(0.2 * (logp - ref), abs=1e-5)
    assert all(value >= 0 for value in trace.columns["forward_kl"])
    with pytest.raises(BadInputError, match="empty"):
        credit_trace(policy, reference, embedded_tokenizer, "x", "")
