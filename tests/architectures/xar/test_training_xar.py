"""``everytoken train xar`` and its trial: files, refusals, and what the trace says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from everytoken.architectures.images.data import digit_images
from everytoken.architectures.images.tokenizers import load_image_tokenizer, save_latents
from everytoken.architectures.xar.method import XAR, images_of
from everytoken.architectures.xar.training import XARTraining, prepared, run
from everytoken.core.errors import BadInputError, TokenizerMismatchError
from everytoken.training.base import TrainingContext

TINY = {"steps": 2, "batch": 4, "width": 16, "layers": 1, "heads": 2, "samples": 4, "draw_steps": 2}


@pytest.mark.slow
def test_a_training_writes_a_network_that_draws(tmp_path):
    result = run(XARTraining(**TINY), TrainingContext(None, None, tmp_path))
    assert set(result.figures) == {"loss", "Frechet distance", "floor", "right digits"}
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["settings"]["tokenizer"] == "digits-kl"
    assert 'type="range"' in (tmp_path / "report.html").read_text(encoding="utf-8")
    model = XAR.load(str(tmp_path / "model"))
    drawn = XAR(steps=2, count=2).draw(model, torch.tensor([3, 3]), 0)
    assert drawn.images.shape == (2, 1, 16, 16) and len(drawn.frames) == 8


def test_latents_of_another_tokenizer_are_refused(tmp_path):
    config, (latents, labels) = prepared(XARTraining(**TINY))
    assert config.grid == [4, 4] and config.channels == 8 and latents.shape[1:] == (8, 4, 4)
    assert float(latents.std()) == pytest.approx(1, abs=0.1)
    path = tmp_path / "latents.safetensors"
    save_latents(path, latents[:4], labels[:4], "0123456789abcdef")
    with pytest.raises(TokenizerMismatchError):
        prepared(XARTraining(**TINY), str(path))
    save_latents(path, latents[:4], labels[:4], config.tokenizer_identity)
    assert torch.equal(prepared(XARTraining(**TINY), str(path))[1][0], latents[:4])
    save_latents(path, latents[:4], labels[:4] + 10, config.tokenizer_identity)
    with pytest.raises(BadInputError, match="Labels"):
        prepared(XARTraining(**TINY), str(path))
    model = XAR.tiny()
    model.config.latent_tokenizer, model.config.tokenizer_identity = "digits-kl", "0123456789abcdef"
    with pytest.raises(TokenizerMismatchError):
        images_of(model, torch.zeros(1, 8, 4, 4))


def test_trainings_that_are_refused(tmp_path):
    context = TrainingContext("somewhere", None, tmp_path)
    with pytest.raises(BadInputError, match="from scratch"):
        run(XARTraining(**TINY), context)
    with pytest.raises(BadInputError, match="codes"):
        prepared(XARTraining(tokenizer="digits-vq"))
    with pytest.raises(BadInputError, match="tokenizer"):
        prepared(XARTraining(tokenizer=None), "latents.safetensors")
    for wrong in ({"steps": 0}, {"entity_size": 3, "tokenizer": None}, {"draw_steps": 0}, {"guidance": -1.0}):
        with pytest.raises(BadInputError):
            XARTraining(**wrong)


def test_pixels_are_learned_as_they_are():
    config, (latents, _) = prepared(XARTraining(tokenizer=None, entity_size=4))
    assert config.grid == [8, 8] and config.entities == 4 and latents.shape == (1297, 1, 8, 8)


def test_a_trial_draws_what_is_asked_for(tmp_path):
    model = XAR.tiny()
    seen = XAR(label=4, steps=3, count=2, picture=str(tmp_path / "four.png")).observe(model, None, "")
    assert "cell 4" in seen.drawing and 'type="range"' in seen.pictures[0] and len(seen.pictures) == 2
    assert (tmp_path / "four.png").read_bytes().startswith(b"\x89PNG")
    trace = seen.traces[0]
    assert trace.title.startswith("4,") and trace.columns["entity"][:4] == [1, 1, 2, 2]
    assert trace.columns["guidance"][0] == pytest.approx(1) and trace.columns["guidance"][-1] == pytest.approx(2.7)
    assert all(1 <= step <= 3 for step in trace.columns["settled after step"])
    assert XAR().observe(model, None, "9").traces[0].title.startswith("9,")
    for text in ("seven", "10", "-1"):
        with pytest.raises(BadInputError, match="names no class"):
            XAR().observe(model, None, text)
    for wrong in ({"label": 10}, {"label": -1}, {"count": 0}, {"steps": 0}, {"sampler": "x"}, {"picture": "a.gif"}):
        with pytest.raises(BadInputError):
            XAR(**wrong)


def test_a_tokenizer_that_ships_gives_digits_back():
    images, _ = digit_images(16)
    for name, worst in (("digits-kl", 2e-3), ("digits-vq", 3e-3)):
        tokenizer = load_image_tokenizer(name)
        again = tokenizer.decode(tokenizer.encode(images[:64]))
        assert float((again - images[:64]).square().mean()) < worst
    assert Path(tokenizer.config.name_or_path).name == "digits-vq"
