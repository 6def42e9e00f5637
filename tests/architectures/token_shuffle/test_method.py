"""Texts, codes, training and the trial of Token-Shuffle's digits."""

from __future__ import annotations

import pytest
import torch

from everytoken.architectures.images.data import digit_images, digit_split
from everytoken.architectures.images.metrics import image_scores
from everytoken.architectures.token_shuffle.digits import (
    BOI,
    EOI,
    FIRST_STROKE,
    FIRST_WORD,
    PAD,
    STROKES,
    TEXT,
    WORDS,
    codes_of,
    held_rows,
    image_codes,
    image_rows,
    ink,
    learned_rows,
    strokes_of,
    text_ids,
    text_tokenizer,
    words_for,
)
from everytoken.architectures.token_shuffle.method import TokenShuffleMethod
from everytoken.architectures.token_shuffle.training import TokenShuffleTraining, draw, image_nats, run
from everytoken.core.errors import BadInputError, TokenizerMismatchError
from everytoken.training.base import TrainingContext

TINY = {"steps": 2, "batch": 4, "width": 16, "layers": 1, "heads": 2}


# -- codes and texts ---------------------------------------------------------------------------------------------------
def test_levels_lose_nothing():
    images, _ = digit_images()
    codes = image_codes("levels")
    found = codes.encode(images)
    assert found.min() == 0 and found.max() == 16 and torch.equal(codes.decode(found), images)


def test_learned_codes_come_from_their_tokenizer():
    codes = image_codes("digits-vq")
    images = digit_images()[0][:20]
    found = codes.encode(images)
    assert found.shape == (20, *codes.grid) and int(found.min()) >= 0 and int(found.max()) < codes.count
    assert codes.decode(found).shape[0] == 20 and len(codes.identity) == 16
    with pytest.raises(BadInputError, match="codebook"):
        image_codes("digits-kl")


def test_codes_of_another_tokenizer_are_refused():
    model = TokenShuffleMethod.tiny()
    assert codes_of(model.config).name == "levels"
    model.config.image_codes_identity = "0123456789abcdef"
    with pytest.raises(TokenizerMismatchError, match="0123456789abcdef"):
        TokenShuffleMethod(count=1).observe(model, None, "")
    model.config.image_codes = ""
    with pytest.raises(BadInputError, match="stand for"):
        codes_of(model.config)


def test_texts_are_words():
    ids, mask = text_ids(text_tokenizer(), ["seven, thick", "Nine", "", "  two ,thin."])
    assert ids.tolist() == [[11, 16], [0, 13], [0, 0], [6, 14]] and mask.tolist() == [[1, 1], [0, 1], [0, 0], [1, 1]]
    assert [TEXT[item] for item in ids[0].tolist()] == ["seven", "thick"]
    assert words_for(torch.tensor([7, 2])) == ["seven", "two"]
    assert words_for(torch.tensor([7]), torch.tensor([2])) == ["seven, thick"]
    assert text_ids(text_tokenizer(), ["", ""])[0].shape == (2, 0)
    for text in ("eleven", "seven <boi>", "seven <eoi>", "<pad>", "seven, bold"):
        with pytest.raises(BadInputError, match="does not know"):
            text_ids(text_tokenizer(), [text])
    with pytest.raises(BadInputError, match="0 to 9"):
        words_for(torch.tensor([10]))


def test_each_third_of_a_digit_has_its_stroke():
    images, labels = digit_images()
    known = digit_split()[0]
    images, labels = images[known], labels[known]
    strokes = strokes_of(images, labels)
    for label in range(10):
        shares = torch.bincount(strokes[labels == label], minlength=3) / (labels == label).sum()
        assert (shares - 1 / 3).abs().max() < 0.03
        mine = ink(images[labels == label])
        own = strokes[labels == label]
        assert mine[own == 0].max() < mine[own == 1].min() <= mine[own == 1].max() < mine[own == 2].min()


def test_rows_by_hand():
    codes = torch.arange(12).view(3, 2, 2)
    found = image_rows(codes, torch.tensor([7, 7, 7]), torch.tensor([2, 2, 2]), torch.tensor([2, 1, 0]))
    seven, thick, image = FIRST_WORD + 7, FIRST_STROKE + 2, len(TEXT)
    pad, boi, eoi = TEXT.index(PAD), TEXT.index(BOI), TEXT.index(EOI)
    assert found["input_ids"].tolist() == [
        [seven, thick, boi, *range(image, image + 4), eoi],
        [pad, seven, boi, *range(image + 4, image + 8), eoi],
        [pad, pad, boi, *range(image + 8, image + 12), eoi],
    ]
    assert found["attention_mask"].sum(1).tolist() == [8, 7, 6]
    assert (found["labels"] == -100).sum(1).tolist() == [1, 2, 3]  # nothing predicts a row's first token


def test_batches_follow_from_seed_and_step_and_hold_no_held_out_digit():
    codes = image_codes("levels")
    first, again, other = (learned_rows(codes, 64, 0, step) for step in (3, 3, 4))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["input_ids"], other["input_ids"])
    many = learned_rows(codes, 3000, 0, 0)["attention_mask"].sum(1) - 66
    assert abs(float((many == 0).float().mean()) - 0.1) < 0.02 and abs(float((many == 1).float().mean()) - 0.2) < 0.03
    images = digit_images()[0]
    held = set(map(tuple, codes.encode(images[digit_split()[1]]).flatten(1).tolist()))
    learned = set(map(tuple, (learned_rows(codes, 500, 0, 0)["input_ids"][:, 3:-1] - len(TEXT)).tolist()))
    assert not learned & held
    assert held_rows(codes)["input_ids"].shape == (500, 68)


# -- training and trial ------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_training_writes_a_model_and_another_stage_goes_on_from_it(tmp_path):
    result = run(TokenShuffleTraining(window=1, **TINY), TrainingContext(None, None, tmp_path / "one"))
    assert set(result.figures) >= {"nats per token", "class accuracy", "Frechet distance"}
    assert 'type="range"' in (tmp_path / "one" / "report.html").read_text(encoding="utf-8")
    folder = str(tmp_path / "one" / "model")
    config = TokenShuffleTraining(window=2, steps=1, batch=4)
    second = config.begin(image_codes("levels"), folder)
    before = TokenShuffleMethod.load(folder)
    assert second.config.window == [2, 2] and before.config.window == [1, 1]
    for ours, theirs in zip(second.backbone.parameters(), before.backbone.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(BadInputError, match="width is that of"):
        TokenShuffleTraining(window=2, width=32).begin(image_codes("levels"), folder)
    with pytest.raises(BadInputError, match="digits-vq"):
        TokenShuffleTraining(window=2).begin(image_codes("digits-vq"), folder)


@pytest.mark.parametrize("backbone", ["llama", "qwen3", "gpt2"])
def test_every_backbone_of_the_settings_learns_and_draws(backbone):
    codes = image_codes("levels")
    model = TokenShuffleTraining(backbone=backbone, **TINY).begin(codes)
    rows = learned_rows(codes, 4, 0, 0)
    model(**rows).loss.backward()
    assert all(weight.grad is not None for name, weight in model.named_parameters())
    model.eval()
    assert draw(model, torch.tensor([3, 4]), seed=0).shape == (2, 1, 8, 8)
    nats = image_nats(model, held_rows(codes, 3))
    ids = held_rows(codes, 3)["input_ids"]
    loss = model(ids, labels=ids.masked_fill(~model.is_image(ids), -100)).loss
    assert float(nats.mean()) == pytest.approx(float(loss.detach()), rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"empty": 0.9}, {"backbone": "bert"}, {"window": 3}, {"width": 30}, {"blocks": -1}, {"lr": 0.0},
     {"width": 16, "window": 8, "heads": 2}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(BadInputError):
        TokenShuffleTraining(**change)


def test_data_of_ones_own_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="--data"):
        run(TokenShuffleTraining(), TrainingContext(None, "digits.npz", tmp_path))


def test_a_text_or_a_label_asks_for_a_digit():
    model = TokenShuffleMethod.tiny()
    method = TokenShuffleMethod(count=2, seed=3)
    assert method.asked_for("seven, thick") == (7, "thick") and method.asked_for("Two") == (2, None)
    by_text, by_label = method.observe(model, None, "four"), TokenShuffleMethod(4, 2, 3).observe(model, None, "")
    assert by_text.traces[0].ids == by_label.traces[0].ids
    seen = method.observe(model, None, "four, thin")
    trace = seen.traces[0]
    assert trace.columns["window"][:16] == [0, 0, 1, 1, 2, 2, 3, 3] * 2
    assert trace.columns["guidance"][0] == 1.0 and trace.columns["guidance"][-1] == 2.0
    assert seen.figures["windows"] == 16 and seen.figures["positions in the cache"] == 3 + 15
    assert 0 <= seen.figures["right strokes"] <= 1
    for text in ("thick", "seven, eight", "seven, thick, thin", "thick seven", "cat"):
        with pytest.raises(BadInputError):
            method.observe(model, None, text)
    with pytest.raises(BadInputError, match="not from both"):
        TokenShuffleMethod(stroke="thin").observe(model, None, "seven")


@pytest.mark.parametrize(
    "change",
    [{"label": 10}, {"label": -1}, {"stroke": "bold"}, {"guidance": -1.0}, {"schedule": "cosine"}, {"top_p": 2.0},
     {"temperature": 0.0}],
)  # fmt: skip
def test_settings_of_the_trial_are_refused(change):
    with pytest.raises(BadInputError):
        TokenShuffleMethod(**change)


def test_words_and_strokes_are_all_there():
    assert len(WORDS) == 10 and len(set(TEXT)) == len(TEXT) == 17 and TEXT[-3:] == STROKES


@pytest.mark.slow
def test_what_ships_draws_the_digits_that_are_asked_for():
    model = TokenShuffleMethod.load()
    labels = torch.arange(40) % 10
    assert image_scores(draw(model, labels, seed=0, guidance=2.0), labels).accuracy > 0.6
    thick, thin = (
        TokenShuffleMethod(count=20, stroke=stroke).draw(model, labels[:20], 0) for stroke in ("thick", "thin")
    )
    assert float(ink(thick.images).mean()) > float(ink(thin.images).mean()) + 0.03
