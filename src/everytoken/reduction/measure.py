"""What a prompt costs the language model, from the lengths that its layers really saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..core.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def prefill_flops(config: PreTrainedConfig, lengths: Sequence[int]) -> float:
    """Multiply-adds of the decoder layers for one prompt::

        sum over layers of   4 n d^2 + 2 n^2 d + 3 n d f        n tokens, width d, FFN width f

    The projections of attention, its two products, and the three matrices of a gated FFN (published counts that say 2
    leave the gate out). Grouped keys count as full ones, as they do there.

    Args:
        config: of the language model, or of the whole model.
        lengths: how many tokens each layer saw; one number stands for all layers.

    Raises:
        BadInputError: another number of lengths than layers.
    """
    text = config.get_text_config()
    layers, width, inner = text.num_hidden_layers, text.hidden_size, text.intermediate_size
    each = list(lengths) * layers if len(lengths) == 1 else list(lengths)
    if len(each) != layers:
        raise BadInputError(f"The model has {layers} layers; got {len(each)} lengths.")
    return float(sum(4 * n * width**2 + 2 * n**2 * width + 3 * n * width * inner for n in each))


def cache_bytes(config: PreTrainedConfig, lengths: Sequence[int], size: int = 4) -> int:
    """Bytes of the keys and values of one prompt; ``lengths`` as for ``prefill_flops``, ``size`` bytes a number."""
    text = config.get_text_config()
    layers = text.num_hidden_layers
    each = list(lengths) * layers if len(lengths) == 1 else list(lengths)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * size * text.num_key_value_heads * head * sum(each))
