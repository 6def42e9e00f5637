"""Latents that are read, a training and what it writes, and nats by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from everytoken.architectures.images.data import digit_images
from everytoken.architectures.images.tokenizers import load_image_tokenizer, save_latents
from everytoken.architectures.tokenbridge.latents import file_latents, flat, load_kl, shifts, unflat
from everytoken.architectures.tokenbridge.method import TokenBridge, images_of, tiny_config
from everytoken.architectures.tokenbridge.modeling_tokenbridge import TokenBridgeModel
from everytoken.architectures.tokenbridge.training import TRAINING, TokenBridgeTraining, nats_of
from everytoken.core.errors import BadInputError, TokenizerMismatchError
from everytoken.training.base import TrainingContext, read_config

SMALL = {"batch": 4, "width": 16, "head_width": 16, "layers": 1, "decoder_layers": 1, "head_layers": 1}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A file of the latents of forty digits."""
    images, labels = digit_images(16)
    tokenizer = load_image_tokenizer("digits-kl")
    path = tmp_path_factory.mktemp("latents") / "digits.safetensors"
    save_latents(path, tokenizer.encode(images[:40]), labels[:40], tokenizer.identity)
    return path


def test_latents_of_a_file_by_token(latents):
    data = file_latents(latents)
    assert data.known.shape == (36, 16, 8) and data.held.shape == (4, 16, 8) and data.classes == 10
    images, labels = digit_images(16)
    grid = data.tokenizer.encode(images[:1])
    assert torch.allclose(data.held[0, 4 * 1 + 2], grid[0, :, 1, 2], atol=1e-6)  # row 1, column 2
    assert torch.equal(unflat(flat(grid), data.grid), grid)
    assert data.held_labels.tolist() == labels[:40:10].tolist()
    first, again = data.batch(5, 0, 3), data.batch(5, 0, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_latents_that_are_refused(latents, tmp_path):
    with pytest.raises(BadInputError, match="no file"):
        file_latents(tmp_path / "none.safetensors")
    with pytest.raises(BadInputError, match="codebook"):
        load_kl("digits-vq")
    other = tmp_path / "other.safetensors"
    save_latents(other, torch.zeros(20, 8, 4, 4), torch.zeros(20), "0123456789abcdef")
    with pytest.raises(TokenizerMismatchError):
        file_latents(other)
    identity = load_kl("digits-kl").identity
    for shape in ((20, 8, 2, 8), (4, 8, 4, 4)):
        save_latents(other, torch.zeros(shape), torch.zeros(shape[0]), identity)
        with pytest.raises(BadInputError, match="latents"):
            file_latents(other)


def test_images_are_decoded_by_their_own_autoencoder_only():
    config = tiny_config(rows=4, columns=4, channels=8, channel_order=None)
    config.tokenizer, config.tokenizer_identity = "digits-kl", load_kl("digits-kl").identity
    assert images_of(config, torch.zeros(2, 16, 8)).shape == (2, 1, 16, 16)
    config.tokenizer_identity = "0123456789abcdef"
    with pytest.raises(TokenizerMismatchError):
        images_of(config, torch.zeros(2, 16, 8))


def test_images_move_by_a_pixel():
    image = torch.full((1, 1, 4, 4), -1.0)
    image[0, 0, 1, 2] = 1
    moved = shifts(image)
    assert moved.shape == (9, 1, 4, 4) and torch.equal(moved[0], image[0])
    places = {tuple(item.nonzero()[0, 1:].tolist()) for item in (moved > 0)}
    assert places == {(row, column) for row in (0, 1, 2) for column in (1, 2, 3)}


def test_nats_are_those_of_the_head():
    torch.manual_seed(0)
    model = TokenBridgeModel(tiny_config()).eval()
    z, labels = torch.randn(3, 9, 2), torch.tensor([0, 1, 2])
    found = nats_of(model, z, labels, shares=(1.0,))
    output = model(z, class_labels=labels, known=torch.empty(3, 0, dtype=torch.long))
    wanted = -model.head.log_prob(output.vectors, model.quantizer.encode(z)).sum(-1).mean(-1)
    assert torch.allclose(found, wanted, atol=1e-5) and found.shape == (3,)
    with pytest.raises(BadInputError, match="probabilities"):
        nats_of(TokenBridgeModel(tiny_config(head="continuous")), z, labels)


@pytest.mark.slow
def test_a_training_writes_what_can_be_loaded(latents, tmp_path):
    config = TokenBridgeTraining(steps=3, **SMALL)
    result = TRAINING.run(config, TrainingContext(None, str(latents), tmp_path))
    assert 0 < result.figures["nats a token"] < 40 and result.figures["squared error of the bins"] < 0.01
    model = TokenBridge.load(str(tmp_path / "model"))
    assert model.config.tokenizer_identity == load_kl("digits-kl").identity
    assert sorted(model.config.channel_order) == list(range(8))
    assert "A picture as it grows" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "training.json").read_text())["settings"]["steps"] == 3


def test_orders_of_channels(latents):
    data = file_latents(latents)
    spectral, backwards = (TokenBridgeTraining(order=name).config(data) for name in ("spectral", "reversed"))
    assert spectral.channel_order == backwards.channel_order[::-1]
    assert TokenBridgeTraining(order="raw").config(data).channel_order == list(range(8))
    assert spectral.latent_scale == pytest.approx(1 / float(data.known.square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"bins": 1}, {"bins": 1000}, {"head": "dense"}, {"order": "random"}, {"steps": 0}, {"width": 10}, {"lr": -1.0}],
)
def test_settings_that_cannot_be(settings):
    with pytest.raises(BadInputError):
        TokenBridgeTraining(**settings)


def test_the_preset_can_be_read():
    assert read_config(TRAINING, Path("configs/train/tokenbridge-h100.yaml"), ["steps=5"]).width == 384


def test_it_begins_from_scratch(tmp_path):
    with pytest.raises(BadInputError, match="scratch"):
        TRAINING.run(TokenBridgeTraining(), TrainingContext("somewhere", None, tmp_path))
