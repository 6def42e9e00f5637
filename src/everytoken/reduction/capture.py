"""Queries and keys of single attention layers, read while the model runs with whatever attention kernel it has.

transformers looks an attention function up by its name in the layer's configuration. For as long as it is read, one
layer gets a copy of its configuration with the name of a function that hands queries and keys over and then calls the
function that was there. Other layers and other models are not touched.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

NAME = "everytoken_read"
Reader = Callable[[torch.Tensor, torch.Tensor, float], None]
"""Gets queries ``[B, H, Q, dk]``, keys ``[B, H', K, dk]`` (positions already in them) and the scale of the logits."""


def _reading(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> Any:
    """The registered attention function."""
    config: Any = module.config
    reader, inner = config.everytoken_reader
    reader(query, key, float(kwargs.get("scaling") or query.shape[-1] ** -0.5))
    return inner(module, query, key, value, attention_mask, **kwargs)


@contextlib.contextmanager
def reading(readers: Mapping[Any, Reader]) -> Iterator[None]:
    """Calls ``readers[module]`` whenever that attention module runs inside the block."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    AttentionInterface.register(NAME, _reading)
    with contextlib.ExitStack() as undo:
        for module, reader in readers.items():
            before = module.config
            eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            inner = ALL_ATTENTION_FUNCTIONS.get_interface(before._attn_implementation, eager)
            module.config = copy.copy(before)
            module.config._attn_implementation = NAME
            module.config.everytoken_reader = (reader, inner)
            undo.callback(setattr, module, "config", before)
        yield


def attention_row(query: torch.Tensor, keys: torch.Tensor, scale: float, valid: torch.Tensor) -> torch.Tensor:
    """Softmax weights of one query a row over the keys, averaged over heads.

    Args:
        query: ``[B, H, dk]``.
        keys: ``[B, H', K, dk]``, ``H`` a multiple of ``H'``.
        scale: of the logits.
        valid: ``[B, K]``, False for keys that are hidden.

    Returns:
        ``[B, K]`` float32.
    """
    rows, heads, width = query.shape
    grouped = query.view(rows, keys.shape[1], heads // keys.shape[1], width).float()
    logits = torch.einsum("bhgd,bhkd->bhgk", grouped, keys.float()) * scale
    logits = logits.masked_fill(~valid[:, None, None], -torch.inf)
    return logits.softmax(-1).mean((1, 2))


@dataclass
class EncoderRows:
    """Summary queries and patch keys of some encoder layers, for a batch of images.

    Attributes:
        layers: in the order that the reducer named them.
        queries: layer -> ``[images, heads, dk]``.
        keys: layer -> ``[images, heads, N, dk]``.
    """

    layers: tuple[int, ...]
    queries: dict[int, torch.Tensor] = field(default_factory=dict)
    keys: dict[int, torch.Tensor] = field(default_factory=dict)

    def of(self, image: int) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """``cls_queries`` and ``keys`` of a context."""
        return (
            tuple(self.queries[layer][image] for layer in self.layers),
            tuple(self.keys[layer][image] for layer in self.layers),
        )


def encoder_layers(model: PreTrainedModel) -> Any:
    """The layers of a model's image encoder."""
    return next(module.layers for module in model.base_model.vision_tower.modules() if hasattr(module, "layers"))


@contextlib.contextmanager
def encoder_rows(model: PreTrainedModel, reducer: Any) -> Iterator[EncoderRows]:
    """Reads the layers that ``reducer.encoder_layers(depth)`` names; the summary token is the first."""
    layers = encoder_layers(model)
    rows = EncoderRows(tuple(reducer.encoder_layers(len(layers))))

    def reader(layer: int) -> Reader:
        def read(query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
            rows.queries[layer], rows.keys[layer] = query[:, :, 0].detach(), key[:, :, 1:].detach()

        return read

    with reading({layers[layer].self_attn: reader(layer) for layer in set(rows.layers)}):
        yield rows
