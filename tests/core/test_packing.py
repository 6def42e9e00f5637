"""Packed linear layers: the same numbers, gradients untouched, changed weights noticed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from everytoken.core.packing import can_pack, pack_linears, unpack_linears

from ..conftest import tiny_llama

pytestmark = pytest.mark.skipif(not can_pack(), reason="this torch has no packed linear layers")


def test_a_precision_that_the_processor_cannot_pack_is_left_alone():
    layer = pack_linears(nn.Linear(4, 3).to(torch.float16))
    assert not hasattr(layer, "_packed") and not can_pack(torch.float16)
    layer = pack_linears(nn.Linear(4, 3).to(torch.bfloat16))
    assert hasattr(layer, "_packed") == can_pack(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_same_numbers(dtype, rows, bias):
    torch.manual_seed(0)
    plain = nn.Linear(48, 33, bias=bias).to(dtype).eval()
    packed = pack_linears(copy.deepcopy(plain))
    x = torch.randn(2, rows, 48, dtype=dtype)
    with torch.no_grad():
        assert torch.allclose(packed(x), plain(x), atol=1e-5 if dtype == torch.float32 else 5e-2)


def test_a_whole_model_and_back():
    model = tiny_llama(23)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.allclose(pack_linears(model)(ids).logits, expected, atol=1e-5)
    assert set(model.state_dict()) == set(tiny_llama(23).state_dict())
    text = model.generate(ids, max_new_tokens=20, do_sample=False)
    unpack_linears(model)
    assert not any(hasattr(module, "_packed") for module in model.modules())
    assert text.tolist() == model.generate(ids, max_new_tokens=20, do_sample=False).tolist()


def test_copies_are_independent():
    import pickle

    layer = pack_linears(nn.Linear(8, 8)).eval()
    x = torch.randn(3, 8)
    with torch.no_grad():
        layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            other.weight.zero_()
            assert torch.allclose(other(x), other.bias.expand(3, -1), atol=1e-6)
        assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, 0.1),
        lambda parameters: torch.optim.AdamW(parameters, 0.1, fused=True),
        lambda parameters: torch.optim.AdamW(parameters, 0.1, foreach=True),
    ],
    ids=["sgd", "fused", "foreach"],
)
def test_training_uses_and_changes_the_real_weights(make, training):
    torch.manual_seed(0)
    layer = pack_linears(nn.Linear(8, 8)).eval()
    x = torch.randn(3, 8)
    with torch.no_grad():
        before = layer(x)
    optimizer = make(layer.parameters())
    for _ in range(3):
        layer.train(training)
        layer(x).sum().backward()
        assert layer.weight.grad is not None
        optimizer.step()
        layer.eval()
        with torch.no_grad():
            assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)
    with torch.no_grad():
        after = layer(x)
        assert torch.allclose(after, nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)
    assert not torch.allclose(before, after)
