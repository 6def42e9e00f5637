"""Linear layers of 4 bits for inference on a CPU: grouped weights in place of float32 ones.

Every linear layer gets 4 bits a weight, and the output head 8, which GGUF files give it too. The float32 parameters
stay and hold the values that the grouped weights stand for, so whatever reads them (embeddings, a draft's head,
``save``) sees the same model. Weights that were of 4 bits before (a GGUF of Q4_0 or Q4_1) do not change at all.

The layers are for inference on the CPU. Training, another device or dtype, and changed weights are refused by name.
"""

from __future__ import annotations

import contextlib
import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UnsupportedModelError
from ..files import write_whole
from . import kernels
from .llama import LlamaForward, lacks
from .team import run_together
from .weights import GroupedWeight, group_weight

WORTH = 8_000_000
"""Multiplications for which waking other threads pays."""
HINT = "Load the model with weights='as they come' for that."
HELD_OUT = (
    "The harbour lay quiet under a thin layer of mist. Two fishermen mended their nets and talked about the price of "
    "diesel, while a girl counted the boats that had not come back yet. In physics, the work done by a force is the "
    "product of its size and the distance over which it acts. To sort a list of numbers, compare neighbours and swap "
    "those that stand in the wrong order until none is left."
)
"""A text on which the divergence from the weights as they come is measured; no model here was trained on it."""


class _Grouped:
    """A layer's grouped weight, and the state of the parameter that it stands for."""

    def __init__(self, weight: GroupedWeight):
        self.weight = weight
        self.version: int | None = None

    def check(self, parameter: torch.Tensor) -> None:
        """Refuses a parameter that has changed since the first call."""
        version = 0 if parameter.is_inference() else parameter._version
        if self.version is None:
            self.version = version
        if version != self.version:
            raise UnsupportedModelError("The weights of a layer of 4 bits were changed after loading.", HINT)

    def __deepcopy__(self, _memo: dict[int, object]) -> _Grouped:
        return _Grouped(self.weight)  # packed arrays are never written to


@dataclass(frozen=True)
class GroupedReport:
    """What became of a model's weights.

    Attributes:
        exact: share of the groups of 32 weights that are the same as before.
        divergence: mean Kullback-Leibler divergence of the next-token distribution from that of the weights as they
            came, in nats, on ``HELD_OUT``; None where it was not measured.
        agreement: share of that text's places with the same likeliest token.
    """

    exact: float
    divergence: float | None = None
    agreement: float | None = None

    def __str__(self) -> str:
        kept = "all weights as stored" if self.exact == 1 else f"{self.exact:.0%} of the groups as stored"
        if self.divergence is None:
            return f"4 bits: {kept}"
        return (
            f"4 bits: {kept}; {self.divergence:.2g} nats from float32 on held-out text, the likeliest token the same "
            f"at {self.agreement:.0%} of its places"
        )


def forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """``x W' + b`` with grouped weights.

    Raises:
        UnsupportedModelError: gradients or training, another device or dtype, or changed weights.
    """
    if self.training or (torch.is_grad_enabled() and (self.weight.requires_grad or x.requires_grad)):
        raise UnsupportedModelError("Layers of 4 bits do not train, and take no gradients.", HINT)
    if x.device.type != "cpu" or self.weight.device.type != "cpu" or x.dtype != torch.float32:
        raise UnsupportedModelError(f"Layers of 4 bits take float32 on a CPU, not {x.dtype} on {x.device}.", HINT)
    grouped: _Grouped = self._grouped  # type: ignore[assignment]
    grouped.check(self.weight)
    weight = grouped.weight
    rows = x.reshape(-1, weight.shape[1])
    if not len(rows):
        return F.linear(x, self.weight, self.bias)
    out = np.empty((len(rows), weight.rows), np.float32)
    members = torch.get_num_threads() if len(rows) * weight.rows * weight.shape[1] > WORTH else 1
    steps, sums = (np.empty((members, rows.numel() // 32), np.float32) for _ in range(2))
    room = (np.empty((members, rows.numel()), np.int16), steps, sums)
    numbers = np.ascontiguousarray(rows.numpy())
    run_together(kernels.linear, members, weight.bits, weight.weights, weight.scales, numbers, *room, out)
    result = torch.from_numpy(out)[:, : weight.shape[0]].reshape(*x.shape[:-1], -1)
    return result if self.bias is None else result + self.bias


def run_grouped(module: nn.Linear, weight: GroupedWeight) -> None:
    """Lets a layer run with a grouped weight."""
    module._grouped = _Grouped(weight)  # type: ignore[assignment]
    module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            yield name, module


@torch.no_grad()
def group_linears(model: nn.Module, held_out: torch.Tensor | None = None, kept: Path | None = None) -> GroupedReport:
    """Gives every linear layer of a CPU model 4 bits a weight (its output head 8).

    Args:
        model: in float32. A plain Llama also gets a compiled forward, ``model._lean`` (see ``llama``).
        held_out: ids ``[1, T]`` on which the divergence is measured; None skips that.
        kept: a file that keeps the packed weights for the next time, or None.

    Raises:
        UnsupportedModelError: weights on another device or in another dtype, layers of other kinds with adapters in
            them, or widths that are no multiples of 32.
    """
    linears = dict(_linears(model))
    odd = {str(item.weight.dtype) for item in linears.values() if item.weight.dtype != torch.float32}
    odd |= {str(item.weight.device) for item in linears.values() if item.weight.device.type != "cpu"}
    if odd or not linears:
        raise UnsupportedModelError(
            f"Weights of 4 bits are made from float32 linear layers on a CPU; here are {', '.join(odd) or 'none'}.",
            "Load it with dtype='float32' and device='cpu', or with other weights.",
        )
    if hasattr(model, "peft_config"):
        raise UnsupportedModelError("Weights of 4 bits do not go with PEFT's adapters.", "Merge the adapter first.")
    for name, module in linears.items():
        if module.in_features % 32:
            raise UnsupportedModelError(
                f"Weights of 4 bits come in groups of 32; {name} has {module.in_features} inputs.",
                "Load this model with other weights ('as they come' or 'packed').",
            )
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    before = model(held_out).logits[0].float() if held_out is not None else None
    weights = _read(kept, linears)
    if weights is None:
        weights = {name: group_weight(module.weight, 8 if module is head else 4) for name, module in linears.items()}
        if kept is not None:
            _write(kept, weights)
    for name, module in linears.items():
        if weights[name].exact < 1:
            module.weight.copy_(weights[name].dequantised())
        run_grouped(module, weights[name])
    groups = [weight.shape[0] * weight.shape[1] for weight in weights.values()]
    exact = sum(weight.exact * count for weight, count in zip(weights.values(), groups, strict=True)) / sum(groups)
    if lacks(model) is None:
        model._lean = LlamaForward(model, weights)  # type: ignore[arg-type, assignment]
    if before is None:
        return GroupedReport(exact)
    after = model(held_out).logits[0].float()
    divergence = F.kl_div(after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    return GroupedReport(exact, float(divergence.mean()), float((after.argmax(-1) == before.argmax(-1)).float().mean()))


# -- kept between processes --------------------------------------------------------------------------------------------
def _write(path: Path, weights: dict[str, GroupedWeight]) -> None:
    """Keeps packed weights; a folder that cannot be written costs the next start a few seconds, no more."""
    from safetensors.numpy import save_file

    tensors, facts = {}, {}
    for name, weight in weights.items():
        tensors[f"{name}.weights"], tensors[f"{name}.scales"] = weight.weights, weight.scales
        facts[name] = json.dumps([weight.bits, *weight.shape, weight.exact])
    with contextlib.suppress(OSError):
        write_whole(path, lambda beside: save_file(tensors, beside, metadata=facts))


def _read(path: Path | None, linears: dict[str, nn.Linear]) -> dict[str, GroupedWeight] | None:
    """Kept weights of these layers, or None."""
    if path is None or not path.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    weights = {}
    try:
        with safe_open(path, "numpy") as file:
            for name, text in (file.metadata() or {}).items():
                bits, rows, columns, exact = json.loads(text)
                packed, scales = (file.get_tensor(f"{name}.{kind}") for kind in ("weights", "scales"))
                weights[name] = GroupedWeight(bits, (rows, columns), packed, scales, exact)
    except (OSError, ValueError, SafetensorError):
        return None
    same = {name: tuple(module.weight.shape) for name, module in linears.items()}
    return weights if same == {name: weight.shape for name, weight in weights.items()} else None
