"""Embeddings of new tokens: the mean of the pieces, the hypernetwork, its files."""

from __future__ import annotations

import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.tokenization.hyper import HyperConfig, HyperEmbedding, MeanEmbedding

from ..conftest import tiny_llama
from .common import byte_level, hyper_for, model_for


def test_an_untrained_hypernetwork_is_the_mean_of_the_pieces():
    model = model_for(byte_level())
    pieces = [(3, 4), (5, 6, 7), (8,), (9, 9, 9, 9, 9, 9, 9)]
    for mine, mean in zip(
        hyper_for(model, trained=False).embed(pieces), MeanEmbedding(model).embed(pieces), strict=True
    ):
        assert torch.allclose(mine, mean, atol=1e-5)
    weight = model.get_input_embeddings().weight
    assert torch.allclose(MeanEmbedding(model).embed(pieces)[0][1], weight[[5, 6, 7]].mean(0), atol=1e-6)


def test_padding_and_company_change_nothing():
    model = model_for(byte_level())
    hyper = hyper_for(model)
    alone = hyper.embed([(3, 4)])[0][0]
    together = hyper.embed([(3, 4), (5, 6, 7, 8, 9)])[0][0]
    assert torch.allclose(alone, together, atol=1e-5)
    assert not torch.allclose(alone, hyper.embed([(4, 3)])[0][0], atol=1e-3)  # order matters


def test_gradients_reach_every_weight():
    model = model_for(byte_level())
    hyper = hyper_for(model).train()
    first, second = hyper.apply_to([(3, 4), (5, 6, 7, 8)])
    (first.square().sum() + second.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in hyper.parameters())


def test_saved_and_loaded(tmp_path):
    model = model_for(byte_level())
    hyper = hyper_for(model)
    hyper.save_pretrained(tmp_path)
    again = HyperEmbedding.from_pretrained(tmp_path).attach(model)
    assert torch.allclose(again.embed([(3, 4)])[0], hyper.embed([(3, 4)])[0], atol=1e-2)  # half precision
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    for folder, message in ((tmp_path, "cannot be read"), ("nowhere", "no hypernetwork")):
        with pytest.raises(BadInputError, match=message):
            HyperEmbedding.from_pretrained(folder)
    with pytest.raises(BadInputError, match="embeddings of width"):
        hyper.attach(tiny_llama(50))


def test_bad_input():
    mean = MeanEmbedding(model_for(byte_level()))
    with pytest.raises(BadInputError, match="without pieces"):
        mean.embed([()])
    with pytest.raises(BadInputError, match="attached"):
        HyperEmbedding(HyperConfig(16)).embed([(1, 2)])
