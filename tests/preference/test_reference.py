"""The reference: the head, the precision and the tokens are those it should have; an auxiliary loss is TRL's."""

from __future__ import annotations

import math

import pytest
import torch

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

from everytoken.core.errors import BadInputError
from everytoken.preference.columns import ModelLogps
from everytoken.preference.dpo import DPOLoss
from everytoken.preference.tdpo import TDPOLoss
from everytoken.preference.tgdpo import TGDPOLoss
from everytoken.preference.trainer import PreferenceTrainer
from everytoken.testing.models import tiny_llama, tiny_tokenizer

ROWS = [
    {"prompt": "abc", "chosen": "defgh", "rejected": "hgf"},
    {"prompt": "bcda", "chosen": "ahhg", "rejected": "efefefefab"},
    {"prompt": "e", "chosen": "edcba", "rejected": "b"},
    {"prompt": "kja", "chosen": "bb", "rejected": "cck"},
]
VOCAB = len(tiny_tokenizer())


def policy(seed=1):
    return tiny_llama(VOCAB, seed=seed, eos=0)


def config(folder, **changes):
    settings = dict(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=2, learning_rate=1e-2, report_to=[],
        logging_steps=1, save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    return trl.DPOConfig(**settings | changes)


def make(folder, model=None, reference=None, rows=ROWS, loss=None, kind=PreferenceTrainer, **extra):
    own = {"annotators", "monitor_kl", "drop_identical", "peft_config", "data_collator"}
    kwargs = {name: extra.pop(name) for name in own & set(extra)}
    if kind is PreferenceTrainer:
        kwargs["loss"] = loss
    return kind(
        policy() if model is None else model, ref_model=reference, args=config(folder, **extra),
        train_dataset=datasets.Dataset.from_list(rows), processing_class=tiny_tokenizer(), **kwargs,
    )  # fmt: skip


def first_loss(trainer):
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return trainer.compute_loss(trainer.model, batch), batch


def test_a_head_that_peft_saves_is_not_the_references(tmp_path):
    """After steps, the reference's log-probabilities are still those of PEFT with the adapter off."""
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    trainer = make(tmp_path, peft_config=adapter, loss=TDPOLoss(), learning_rate=0.1, max_steps=3)
    trainer.train()
    _, batch = first_loss(trainer)
    _, reference = trainer.score_pairs(trainer.model, batch)
    with torch.no_grad(), trainer.model.disable_adapter():
        logits = trainer.model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    logp = torch.log_softmax(logits[:, :-1], -1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    expected = logp * batch["completion_mask"][:, 1:]
    found = torch.cat([reference.chosen_logps, reference.rejected_logps])
    assert torch.allclose(found, expected, atol=1e-5)


def test_equal_models_under_autocast_have_the_loss_log_2(tmp_path):
    trainer = make(tmp_path, reference=policy(), loss=TDPOLoss(), monitor_kl=True, bf16=True, max_steps=1)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert entry["kl/chosen"] == pytest.approx(0, abs=1e-7)


def test_a_precomputed_reference_runs_under_autocast(tmp_path, monkeypatch):
    """Its batches are others than training's, and on some processors bfloat16 rounds a row by what stands beside it."""
    monkeypatch.setenv("EVERYTOKEN_CACHE", str(tmp_path / "cache"))  # else kept columns need no forward
    reference, cast = policy(), []
    reference.register_forward_pre_hook(lambda *_: cast.append(torch.is_autocast_enabled("cpu")))
    trainer = make(tmp_path, reference=reference, loss=DPOLoss(), bf16=True, max_steps=1, precompute_ref_log_probs=True)
    trainer.train()
    assert cast and all(cast)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=5e-3)


def test_a_guide_runs_in_the_policys_precision(tmp_path):
    """A guide that is the policy itself weighs every token alike, under autocast too."""
    trainer = make(
        tmp_path, reference=policy(), loss=TGDPOLoss(), annotators=[ModelLogps(policy())], bf16=True, max_steps=1
    )
    _, batch = first_loss(trainer)
    ours, reference = trainer.score_pairs(trainer.model, batch)
    for side in ("chosen", "rejected"):
        guide = getattr(ours, side)["guide_logps"]
        assert torch.allclose(guide, getattr(reference, f"{side}_logps"), atol=1e-6)


def mixture():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, pad_token_id=1, bos_token_id=0,
        eos_token_id=0, router_aux_loss_coef=0.5,
    )).eval()  # fmt: skip


@pytest.mark.parametrize("coefficient", [None, 2.0, 0.0])
def test_the_auxiliary_loss_of_experts_is_trls(tmp_path, coefficient):
    losses = []
    for kind in (PreferenceTrainer, trl.DPOTrainer):
        trainer = make(tmp_path, mixture(), mixture(), kind=kind, router_aux_loss_coef=coefficient)
        losses.append(first_loss(trainer)[0].item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert (losses[0] == pytest.approx(math.log(2), abs=1e-4)) == (coefficient == 0.0)


# -- columns
# -------------------------------------------------------------------------------------------------------------
def test_columns_are_cut_as_the_rows_and_belong_to_what_is_left(tmp_path):
    """With keep_end the reference reads rows without their beginning, whether it is asked now or was before."""
    found = []
    for precomputed in (False, True):
        trainer = make(
            tmp_path, reference=policy(2), loss=DPOLoss(), max_length=6, truncation_mode="keep_end",
            precompute_ref_log_probs=precomputed,
        )  # fmt: skip
        _, batch = first_loss(trainer)
        assert ("column/ref_logps" in batch) == precomputed
        found.append(trainer.score_pairs(trainer.model, batch)[1])
    for side in ("chosen_logps", "rejected_logps"):
        assert torch.allclose(getattr(found[0], side), getattr(found[1], side), atol=1e-5)
        assert getattr(found[0], side).abs().sum() > 0


def test_users_columns_are_cut_where_the_rows_are(tmp_path):
    rows = [
        {
            "prompt_ids": [2, 3], "chosen_ids": [4, 5, 6, 7, 8], "rejected_ids": [9, 3],
            "chosen_guide_logps": [-1.0, -2.0, -3.0, -4.0, -5.0], "rejected_guide_logps": [-6.0, -7.0],
        }
    ] * 2  # fmt: skip
    for mode, chosen in (("keep_end", [0, -2, -3, -4, -5]), ("keep_start", [0, 0, -1, -2])):
        trainer = make(
            tmp_path, reference=policy(2), rows=rows, loss=TGDPOLoss(), max_length=4, truncation_mode=mode,
            per_device_train_batch_size=1,
        )  # fmt: skip
        column = next(iter(trainer.get_train_dataloader()))["column/guide_logps"]
        assert column[0].tolist() == chosen[-4:]
        assert column[1].tolist() == [0, 0, -6, -7]


def test_any_collator_keeps_its_columns(tmp_path):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    class Marked(DataCollatorForPreference):
        def torch_call(self, examples):
            return super().torch_call(examples)

    plain, marked = (
        make(
            tmp_path, reference=policy(2), loss=TGDPOLoss(), annotators=[ModelLogps(policy(3))], data_collator=collator
        )
        for collator in (None, Marked(pad_token_id=1, max_length=1024))
    )  # fmt: skip
    assert first_loss(plain)[0].item() == pytest.approx(first_loss(marked)[0].item(), abs=1e-6)
    broken = make(
        tmp_path, reference=policy(2), loss=TGDPOLoss(), annotators=[ModelLogps(policy(3))],
        data_collator=lambda rows: {"input_ids": torch.zeros(len(rows), 3)},
    )  # fmt: skip
    with pytest.raises(BadInputError, match="completion_mask"):
        first_loss(broken)


def test_identical_pairs_are_dropped_and_counted_where_that_is_asked(tmp_path):
    rows = [*ROWS, {"prompt": "a", "chosen": "b", "rejected": "b"}]
    with pytest.raises(BadInputError, match="row 4: chosen and rejected are identical"):
        make(tmp_path, reference=policy(2), rows=rows)
    trainer = make(tmp_path, reference=policy(2), rows=rows, drop_identical=True)
    assert len(trainer.train_dataset) == 4
    assert trainer.dropped == {"train data": 1}
    with pytest.raises(BadInputError, match="identical in every row"):
        make(tmp_path, reference=policy(2), rows=rows[4:], drop_identical=True)
