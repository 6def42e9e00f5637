"""Llama-like models: what they are, whether they can be sharded, and how DTensor shards them over ranks.

Query, key, value, gate and up are cut by columns, output and down by rows, so that attention and MLP each end in
partial sums. Embedding, norms and head stay whole on every rank. Where ranks do not divide the heads or the key and
value heads, attention stays whole on every rank too: it needs no sum, but every rank computes all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..core.errors import BadInputError, UnsupportedModelError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedConfig, PreTrainedModel

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
IMPLEMENTATIONS = ("sdpa", "eager")
LIKE = "Llama, Mistral without a sliding window, Qwen2, Qwen3 and Gemma (the first) are Llama-like."


def divides_heads(config: PreTrainedConfig, world: int) -> bool:
    """Whether ranks divide the heads and the key and value heads; else attention is replicated."""
    return config.num_attention_heads % world == 0 and config.num_key_value_heads % world == 0


def check_world(config: PreTrainedConfig, world: int) -> None:
    """Raises BadInputError where ranks do not divide the MLP, which is cut in any case."""
    width = config.intermediate_size
    if world < 1 or width % world:
        able = [count for count in range(2, 65) if width % count == 0]
        hint = f"These numbers of ranks divide it: {', '.join(map(str, able[:12]))}." if able else "Use one rank."
        raise BadInputError(f"{world} ranks do not divide the MLP's width of {width}.", hint)


def names(module: nn.Module) -> set[str]:
    """Names of a module's children."""
    return {name for name, _ in module.named_children()}


def check_llama_like(model: PreTrainedModel) -> None:
    """Checks what can be seen of a model without running it.

    Raises:
        UnsupportedModelError: it is not Llama-like, or has weights, hooks or settings that cannot be woven.
    """
    kind = type(model).__name__
    base: Any = getattr(model, "model", None)
    if not all(hasattr(base, name) for name in ("embed_tokens", "layers", "norm", "rotary_emb")):
        raise UnsupportedModelError(f"{kind} has no embed_tokens, layers, norm and rotary_emb in `model`.", LIKE)
    config = model.config
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise UnsupportedModelError(f"{kind} has layers that are not of full attention.", LIKE)
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise UnsupportedModelError(f"{kind} attends in a sliding window.", LIKE)
    if config._attn_implementation not in IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"Woven attention runs as {' or '.join(IMPLEMENTATIONS)}; this model runs {config._attn_implementation}.",
            'Load it with attn_implementation="sdpa".',
        )
    for number, layer in enumerate(base.layers):
        _check_layer(kind, number, layer)
    hooked = [name for name, module in base.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    if hooked:
        raise UnsupportedModelError(
            f"There are hooks on {hooked[0] or 'the model'}: they would see shards, or not run.",
            "Take hooks off (adapters, steering, early exit) before weaving.",
        )


def _check_layer(kind: str, number: int, layer: Any) -> None:
    where = f"Layer {number} of {kind}"
    found = names(layer)
    if found != LAYER:
        raise UnsupportedModelError(f"{where} has {', '.join(sorted(found))}; not {', '.join(sorted(LAYER))}.", LIKE)
    attention, mlp = layer.self_attn, layer.mlp
    if names(attention) - {"q_norm", "k_norm"} != ATTENTION:
        raise UnsupportedModelError(f"{where}: its attention has {', '.join(sorted(names(attention)))}.", LIKE)
    for name in ("q_norm", "k_norm"):
        norm = getattr(attention, name, None)
        if norm is not None and norm.weight.numel() != attention.head_dim:
            raise UnsupportedModelError(f"{where}: {name} does not normalise single heads, and cannot be cut.", LIKE)
    if names(mlp) - {"act_fn"} != MLP or not hasattr(mlp, "act_fn"):
        raise UnsupportedModelError(f"{where}: its MLP has {', '.join(sorted(names(mlp)))}.", LIKE)
    for parent, children in ((attention, ATTENTION), (mlp, MLP)):
        for name in sorted(children):
            linear = getattr(parent, name)
            weight = getattr(linear, "weight", None)
            plain = type(weight) is nn.Parameter and weight.is_floating_point() and not weight.is_meta
            if type(linear) is not nn.Linear or not plain:
                raise UnsupportedModelError(
                    f"{where}: {name} is {type(linear).__name__} with {_told(weight)}, which cannot be sharded.",
                    "Load the model with plain float weights (load_model(weights='float32' or 'bfloat16')), no "
                    "quantisation and no adapters, and shard it once.",
                )


def _told(weight: Any) -> str:
    if weight is None:
        return "no weight"
    where = " on the meta device" if getattr(weight, "is_meta", False) else ""
    return f"a {type(weight).__name__} of {getattr(weight, 'dtype', 'no dtype')}{where}"


def check_mesh(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Raises BadInputError unless the mesh is a row of ranks on the model's kind of device that divide it."""
    if mesh.ndim != 1:
        raise BadInputError(f"Tensor parallelism takes a mesh of one dimension; this has {mesh.ndim}.", 'mesh["tp"]')
    if mesh.device_type != model.device.type:
        raise BadInputError(f"The mesh is of {mesh.device_type}, the model is on {model.device.type}.")
    check_world(model.config, mesh.size())


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> bool:
    """Cuts a model's layers over a mesh, in place; for good.

    Returns:
        Whether attention was cut (else it is replicated).
    """
    from torch.distributed.tensor import Partial
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    cut = divides_heads(model.config, mesh.size())
    plan: dict[str, Any] = {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
    plan["mlp.down_proj"] = RowwiseParallel(output_layouts=Partial())
    if cut:
        plan |= {f"self_attn.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
        plan["self_attn.o_proj"] = RowwiseParallel(output_layouts=Partial())
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    return cut


def tolerance(dtype: torch.dtype) -> float:
    """How far sums of another order may lie apart, as a share of the largest value."""
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 5e-2)
