"""Faster linear layers for inference on a CPU: weights packed once into oneDNN's own layout.

A decoding step multiplies every weight with a handful of vectors, so it should run at the speed of memory. PyTorch's
default matrix multiplication lays out (packs) a weight anew in every call with more than one vector, which can cost
more than reading it. ``pack_linears`` packs each weight once. The arithmetic and its precision stay the same, but the
last bits are rounded differently. The packed copies take as much memory as the weights.

The layers keep their parameters. A call in training mode or with gradients uses them and drops the packed copy; the
next inference call makes a new one. In-place changes are noticed as well. Only weights that are edited through
``weight.data`` while the model stays in evaluation mode need another ``pack_linears``.
"""

from __future__ import annotations

import types
from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional as F

PACKABLE = (torch.float32, torch.bfloat16)


@lru_cache
def can_pack(dtype: torch.dtype = torch.float32) -> bool:
    """Whether torch has oneDNN's packed linear layers for this precision on this processor (bfloat16 needs AVX-512)."""
    if dtype not in PACKABLE or not torch.backends.mkldnn.is_available():
        return False
    try:
        weight, x = torch.eye(8, 16, dtype=dtype), torch.ones(1, 3, 16, dtype=dtype)
        return torch.allclose(_multiply(x, _pack(weight), None), F.linear(x, weight), atol=1e-4)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def _pack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 4)


def _multiply(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class _Packed:
    """A layer's packed weight and what it was packed from. Copies start empty: the layout belongs to this process."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.version, self.pointer = -1, 0
        self.weight: torch.Tensor | None = None

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        version = 0 if weight.is_inference() else weight._version  # inference tensors cannot change and count nothing
        if self.version != version or self.pointer != weight.data_ptr():
            self.version, self.pointer, self.weight = version, weight.data_ptr(), _pack(weight)
        assert self.weight is not None
        return self.weight

    def __deepcopy__(self, _memo: dict[int, object]) -> _Packed:
        return _Packed()

    def __reduce__(self) -> tuple[type[_Packed], tuple[()]]:
        return _Packed, ()


def forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    weight = self.weight
    learning = self.training or (torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad))
    if learning:  # fused optimizers change weights without counting it as a new version
        self._packed.forget()  # type: ignore[union-attr, operator]
    if learning or x.dtype != weight.dtype or not x.numel():
        return F.linear(x, weight, self.bias)
    return _multiply(x, self._packed.of(weight), self.bias)  # type: ignore[union-attr, operator]


def pack_linears(model: nn.Module) -> nn.Module:
    """Packs every ``nn.Linear`` of a CPU model for inference; returns the model.

    Does nothing on other devices, for other precisions, or where torch lacks oneDNN, so it is always safe to call.
    """
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and can_pack(module.weight.dtype):
            module._packed = _Packed()  # type: ignore[assignment]
            module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
    return model


def unpack_linears(model: nn.Module) -> nn.Module:
    """Undoes ``pack_linears`` and frees the packed copies."""
    for module in model.modules():
        if hasattr(module, "_packed"):
            del module._packed
            del module.forward
    return model
