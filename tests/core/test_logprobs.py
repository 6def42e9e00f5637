"""Chunked statistics against the naive form: values, gradients, reductions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everytoken.core import logprobs
from everytoken.core.logprobs import (
    entropy_from_logits,
    kl_from_logits,
    logps_from_logits,
    masked_mean,
    masked_sum,
    token_stats,
)

FLAGS = dict(entropy=True, forward_kl=True, reverse_kl=True)


def problem(n=7, d=5, v=11, seed=0, bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    inputs = dict(hidden=normal(n, d), weight=normal(v, d), ref_hidden=normal(n, d), ref_weight=normal(v, d))
    if bias:
        inputs |= dict(bias=normal(v), ref_bias=normal(v))
    return inputs, torch.randint(0, v, (n,), generator=generator), normal(4, n)


def naive(inputs, labels):
    log_p = torch.log_softmax(inputs["hidden"] @ inputs["weight"].T + inputs.get("bias", 0), -1)
    log_q = torch.log_softmax(inputs["ref_hidden"] @ inputs["ref_weight"].T + inputs.get("ref_bias", 0), -1).detach()
    p, q = log_p.exp(), log_q.exp()
    pick = torch.arange(len(labels))
    return (
        log_p[pick, labels],
        -(p * log_p).sum(-1),
        (q * (log_q - log_p)).sum(-1),
        (p * (log_p - log_q)).sum(-1),
        log_q[pick, labels],
    )


@given(n=st.integers(0, 9), chunk=st.integers(1, 12), bias=st.booleans(), seed=st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_values_and_gradients_equal_the_naive_form(n, chunk, bias, seed):
    inputs, labels, mix = problem(n=n, seed=seed, bias=bias, dtype=torch.float32)
    names = ["hidden", "weight"] + (["bias"] if bias else [])
    for name in names:
        inputs[name].requires_grad_(True)
    stats = token_stats(**inputs, labels=labels, chunk_size=chunk, **FLAGS)
    ours = (stats.logps, stats.entropy, stats.forward_kl, stats.reverse_kl)
    theirs = naive(inputs, labels)
    for one, other in zip(ours, theirs, strict=False):
        assert torch.allclose(one, other, atol=2e-5)
    assert torch.allclose(stats.ref_logps, theirs[4], atol=2e-5)
    if n == 0:
        return
    grads = [
        torch.autograd.grad(
            sum((m * o).sum() for m, o in zip(mix, outputs[:4], strict=True)), [inputs[x] for x in names]
        )
        for outputs in (ours, theirs)
    ]
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("wanted", [{}, dict(entropy=True), dict(forward_kl=True), dict(reverse_kl=True)])
def test_only_what_is_asked_for(wanted):
    inputs, labels, _ = problem(dtype=torch.float32)
    inputs["hidden"].requires_grad_(True)
    stats = token_stats(**inputs, labels=labels, **wanted)
    for name in FLAGS:
        assert (getattr(stats, name) is not None) == (name in wanted)
    total = sum(getattr(stats, name).sum() for name in ("logps", *wanted))
    total.backward()
    assert inputs["hidden"].grad.abs().sum() > 0


@pytest.mark.parametrize("waits", [True, False], ids=["as on a CPU", "as on a GPU"])
def test_partial_gradients_skip_tokens_but_not_values(waits, monkeypatch):
    """Half the KLs without gradient (as TDPO2 does): equal to the naive form, also where no value may be asked for."""
    monkeypatch.setattr(logprobs, "_can_wait", lambda device: waits)
    inputs, labels, _ = problem(n=8, dtype=torch.float32)
    inputs["hidden"].requires_grad_(True)
    weights = torch.tensor([0.0, 1, 0, 2, 0, 0, 3, 0])
    (ours,) = torch.autograd.grad(
        (weights * token_stats(**inputs, labels=labels, forward_kl=True, chunk_size=3).forward_kl).sum(),
        inputs["hidden"],
    )
    (theirs,) = torch.autograd.grad((weights * naive(inputs, labels)[2]).sum(), inputs["hidden"])
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_chunked_equals_unchunked():
    inputs, labels, _ = problem(n=40, v=101, dtype=torch.float32)
    whole = token_stats(**inputs, labels=labels, chunk_size=40, **FLAGS)
    parts = token_stats(**inputs, labels=labels, chunk_size=7, **FLAGS)
    for name in ("logps", "ref_logps", *FLAGS):
        assert torch.allclose(getattr(whole, name), getattr(parts, name), atol=1e-6)


def test_low_precision_inputs_accumulate_in_float32():
    inputs, labels, _ = problem(n=6, d=32, v=1000, dtype=torch.float32)
    low = {name: value.bfloat16() for name, value in inputs.items()}
    stats = token_stats(**low, labels=labels, **FLAGS)
    assert stats.logps.dtype == torch.float32
    exact = naive({name: value.double() for name, value in low.items()}, labels)
    assert torch.allclose(stats.logps.double(), exact[0], atol=0.15)


def test_peak_memory_stays_at_one_chunk(monkeypatch):
    """No tensor as large as the full logits is ever made, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            output = function(*args, **(kwargs or {}))
            for item in output if isinstance(output, (tuple, list)) else (output,):
                if isinstance(item, torch.Tensor):
                    largest = max(largest, item.numel())
            return output

    inputs, labels, _ = problem(n=512, d=8, v=999, dtype=torch.float32)
    inputs["hidden"].requires_grad_(True)
    inputs["weight"].requires_grad_(True)
    with Watch():
        stats = token_stats(**inputs, labels=labels, chunk_size=16, **FLAGS)
        (stats.logps.sum() + stats.forward_kl.sum()).backward()
    assert largest <= 16 * 999


def test_a_head_of_another_type_is_cast_once_a_pass():
    from torch.utils._python_dispatch import TorchDispatchMode

    casts = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].shape == (101, 8):
                casts.append((kwargs or {}).get("dtype"))
            return function(*args, **(kwargs or {}))

    inputs, labels, _ = problem(n=40, d=8, v=101, dtype=torch.float32)
    inputs["hidden"].requires_grad_(True)
    with Watch():
        with torch.autocast("cpu", torch.bfloat16):
            stats = token_stats(**inputs, labels=labels, chunk_size=4, **FLAGS)
        forward = len(casts)
        stats.forward_kl.sum().backward()
    assert casts.count(torch.bfloat16) == len(casts)
    assert (forward, len(casts)) == (2, 4)  # policy and reference, of ten chunks


def test_a_chunk_on_a_gpu_follows_its_free_memory(monkeypatch):
    device = torch.device("cuda")
    for name, value in (("memory_reserved", 3 * 2**30), ("memory_allocated", 2**30)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    for free, size in ((0, 128 * 2**20), (100 * 2**30, logprobs.GPU_CHUNK_BYTES), (-(2**31), logprobs.CHUNK_BYTES)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
        assert logprobs.tokens_per_chunk(1000, device) == size // 4000
    assert logprobs.tokens_per_chunk(1000, torch.device("cpu")) == logprobs.CHUNK_BYTES // 4000
    assert logprobs.tokens_per_chunk(2**40, device) == 1


def test_from_logits(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 4 * 13 * 2)  # two rows a chunk
    torch.manual_seed(0)
    p, q = torch.randn(3, 5, 13, requires_grad=True), torch.randn(3, 5, 13)
    labels = torch.randint(0, 13, (3, 5))
    log_p = torch.log_softmax(p, -1)
    pairs = [
        (logps_from_logits(p, labels), log_p.gather(-1, labels[..., None])[..., 0]),
        (entropy_from_logits(p), -(log_p.exp() * log_p).sum(-1)),
        (kl_from_logits(p, q), (log_p.exp() * (log_p - torch.log_softmax(q, -1))).sum(-1)),
        (kl_from_logits(q, p), (torch.softmax(q, -1) * (torch.log_softmax(q, -1) - log_p)).sum(-1)),
    ]
    for ours, theirs in pairs:
        assert torch.allclose(ours, theirs, atol=1e-6)
        assert torch.allclose(
            *[torch.autograd.grad(x.square().sum(), p, retain_graph=True)[0] for x in (ours, theirs)], atol=1e-5
        )


def test_masked_vocabulary_gives_no_nan():
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert torch.isfinite(entropy_from_logits(logits)).all()
    assert kl_from_logits(logits, torch.zeros(1, 3)).item() == pytest.approx(
        sum(p * torch.log(torch.tensor(3 * p)).item() for p in torch.softmax(torch.tensor([0.0, 1.0]), 0).tolist()),
        abs=1e-6,
    )


@given(st.integers(1, 5), st.integers(0, 6), st.integers(0, 99))
@settings(deadline=None)
def test_masked_reductions(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    spoilt = values.masked_fill(~mask, torch.nan)
    sums = [
        sum(v for v, m in zip(row, keep, strict=True) if m)
        for row, keep in zip(values.tolist(), mask.tolist(), strict=True)
    ]
    assert masked_sum(spoilt, mask).tolist() == pytest.approx(sums, abs=1e-5)
    assert masked_sum(spoilt, mask, None).item() == pytest.approx(sum(sums), abs=1e-5)
    counts = mask.sum(1).tolist()
    means = [s / c if c else 0.0 for s, c in zip(sums, counts, strict=True)]
    assert masked_mean(spoilt, mask).tolist() == pytest.approx(means, abs=1e-5)
    total = sum(counts)
    assert masked_mean(spoilt, mask, None).item() == pytest.approx(sum(sums) / total if total else 0.0, abs=1e-5)


def test_errors():
    inputs, labels, _ = problem(dtype=torch.float32)
    with pytest.raises(ValueError, match="KL needs"):
        token_stats(inputs["hidden"], inputs["weight"], labels, forward_kl=True)
    with pytest.raises(ValueError, match="labels"):
        token_stats(inputs["hidden"][:3], inputs["weight"], labels)
    with pytest.raises(ValueError, match="one vocabulary"):
        token_stats(
            inputs["hidden"], inputs["weight"], labels, ref_hidden=inputs["hidden"], ref_weight=inputs["weight"][:4]
        )
