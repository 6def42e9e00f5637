"""The scan against a loop over tokens, in value and gradient; and inside transformers' models."""

from __future__ import annotations

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from everytoken.architectures.scan import fast_scan, linear_recurrence, selective_scan
from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.testing.models import tiny_llama


def inputs(rows=2, length=5, channels=3, n=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    u, delta = draw(rows, length, channels), torch.nn.functional.softplus(draw(rows, length, channels))
    return [u, delta, -torch.exp(draw(channels, n)), draw(rows, length, n), draw(rows, length, n), draw(channels)]


def loop(u, delta, A, B, C, D=None, start=None):
    """The recurrence token by token."""
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1]) if start is None else start
    found = []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        found.append((h * C[:, t, None, :]).sum(-1))
    y = torch.stack(found, 1)
    return (y if D is None else y + D * u), h


WAYS = [
    ("associative", torch.float64, 1e-10),
    ("associative", torch.float32, 1e-5),
    ("compiled", torch.float32, 1e-5),
    pytest.param("compiled", torch.float64, 1e-10, marks=pytest.mark.slow),  # numba compiles it for this test alone
]


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), WAYS)
def test_it_is_the_loop(backend, dtype, tolerance):
    for shape in [(1, 1, 1, 1), (2, 2, 3, 4), (3, 17, 5, 2), (1, 33, 70, 3), (2, 48, 130, 8)]:
        given = inputs(*shape, dtype=dtype)
        start = torch.randn(shape[0], shape[2], shape[3], dtype=dtype)
        y, state = selective_scan(*given, initial_state=start, return_state=True, backend=backend)
        wanted, last = loop(*given, start)
        assert torch.allclose(y, wanted, atol=tolerance * max(1.0, float(wanted.abs().max())))
        assert torch.allclose(state, last, atol=tolerance * max(1.0, float(last.abs().max())))
        assert torch.allclose(selective_scan(*given, backend=backend), loop(*given)[0], atol=40 * tolerance)


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), WAYS)
def test_gradients_are_those_of_the_loop(backend, dtype, tolerance):
    """Of everything, the first and the last state too; over several blocks of channels."""
    for length in (1, 16, 19):
        given = [item.requires_grad_() for item in inputs(2, length, 67, 2, dtype=dtype)]
        start = torch.randn(2, 67, 2, dtype=dtype, requires_grad=True)
        weights, for_state = torch.randn(2, length, 67, dtype=dtype), torch.randn(2, 67, 2, dtype=dtype)
        found = []
        for y, state in (
            selective_scan(*given, initial_state=start, return_state=True, backend=backend),
            loop(*given, start),
        ):
            total = (y * weights).sum() + (state * for_state).sum()
            found.append(torch.autograd.grad(total, [*given, start]))
        for ours, theirs in zip(*found, strict=True):
            assert torch.allclose(ours, theirs, atol=tolerance * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("backend", ["associative", pytest.param("compiled", marks=pytest.mark.slow)])
def test_gradcheck(backend):
    given = [item.requires_grad_() for item in inputs(1, 4, 2, 2)]
    assert torch.autograd.gradcheck(lambda *items: selective_scan(*items, backend=backend), given)


def test_pairs_combine_associatively():
    a, b = torch.rand(1, 9, dtype=torch.float64), torch.randn(1, 9, dtype=torch.float64)
    found, h = linear_recurrence(a, b), torch.zeros(1, dtype=torch.float64)
    for t in range(9):
        h = a[:, t] * h + b[:, t]
        assert torch.allclose(found[:, t], h)


def test_constant_steps_are_a_convolution():
    """With B, C and delta constant the scan is a linear filter with the kernel C exp(delta A)^i delta B."""
    u = torch.randn(1, 12, 1, dtype=torch.float64)
    A, B, C = -torch.rand(1, 3).double(), torch.randn(3).double(), torch.randn(3).double()
    delta, ones = 0.3, torch.ones(1, 12, 1, dtype=torch.float64)
    y = selective_scan(u, delta * ones, A, B * ones, C * ones, backend="associative")
    kernel = torch.stack([(C * torch.exp(delta * A[0]) ** i * delta * B).sum() for i in range(12)])
    wanted = torch.stack([(kernel[: t + 1].flip(0) * u[0, : t + 1, 0]).sum() for t in range(12)])
    assert torch.allclose(y[0, :, 0], wanted)


def test_half_precision_is_computed_in_float32():
    given = inputs(dtype=torch.float32)
    half = [item.bfloat16() for item in given]
    y = selective_scan(*half)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, selective_scan(*(item.float() for item in half)).bfloat16())


def test_several_threads_do_what_one_does():
    given, before = inputs(3, 20, 130, 4, torch.float32), torch.get_num_threads()
    one = selective_scan(*given)
    try:
        torch.set_num_threads(3)
        assert torch.equal(selective_scan(*given), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"backend": "magic"}, "backend"),
        ({"D": torch.zeros(9)}, "D must have the shape"),
        ({"u": torch.zeros(2, 0, 3)}, "none empty"),
        ({"B": torch.zeros(2, 5, 9)}, "B must have the shape"),
        ({"A": torch.ones(3, 4)}, "not be positive"),
    ],
)
def test_what_does_not_fit_is_refused(change, match):
    given = dict(zip(("u", "delta", "A", "B", "C", "D"), inputs(dtype=torch.float32), strict=True)) | change
    with pytest.raises(BadInputError, match=match):
        selective_scan(**given)


def tiny_mamba():
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    return MambaForCausalLM(config).eval()


def test_transformers_mamba_scans_by_it_and_is_the_same_model():
    model, ids = tiny_mamba(), torch.randint(3, 20, (2, 21))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    plain = model(ids, attention_mask=mask, labels=ids)
    wanted = torch.autograd.grad(plain.loss, list(model.parameters()))
    text = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    before = set(model.backbone.layers[0].mixer.__dict__)
    with fast_scan(model):
        fast = model(ids, attention_mask=mask, labels=ids)
        found = torch.autograd.grad(fast.loss, list(model.parameters()))
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), text)
    assert torch.allclose(fast.logits, plain.logits, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))
    assert set(model.backbone.layers[0].mixer.__dict__) == before


def test_a_model_without_a_scan_is_refused():
    with pytest.raises(UnsupportedModelError, match="no layer that scans"), fast_scan(tiny_llama()):
        pass
