"""One record of routing for every mixture of experts, and the arithmetic of balance that its losses share.

transformers' routers all return ``(logits, scores, indices)``: one row a token, with logits for all ``E`` experts and
the scores and ids of the ``k`` chosen ones. A recurrent router adds the state that it hands to the next layer. A choice
that was dropped keeps its id and has the score 0.

``record_routing`` reads these tuples from any transformers model whose class says where its routers are, and changes
nothing about the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..core.errors import BadInputError, UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass
class RouterRecord:
    """What one router chose in one forward; ``n`` tokens, row by row of the batch, padding included.

    Attributes:
        layer: the router's name in the model.
        logits: ``[n, E]``.
        scores: ``[n, k]``, the weights of the chosen experts; 0 where a choice was dropped.
        indices: ``[n, k]``, the chosen experts, best first where the router sorts.
        state: ``[n, p]``, what a recurrent router hands on; None for others.
    """

    layer: str
    logits: torch.Tensor
    scores: torch.Tensor
    indices: torch.Tensor
    state: torch.Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.logits.shape[-1]

    @property
    def kept(self) -> torch.Tensor:
        """``[n, k]``, whether a choice was served."""
        return self.scores != 0

    def first(self) -> torch.Tensor:
        """``[n]``, the choice of the largest score; of the largest logit where all were dropped."""
        chosen = torch.where(self.kept.any(-1, keepdim=True), self.scores, self.logits.gather(-1, self.indices))
        return self.indices.gather(-1, chosen.float().argmax(-1, keepdim=True))[:, 0]


def routers_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The routers of a model by name, in the order of its layers.

    Raises:
        UnsupportedModelError: the model has no routers, or its class does not say which of its modules they are.
    """
    from transformers import PreTrainedModel
    from transformers.utils.output_capturing import OutputRecorder

    kinds: list[type] = []
    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        specs = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits", [])
        for spec in specs if isinstance(specs, list) else [specs]:
            kind = spec.target_class if isinstance(spec, OutputRecorder) else spec
            if isinstance(kind, type) and kind not in kinds:
                kinds.append(kind)
    found: dict[str, nn.Module] = {n: part for n, part in model.named_modules() if isinstance(part, tuple(kinds))}
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no routers that transformers records.",
            "Routing is read from mixtures of experts: Mixtral, OLMoE, Qwen3-MoE, gpt-oss, DeepSeek and the like.",
        )
    return found


@contextmanager
def record_routing(model: PreTrainedModel) -> Iterator[list[RouterRecord]]:
    """While it is open, every forward of the model appends one record a router to the list that it gives.

    The tensors are those of the forward, gradients included; run it under ``torch.no_grad`` where none are wanted.

    Raises:
        UnsupportedModelError: the model has no routers, or they return no ``(logits, scores, indices)``.
    """
    records: list[RouterRecord] = []
    routers = routers_of(model)

    def watch(name: str, router: nn.Module, output: object) -> None:
        records.append(as_record(name, output, type(router).__name__))

    handles = [
        router.register_forward_hook(lambda module, _, output, name=name: watch(name, module, output))
        for name, router in routers.items()
    ]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def as_record(layer: str, output: object, kind: str = "the router") -> RouterRecord:
    """A record from what a router returned.

    Raises:
        UnsupportedModelError: it is no ``(logits, scores, indices)`` or ``(logits, scores, indices, state)``.
    """
    if (
        isinstance(output, tuple)
        and len(output) in (3, 4)
        and all(isinstance(item, torch.Tensor) for item in output[:3])
        and not output[2].is_floating_point()
        and output[1].shape[-1] == output[2].shape[-1]
    ):
        logits, scores, indices = (item.reshape(-1, item.shape[-1]) for item in output[:3])
        state = output[3] if len(output) == 4 else None
        return RouterRecord(layer, logits, scores, indices, state)
    raise UnsupportedModelError(
        f"{kind} ({layer}) returns no (logits, scores, indices).", "Its routing cannot be read without a change to it."
    )


def top_experts(probabilities: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest probabilities and their experts, best first; the lower expert of equal ones, which ``topk`` does not
    promise.

    Args:
        probabilities: ``[..., E]``.

    Returns:
        Values and ids, both ``[..., top_k]``.
    """
    ranked = probabilities.sort(dim=-1, descending=True, stable=True)
    return ranked.values[..., :top_k], ranked.indices[..., :top_k]


# -- balance -----------------------------------------------------------------------------------------------------------
def flat_mask(mask: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """A padding mask ``[B, S]`` as ``[rows]`` booleans; None stays None.

    Raises:
        BadInputError: it does not fit the tokens.
    """
    if mask is None:
        return None
    if mask.numel() != rows:
        raise BadInputError(f"A mask of {tuple(mask.shape)} does not fit {rows} tokens.")
    return mask.reshape(-1).bool()


def expert_shares(
    logits: torch.Tensor, top_k: int, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a balance loss is made of, as sums: tokens that chose each expert, probabilities, tokens.

    Args:
        logits: ``[n, E]``.
        top_k: choices a token.
        mask: ``[n]``, true for tokens that count; None counts all.

    Returns:
        ``[E]`` counts (without a gradient), ``[E]`` sums of probabilities, and the number of tokens as a tensor.
    """
    probabilities = torch.softmax(logits.float(), -1)
    chosen = torch.zeros_like(probabilities).scatter_(-1, probabilities.topk(top_k, -1).indices, 1.0)
    if mask is None:
        return chosen.sum(0), probabilities.sum(0), probabilities.new_tensor(len(probabilities))
    weight = mask.to(probabilities.dtype)[:, None]
    return (chosen * weight).sum(0), (probabilities * weight).sum(0), weight.sum()


def balance_loss(
    logits: Sequence[torch.Tensor], top_k: int, mask: torch.Tensor | None = None, pooled: bool = False
) -> torch.Tensor:
    """``E * sum over experts of (share of tokens that chose it) * (its mean probability)``; ``k`` at balance.

    Args:
        logits: ``[n, E]`` for each layer.
        top_k: choices a token; the shares of a layer sum to it.
        mask: ``[B, S]`` or ``[n]``, true for tokens that count.
        pooled: take the shares over the tokens of all layers together, as transformers' Mixtral does. Layers that are
            unbalanced in opposite ways then look balanced. The mean of the layers' own losses otherwise.

    Returns:
        A scalar in float32; 0 where no token counts.

    Raises:
        BadInputError: there are no logits, or ``top_k`` is larger than the number of experts.
    """
    if not logits:
        raise BadInputError("A balance loss needs the logits of at least one layer.")
    experts = logits[0].shape[-1]
    if not 1 <= top_k <= experts:
        raise BadInputError(f"top_k lies between 1 and the {experts} experts; got {top_k}.")
    counted = flat_mask(mask, len(logits[0]))
    sums = [expert_shares(layer, top_k, counted) for layer in logits]
    if pooled:
        chosen, probabilities, totals = (torch.stack(list(part)).sum(0) for part in zip(*sums, strict=True))
        sums = [(chosen, probabilities, totals)]
    losses = [experts * (chosen * mean).sum() / total.clamp(min=1) ** 2 for chosen, mean, total in sums]
    return torch.stack(losses).mean()


def router_z_loss(logits: Sequence[torch.Tensor], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over tokens and layers of ``logsumexp(logits)^2``, which keeps logits small.

    Args:
        logits: ``[n, E]`` for each layer.
        mask: as for ``balance_loss``.
    """
    squares = torch.stack([torch.logsumexp(layer.float(), -1) ** 2 for layer in logits])
    counted = flat_mask(mask, squares.shape[-1])
    if counted is None:
        return squares.mean()
    return (squares * counted).sum() / (counted.sum().clamp(min=1) * len(squares))
