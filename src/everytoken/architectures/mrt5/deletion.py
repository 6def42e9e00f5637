"""How MrT5 deletes: attention that may attend to nothing, the gate, compaction, and the controller of the rate.

::

    z_t = W . norm(h_t) + b          G_t = k sigmoid(-z_t)         kept where G_t > threshold
    softmax_1(x)_i = exp(x_i) / (1 + sum_j exp(x_j))
    e = target - deleted share       P <- 0.9 P + 0.1 k_p e        I <- I + k_i e       alpha = max(0, P + I)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.sdpa_attention import create_position_bias_mask
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.trainer_callback import ExportableState

from ...core.errors import BadInputError

SUFFIX = "_softmax_1"
"""Behind the name of an attention that may attend to nothing: ``sdpa_softmax_1``."""
SCORES_LIMIT = 5.0
"""Attention scores above it count in the scores loss."""


def softmax_1(scores: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Weights of the shape of ``scores`` whose sum is below 1: softmax with a further score of 0 that is dropped."""
    top = scores.amax(dim, keepdim=True).clamp_min(0)
    exponents = (scores - top).exp()
    return exponents / ((-top).exp() + exponents.sum(dim, keepdim=True))


def _bias(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """All that is added to the scores: position bias, padding, the gate, and causality where no mask carries it."""
    if bias is None:
        bias = query.new_zeros(1, 1, query.shape[2], key.shape[2])
    causal = bool(module.is_causal) and mask is None and query.shape[2] > 1
    return create_position_bias_mask(bias, mask, causal, query, key)


def _excess(module: nn.Module, query: torch.Tensor, key: torch.Tensor, found: list[torch.Tensor] | None) -> None:
    """Notes by how much the raw scores exceed the limit; the decoder's self-attention sees no gate and is left out."""
    if found is not None and not module.is_causal:
        found.append(F.relu(query @ key.transpose(2, 3) - SCORES_LIMIT).mean())


def eager_softmax_1(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    scores_excess: list[torch.Tensor] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of T5 with ``softmax_1``, the weights in the open; arguments are those of transformers' registry."""
    _excess(module, query, key, scores_excess)
    scores = query @ key.transpose(2, 3) * (1.0 if scaling is None else scaling)
    weights = softmax_1((scores + _bias(module, query, key, attention_mask, position_bias)).float()).to(value.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def sdpa_softmax_1(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    scores_excess: list[torch.Tensor] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The same by torch's fused attention: a key and a value of zeros are the 1 in the sum."""
    _excess(module, query, key, scores_excess)
    bias = F.pad(_bias(module, query, key, attention_mask, position_bias), (0, 1)).to(query.dtype)
    key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    scale = 1.0 if scaling is None else scaling
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale)
    return mixed.transpose(1, 2).contiguous(), None


for _name, _function in {"eager": eager_softmax_1, "sdpa": sdpa_softmax_1}.items():
    ALL_ATTENTION_FUNCTIONS.register(_name + SUFFIX, _function)
    # without a mask function of the same name transformers hands on no mask at all, and padding would be attended to
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name + SUFFIX, ALL_MASK_ATTENTION_FUNCTIONS[_name])


class DeleteGate(nn.Module):
    """G: ``(hidden [B, S, d], mask [B, S]) -> [B, S]`` in ``(k, 0)``; exactly k where the mask is False.

    Args:
        width: d.
        scale: k.
        eps: of the norm.
    """

    def __init__(self, width: int, scale: float, eps: float = 1e-6):
        super().__init__()
        self.norm = T5LayerNorm(width, eps=eps)
        self.linear = nn.Linear(width, 1)
        self.scale = scale

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = self.linear(self.norm(hidden))[..., 0]
        return torch.where(mask, self.scale * torch.sigmoid(-logits), self.scale)


@dataclass
class Kept:
    """What hard deletion leaves.

    Attributes:
        positions: ``[B, M]`` places in the full text, ascending; -1 in unused slots at the end.
        mask: ``[B, M]``, True for a real byte.
    """

    positions: torch.Tensor
    mask: torch.Tensor

    @property
    def index(self) -> torch.Tensor:
        """``positions`` with 0 in unused slots, to gather with."""
        return self.positions.clamp_min(0)

    def hidden(self, states: torch.Tensor) -> torch.Tensor:
        """``[B, S, d]`` -> ``[B, M, d]``."""
        return states.gather(1, self.index[..., None].expand(-1, -1, states.shape[-1]))

    def bias(self, position_bias: torch.Tensor) -> torch.Tensor:
        """``[1, H, S, S]`` -> ``[B, H, M, M]``: distances stay those of the full text."""
        rows, columns = self.index[:, :, None], self.index[:, None, :]
        return position_bias[0][:, rows, columns].transpose(0, 1)


def compacted(gate: torch.Tensor, mask: torch.Tensor, threshold: float) -> Kept:
    """The kept bytes of every row, moved to the left.

    A row whose bytes would all be deleted keeps the one with the highest gate, the first of several.

    Args:
        gate: G ``[B, S]``.
        mask: ``[B, S]``, True for a real byte; others are never kept.
        threshold: a byte is kept where G lies above.
    """
    keep = (gate > threshold) & mask
    best = torch.where(mask, gate, -torch.inf).argmax(1, keepdim=True)
    rescued = torch.zeros_like(keep).scatter(1, best, True) & mask & ~keep.any(1, keepdim=True)
    keep = keep | rescued
    counts = keep.sum(1)
    longest = max(int(counts.max()), 1)
    positions = (~keep).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
    filled = torch.arange(longest, device=gate.device) < counts[:, None]
    return Kept(torch.where(filled, positions, -1), filled)


@dataclass
class DeletionController(TrainerCallback, ExportableState):
    """Keeps the deleted share near a target by moving alpha after every step, as a callback of ``Trainer``.

    P is a running mean of the error, I its sum; alpha is their sum, and 0 at least. The loss of a step uses what the
    step before left.

    Args:
        target: the deleted share of all bytes.
        k_p, k_i: how strongly P and I answer.
        proportional, integral: P and I, to go on from.

    Raises:
        BadInputError: a target outside of (0, 1), or a gain below 0.
    """

    target: float = 0.5
    k_p: float = 0.5
    k_i: float = 1e-5
    proportional: float = 0.0
    integral: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.target < 1 or self.k_p < 0 or self.k_i < 0:
            raise BadInputError(
                f"A target lies between 0 and 1, gains are 0 or more; got {self.target}, {self.k_p} and {self.k_i}."
            )

    def update(self, deleted: float) -> float:
        """The next alpha, from the deleted share of the last step."""
        error = self.target - deleted
        self.proportional = 0.9 * self.proportional + 0.1 * self.k_p * error
        self.integral += self.k_i * error
        return max(0.0, self.proportional + self.integral)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        network = next(item for item in kwargs["model"].modules() if hasattr(item, "deletion_share"))
        share = network.deletion_share
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            share = share.clone()
            torch.distributed.all_reduce(share)  # every process must take the same alpha
            share = share / torch.distributed.get_world_size()
        network.deletion_weight = self.update(float(share))

    def state(self) -> dict[str, Any]:
        kept = {"proportional": self.proportional, "integral": self.integral}
        return {"args": {"target": self.target, "k_p": self.k_p, "k_i": self.k_i}, "attributes": kept}
