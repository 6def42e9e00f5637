"""The selective scan of Mamba, without a loop over tokens in Python.

For every row of a batch, channel e and state j::

    h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t          y_t = <C_t, h_t> + D u_t

There are two ways to compute it. ``"compiled"`` runs on a processor, in one pass forward and one backward, and keeps
one state for every few tokens only. ``"associative"`` runs anywhere and can be differentiated any number of times: the
pairs ``(exp(delta A), delta B u)`` combine by ``(a1, b1) o (a2, b2) = (a1 a2, a2 b1 + b2)``, so that log2 L rounds do.

``fast_scan`` puts it into transformers' own Mamba models.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..core.errors import BadInputError, UnsupportedModelError
from ..core.grouped.team import run_together

BACKENDS = ("auto", "compiled", "associative")


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Any:
    """The scan over R rows of L tokens with E channels and n states.

    Args:
        u: inputs ``[R, L, E]``.
        delta: step sizes ``[R, L, E]``, positive (after the softplus).
        A: ``[E, n]``, not positive.
        B, C: ``[R, L, n]``.
        D: ``[E]``, the weight of the input itself; None leaves it out.
        initial_state: ``[R, E, n]``; None is zero.
        return_state: also return the last state ``[R, E, n]``.
        backend: of ``BACKENDS``; ``"auto"`` is the compiled way on a processor and the associative one elsewhere.

    Returns:
        ``y [R, L, E]`` in the type of ``u``, or ``(y, state)``, computed in float32, or in float64 where ``u`` is.

    Raises:
        BadInputError: shapes that do not belong together, no token, a positive A (compiled way only), or an unknown
            or impossible backend.
    """
    if backend not in BACKENDS:
        raise BadInputError(f"The backend is one of {', '.join(BACKENDS)}; got {backend!r}.")
    _check_shapes(u, delta, A, B, C, D, initial_state)
    kind = torch.float64 if u.dtype == torch.float64 else torch.float32
    x, dt, decay, into, out = (item.to(kind) for item in (u, delta, A, B, C))
    start = None if initial_state is None else initial_state.to(kind)
    if backend == "compiled" and u.device.type != "cpu":
        raise BadInputError(f"The compiled scan runs on a processor; the tensors are on {u.device}.")
    if backend == "compiled" or (backend == "auto" and u.device.type == "cpu"):
        if start is None:
            begin = x.new_zeros(x.shape[0], A.shape[1], x.shape[2])
        else:
            begin = start.transpose(1, 2)
        inputs = [item.contiguous() for item in (x, dt, decay.T, into, out, begin)]
        keep = torch.is_grad_enabled() and any(item.requires_grad for item in inputs)
        y, last, _ = _scan(*inputs, keep)
        state = last.transpose(1, 2)
    else:
        states = linear_recurrence(
            torch.exp(dt.unsqueeze(-1) * decay), (dt * x).unsqueeze(-1) * into.unsqueeze(2), start
        )
        y, state = torch.einsum("rlen,rln->rle", states, out), states[:, -1]
    if D is not None:
        y = y + D.to(kind) * x
    y = y.to(u.dtype)
    return (y, state) if return_state else y


def linear_recurrence(a: torch.Tensor, b: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
    """``h_t = a_t h_(t-1) + b_t`` for ``a, b [R, L, ...]``, from ``start [R, ...]`` or zero, in log2 L rounds."""
    if start is not None:
        b = torch.cat([(b[:, 0] + a[:, 0] * start).unsqueeze(1), b[:, 1:]], 1)
    return _recurrence(a, b)


def _recurrence(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    length = a.shape[1]
    if length == 1:
        return b
    even = length // 2 * 2
    a1, a2, b1, b2 = a[:, 0:even:2], a[:, 1:even:2], b[:, 0:even:2], b[:, 1:even:2]
    second = _recurrence(a1 * a2, a2 * b1 + b2)  # the states at places 1, 3, 5 ...
    before = second[:, : (length - 1) // 2]
    first = torch.cat([b[:, :1], a[:, 2::2] * before + b[:, 2::2]], 1)  # at places 0, 2, 4 ...
    pairs = torch.stack([first[:, : length // 2], second], 2).flatten(1, 2)
    return pairs if length == even else torch.cat([pairs, first[:, -1:]], 1)


def _check_shapes(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    start: torch.Tensor | None,
) -> None:
    if u.dim() != 3 or A.dim() != 2 or not u.numel():
        raise BadInputError(f"A scan reads u [R, L, E] and A [E, n], none empty; got {[*u.shape]} and {[*A.shape]}.")
    rows, length, channels = u.shape
    n = A.shape[1]
    wanted: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]]
    wanted = {"delta": (delta, (rows, length, channels)), "A": (A, (channels, n)), "B": (B, (rows, length, n))}
    wanted |= {"C": (C, (rows, length, n)), "D": (D, (channels,)), "initial_state": (start, (rows, channels, n))}
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise BadInputError(f"{name} must have the shape {[*shape]}; got {[*tensor.shape]}.")


# -- the compiled way as operators of torch, which torch.compile does not look into -----------------------------------
@torch.library.custom_op("everytoken::selective_scan", mutates_args=(), device_types="cpu")
def _scan(
    u: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, start: torch.Tensor,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """``y``, the last state and the kept ones; A and states by state, then channel."""
    from .scan_kernels import forward

    if bool((A > 0).any()):
        raise BadInputError("A must not be positive: the states would grow without bound.", "Pass -exp(A_log).")
    y, last, kept = _room(u, start, keep)
    _run(forward, u, dt, A, B, C, start, y, kept, last)
    return y, last, kept


@_scan.register_fake
def _(u, dt, A, B, C, start, keep):  # type: ignore[no-untyped-def]
    return _room(u, start, keep)


@torch.library.custom_op("everytoken::selective_scan_backward", mutates_args=(), device_types="cpu")
def _scan_backward(
    u: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, kept: torch.Tensor,
    gy: torch.Tensor, glast: torch.Tensor,
) -> list[torch.Tensor]:  # fmt: skip
    from .scan_kernels import BLOCK, backward

    rows, _, channels = u.shape
    n, blocks = A.shape[0], -(-channels // BLOCK)
    gu, gdt, ga, gstart = torch.empty_like(u), torch.empty_like(u), u.new_empty(rows, n, channels), kept[:, 0].clone()
    gb, gc = (u.new_empty(blocks, *B.shape) for _ in range(2))
    _run(backward, u, dt, A, B, C, kept, gy.contiguous(), glast.contiguous(), gu, gdt, ga, gb, gc, gstart)
    return [gu, gdt, ga.sum(0), gb.sum(0), gc.sum(0), gstart]


@_scan_backward.register_fake
def _(u, dt, A, B, C, kept, gy, glast):  # type: ignore[no-untyped-def]
    return [torch.empty_like(item) for item in (u, dt, A, B, C, glast)]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], output[2])
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx: Any, gy: torch.Tensor, glast: torch.Tensor, _kept: Any) -> tuple[Any, ...]:
    return (*_scan_backward(*ctx.saved_tensors, gy, glast), None)


_scan.register_autograd(_gradients, setup_context=_keep_inputs)


def _room(u: torch.Tensor, start: torch.Tensor, keep: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from .scan_kernels import CHUNK

    rows, length, _ = u.shape
    chunks = -(-length // CHUNK) if keep else 0
    return torch.empty_like(u), torch.empty_like(start), start.new_empty(rows, chunks, *start.shape[1:])


def _run(kernel: Any, *tensors: torch.Tensor) -> None:
    run_together(kernel, torch.get_num_threads(), *(item.detach().numpy() for item in tensors))


# -- inside transformers ----------------------------------------------------------------------------------------------
NAMES = ("mamba_selective_scan",)
"""What transformers' mixers call: ``f(hidden [R, E, L], dt, A, B [R, n, L], C, D, z, delta_bias, ...)``."""


def scan_like_transformers(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_unused: Any,
) -> Any:
    """``selective_scan`` with the arguments and layouts of transformers' own function."""
    step = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        step = nn.functional.softplus(step)
    u, step, b, c = (item.transpose(1, 2) for item in (hidden_states, step, B, C))
    output, state = selective_scan(u, step, A, b, c, D, return_state=True)
    output = output.transpose(1, 2)
    if z is not None:
        output = output * nn.functional.silu(z)
    return (output, state) if return_last_state else output


def with_fast_scan(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of one of transformers' mixers, with ``selective_scan`` where it calls transformers' scan.

    It is the same code with another global name: nothing of transformers changes for other models. Where mamba-ssm is
    installed, its kernels stay in use on other devices than a processor.

    Raises:
        UnsupportedModelError: the function calls no such scan.
    """
    inner: Any = getattr(forward, "__wrapped__", forward)
    if not set(NAMES) & set(getattr(inner, "__code__", _nothing.__code__).co_names):
        raise UnsupportedModelError(f"{getattr(forward, '__qualname__', forward)} does not scan as Mamba does.")
    known = inner.__globals__
    kernels = find_spec("mamba_ssm") is not None
    ours = known | {name: _on_processors(known[name]) if kernels else scan_like_transformers for name in NAMES}
    if not kernels and "mamba_inner_fn" in known:  # it would say that a slow scan is in use, which is not so any more
        ours["mamba_inner_fn"] = lambda *_arguments, **_others: None
    again = types.FunctionType(inner.__code__, ours, inner.__name__, inner.__defaults__, inner.__closure__)
    again.__kwdefaults__ = inner.__kwdefaults__
    return again


def _on_processors(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Our scan for tensors on a processor, the one given elsewhere."""

    def scan(hidden_states: torch.Tensor, *arguments: Any, **others: Any) -> Any:
        chosen = scan_like_transformers if hidden_states.device.type == "cpu" else theirs
        return chosen(hidden_states, *arguments, **others)

    return scan


def _nothing() -> None:
    """A function that calls none."""


@contextlib.contextmanager
def fast_scan(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block, the mixers of a transformers model (Mamba, FalconMamba, Jamba) scan by ``selective_scan``.

    Only this model's instances change. Do not save or move the model inside the block.

    Raises:
        UnsupportedModelError: no layer of the model calls transformers' scan.
    """
    changed: list[nn.Module] = []
    for module in model.modules():
        with contextlib.suppress(UnsupportedModelError):
            forward = with_fast_scan(type(module).forward)
            module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
            changed.append(module)
    if not changed:
        raise UnsupportedModelError(f"{type(model).__name__} has no layer that scans as transformers' Mamba does.")
    try:
        yield model
    finally:
        for module in changed:
            del module.forward
