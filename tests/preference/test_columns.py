"""Per-token columns: computed once, kept, aligned, and used by the trainer as if the model were there."""

from __future__ import annotations

import copy

import pytest
import torch

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

from everytoken.core.errors import BadInputError, TokenizerMismatchError
from everytoken.core.scoring import response_logps
from everytoken.preference.base import TokenAnnotator
from everytoken.preference.cdpo import CDPOLoss, ContrastiveEstimator
from everytoken.preference.columns import ModelLogps, precompute
from everytoken.preference.dpo import DPOLoss
from everytoken.preference.t_reg import ContrastivePromptRewards, TREGLoss
from everytoken.preference.tdpo import TDPOLoss
from everytoken.preference.tgdpo import TGDPOLoss

from ..conftest import tiny_llama
from .test_trainer import ROWS, first_batch, make


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Columns of these tests are kept in a folder of their own."""
    monkeypatch.setattr("everytoken.core.converted.cache_dir", lambda: tmp_path / "cache")


def guide():
    return tiny_llama(49152, seed=7, eos=2)


def test_contract():
    assert isinstance(ModelLogps(tiny_llama()), TokenAnnotator)


@pytest.mark.parametrize("changes", [{}, {"max_length": 9}, {"max_length": 9, "truncation_mode": "keep_end"}], ids=str)
def test_the_batch_carries_the_guides_values_at_their_tokens(tmp_path, embedded_tokenizer, changes):
    trainer = make(tmp_path, embedded_tokenizer, TGDPOLoss(), annotators=[ModelLogps(guide())], **changes)
    batch = first_batch(trainer)
    values, mask = batch["column/guide_logps"], batch["completion_mask"].bool()
    assert values.shape == batch["input_ids"].shape
    assert not values[~mask].any()
    policy, _ = trainer.score_pairs(trainer.model, batch)
    sides = torch.cat([policy.chosen["guide_logps"], policy.rejected["guide_logps"]])
    if "truncation_mode" not in changes:  # a response keeps its whole context: the model itself says the same
        expected = response_logps(guide(), batch["input_ids"], mask, batch["attention_mask"])
        assert torch.allclose(values, expected, atol=1e-4)
        assert torch.allclose(sides, expected[:, 1:], atol=1e-4)
    else:  # cut at the start: the values are those of the last tokens
        rows = trainer.train_dataset
        row = next(r for r in rows if r["chosen_ids"][-3:] == batch["input_ids"][0][mask[0]].tolist()[-3:])
        assert torch.allclose(values[0][mask[0]][-3:], torch.tensor(row["chosen_guide_logps"])[-3:])


def test_values_are_kept_and_used_again(tmp_path, embedded_tokenizer):
    calls = []

    class Counted(ModelLogps):
        def annotate(self, examples, report=lambda *_: None):
            calls.append(len(examples))
            return super().annotate(examples, report)

    one = make(tmp_path, embedded_tokenizer, TGDPOLoss(), annotators=[Counted(guide())])
    two = make(tmp_path, embedded_tokenizer, TGDPOLoss(), annotators=[Counted(guide())])
    assert calls == [2 * len(ROWS)]
    assert one.train_dataset["chosen_guide_logps"] == two.train_dataset["chosen_guide_logps"]
    make(tmp_path, embedded_tokenizer, TGDPOLoss(), annotators=[Counted(tiny_llama(49152, seed=8, eos=2))])
    assert len(calls) == 2  # another guide
    (kept, *_) = (tmp_path / "cache" / "columns").glob("*.safetensors")
    kept.write_bytes(b"broken")
    for path in (tmp_path / "cache" / "columns").glob("*.safetensors"):
        path.write_bytes(b"broken")
    make(tmp_path, embedded_tokenizer, TGDPOLoss(), annotators=[Counted(guide())])
    assert len(calls) == 3  # a damaged file is computed again


def test_a_dataset_with_columns_needs_no_guide(tmp_path, embedded_tokenizer):
    made = make(tmp_path, embedded_tokenizer, TGDPOLoss(), annotators=[ModelLogps(guide())])
    path = tmp_path / "rows"
    made.train_dataset.save_to_disk(path)
    again = make(tmp_path, embedded_tokenizer, TGDPOLoss(), rows=datasets.load_from_disk(path))
    losses = [trainer.compute_loss(trainer.model, first_batch(trainer)).item() for trainer in (made, again)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_missing_short_and_broken_columns_are_named(tmp_path, embedded_tokenizer):
    with pytest.raises(BadInputError, match="chosen_guide_logps"):
        make(tmp_path, embedded_tokenizer, TGDPOLoss())
    made = make(tmp_path, embedded_tokenizer, TGDPOLoss(), annotators=[ModelLogps(guide())])
    rows = made.train_dataset.to_list()
    rows[2]["rejected_guide_logps"].pop()
    with pytest.raises(BadInputError, match="Row 2: rejected_guide_logps holds"):
        make(tmp_path, embedded_tokenizer, TGDPOLoss(), rows=datasets.Dataset.from_list(rows))
    rows = made.train_dataset.to_list()
    rows[1]["chosen_guide_logps"][0] = float("nan")
    with pytest.raises(BadInputError, match="Row 1: chosen_guide_logps"):
        make(tmp_path, embedded_tokenizer, TGDPOLoss(), rows=datasets.Dataset.from_list(rows))
    with pytest.raises(TokenizerMismatchError, match="guide for guide_logps"):
        make(tmp_path, embedded_tokenizer, TGDPOLoss(), annotators=[ModelLogps(tiny_llama(100))])
    with pytest.raises(BadInputError, match="not tokenized"):
        precompute(datasets.Dataset.from_list(ROWS), [ModelLogps(guide())])
    with pytest.raises(BadInputError, match="streaming"):
        precompute(datasets.Dataset.from_list(ROWS).to_iterable_dataset(), [ModelLogps(guide())])


@pytest.mark.parametrize("loss", [DPOLoss(0.1), TGDPOLoss()], ids=["dpo", "tgdpo"])
def test_a_precomputed_reference_gives_the_same_loss_and_gradient(tmp_path, embedded_tokenizer, loss):
    found = []
    for precomputed in (False, True):
        trainer = make(
            tmp_path,
            embedded_tokenizer,
            copy.copy(loss),
            annotators=[ModelLogps(guide())],
            precompute_ref_log_probs=precomputed,
        )
        if precomputed:
            trainer.ref_model = None  # it is not asked again
        value = trainer.compute_loss(trainer.model, first_batch(trainer))
        value.backward()
        found.append((value.item(), torch.cat([w.grad.flatten() for w in trainer.model.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)


def test_a_loss_that_needs_distributions_refuses_a_precomputed_reference(tmp_path, embedded_tokenizer):
    with pytest.raises(BadInputError, match="forward_kl"):
        make(tmp_path, embedded_tokenizer, TDPOLoss(), precompute_ref_log_probs=True)


@pytest.mark.slow
def test_every_loss_trains_on_its_annotator(tmp_path, embedded_tokenizer):
    negative = tiny_llama(49152, seed=9, eos=2)
    work = [
        (TGDPOLoss(), ModelLogps(guide())),
        (CDPOLoss(), ContrastiveEstimator(guide(), negative)),
        (TREGLoss(), ContrastivePromptRewards(guide(), embedded_tokenizer)),
    ]
    for loss, annotator in work:
        trainer = make(tmp_path, embedded_tokenizer, loss, annotators=[annotator], max_steps=6, learning_rate=3e-3)
        trainer.train()
        margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
        assert margins[-1] > margins[0], type(loss).__name__


def test_kl_can_be_watched_without_being_needed(tmp_path, embedded_tokenizer):
    plain = make(tmp_path, embedded_tokenizer, DPOLoss(0.1))
    watched = make(tmp_path, embedded_tokenizer, DPOLoss(0.1), monitor_kl=True)
    losses = [trainer.compute_loss(trainer.model, first_batch(trainer)).item() for trainer in (plain, watched)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert watched._metrics["train"]["kl/chosen"][-1] > 0
    assert "kl/chosen" not in plain._metrics["train"]


def test_other_columns_of_the_users_do_no_harm(tmp_path, embedded_tokenizer):
    rows = [
        row | {"chosen_rating": 5.0, "rejected_rating": 1.0, "chosen_tags": ["a"], "rejected_tags": []} for row in ROWS
    ]
    trainer = make(tmp_path, embedded_tokenizer, DPOLoss(0.1), rows=rows, remove_unused_columns=False)
    assert not [name for name in first_batch(trainer) if name.startswith("column/")]


def test_what_a_loss_declares_is_checked():
    from everytoken.preference.base import declared

    assert declared(DPOLoss()).data_columns == {}
    assert set(declared(TGDPOLoss).data_columns) == {"guide_logps"}
    assert declared(TDPOLoss()).needs == {"forward_kl"}
    for attributes, message in (
        ({"needs": {"kl"}}, "'kl', which is not computed"),
        ({"data_columns": {"entropy": None}}, "names a statistic"),
        ({"data_columns": frozenset({"a"})}, "must map each column"),
        ({"columns": frozenset({"guide_logps"})}, "called data_columns now"),
    ):
        with pytest.raises(BadInputError, match=message):
            declared(type("Loss", (DPOLoss,), attributes))


def test_a_side_that_is_missing_is_made_and_the_other_is_kept(tmp_path, embedded_tokenizer):
    made = make(tmp_path, embedded_tokenizer, TGDPOLoss(), annotators=[ModelLogps(guide())]).train_dataset
    other = [[0.5] * len(ids) for ids in made["chosen_ids"]]
    half = made.remove_columns(["chosen_guide_logps", "rejected_guide_logps"]).add_column("chosen_guide_logps", other)
    again = precompute(half, [ModelLogps(guide())])
    assert again["chosen_guide_logps"][:] == other
    assert again["rejected_guide_logps"][:] == made["rejected_guide_logps"][:]
