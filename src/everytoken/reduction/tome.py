"""ToMe: merges the most similar tokens inside the vision encoder, layer by layer (Bolya and others, ICLR 2023, arXiv
2210.09461); a baseline.

In every encoder layer, between attention and MLP, tokens at even places may merge into tokens at odd places::

    metric = keys averaged over heads, of unit length
    b(a)   = argmax_b <metric_a, metric_b>,          the r best pairs merge; several may merge into one
    x_b    = (size_b x_b + sum size_a x_a) / (size_b + sum size_a)

so that every layer has r tokens fewer. The summary token never merges. Later attention adds ``log(size)`` of a key to
its logits, as if the merged tokens were still there. Tokens stay sorted by their first part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..core.errors import BadInputError, UnsupportedModelError
from .arithmetic import means_of, unit_rows
from .base import Declaration, Reduction, ReductionContext, check_features, combination
from .capture import encoder_layers, reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def match(metric: torch.Tensor, count: int, protected: int = 0) -> torch.Tensor:
    """Bipartite soft matching.

    Args:
        metric: ``[I, N, c]`` of every image.
        count: how many tokens to merge away; capped at half of those that are not protected.
        protected: 1 where the first token never merges, else 0.

    Returns:
        ``[I, N]``: the new token of each old one; new tokens are sorted by their first part.
    """
    images, total = metric.shape[:2]
    count = max(0, min(count, (total - protected) // 2))
    points = unit_rows(metric)
    every = torch.arange(total, device=metric.device).expand(images, -1)
    target = every.clone()
    if count:
        scores = points[:, ::2] @ points[:, 1::2].transpose(1, 2)
        if protected:
            scores[:, 0] = -torch.inf
        best, partner = scores.max(-1)
        sources = best.argsort(dim=-1, descending=True, stable=True)[:, :count]
        target = target.scatter(1, 2 * sources, 2 * partner.gather(1, sources) + 1)
    first = torch.full_like(every, total).scatter_reduce(1, target, every, "amin")
    # a token that merged away has no first part of its own: total sorts it behind all others
    rank = first.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    return rank.gather(1, target)


def merge(values: torch.Tensor, sizes: torch.Tensor, owner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Size-weighted means.

    Args:
        values: ``[I, N, d]``.
        sizes: ``[I, N]`` float, how many patches each token stands for.
        owner: ``[I, N]``, the new token of each old one.

    Returns:
        ``[I, M, d]`` and ``[I, M]``.
    """
    images, total = owner.shape
    count = int(owner[0].max()) + 1
    new_sizes = sizes.new_zeros(images, count).scatter_add(1, owner, sizes)
    every = torch.arange(total, device=owner.device).expand(images, -1)
    first = torch.full((images, count), total, device=owner.device).scatter_reduce(1, owner, every, "amin")
    # x = x_first + sum over the other parts of (size / new size) (x_part - x_first): few rows are touched
    rows = torch.arange(images, device=owner.device)[:, None]
    result = values.flatten(0, 1)[(first + rows * total).flatten()]
    others = (first.gather(1, owner) == every).int().argsort(dim=-1, stable=True)[:, : total - count]
    target = (owner.gather(1, others) + rows * count).flatten()
    share = (sizes.gather(1, others) / new_sizes.flatten()[target].view_as(others)).flatten()[:, None]
    parts = values.flatten(0, 1)[(others + rows * total).flatten()].float()
    moved = (share * (parts - result[target].float())).to(values.dtype)
    return result.index_add(0, target, moved).view(images, count, -1), new_sizes


def unmerge(values: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """``[I, M, d]`` -> ``[I, N, d]``: every old token gets its new token's value."""
    return values.gather(1, owner[..., None].expand(-1, -1, values.shape[-1]))


@dataclass
class Merged:
    """What was merged in one pass of the encoder.

    Attributes:
        owners: ``[I, N]`` after each layer, the token of each patch, the summary token first.
        sizes: ``[I, M]`` after each layer.
        layers: how many layers the model's features come from.
    """

    owners: list[torch.Tensor] = field(default_factory=list)
    sizes: list[torch.Tensor] = field(default_factory=list)
    layers: int = 0

    def reduction(self, image: int, features: torch.Tensor) -> Reduction:
        """The reduction of one image, from the features ``[M, d]`` that the encoder returned for it."""
        owner = self.owners[self.layers - 1][image][1:] - 1  # the summary token is no feature
        return Reduction(features, None, *means_of(owner, len(features)), len(owner))


@dataclass
class ToMe:
    """Merges tokens in every layer of the encoder.

    Args:
        r: tokens to merge away in a layer, on average over the layers.
        inflection: -1 to 1: 0 merges the same number everywhere, above 0 more in later layers, below 0 more in earlier
            ones.
        proportional: add the log of the sizes to the logits of attention.

    Raises:
        BadInputError: a negative r or an inflection out of range.
    """

    r: int = 8
    inflection: float = 0.0
    proportional: bool = True
    declares: ClassVar[Declaration] = Declaration(
        where=("encoder",),
        criterion="similarity of keys",
        strategy="merge",
        budget="a number for every layer",
        needs=("keys",),
    )

    def __post_init__(self) -> None:
        if self.r < 0 or not -1 <= self.inflection <= 1:
            raise BadInputError(f"r is not negative and inflection from -1 to 1; got {self.r}, {self.inflection}.")

    def schedule(self, layers: int) -> list[int]:
        """Tokens to merge away in each layer."""
        low = int(self.r * (1 - self.inflection))
        high = 2 * self.r - low
        if layers == 1:
            return [self.r]
        return [int(low + (high - low) * layer / (layers - 1)) for layer in range(layers)]

    def reduce(self, features: torch.Tensor, context: ReductionContext) -> Reduction:
        """One round of merging of ``features [N, d]``, by their keys where the context has some, else by themselves."""
        check_features(features)
        metric = context.keys[0].mean(0) if context.keys else features.detach()
        owner = match(metric[None], self.r)[0]
        count = int(owner.max()) + 1
        if count == len(features):
            ones = torch.ones(count, dtype=torch.long, device=features.device)
            return Reduction(features, torch.arange(count, device=features.device), None, ones, count)
        return combination(features, *means_of(owner, count))

    @contextlib.contextmanager
    def inside(self, model: PreTrainedModel) -> Iterator[Merged]:
        """Merges in the model's encoder inside the block.

        Raises:
            UnsupportedModelError: features that come from several layers, which then differ in length.
        """
        layers = encoder_layers(model)
        taken = model.config.vision_feature_layer
        if not isinstance(taken, int):
            raise UnsupportedModelError("ToMe needs features of one encoder layer; this model joins several.")
        if model.config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError("ToMe keeps the summary token, which this model takes for a feature.")
        merged = Merged(layers=taken if taken >= 0 else len(layers) + 1 + taken)
        if not merged.layers:
            raise UnsupportedModelError("This model takes its features before the first encoder layer.")
        keys: dict[int, torch.Tensor] = {}
        counts = self.schedule(len(layers))

        def reader(number: int) -> Any:
            return lambda _query, key, _scale: keys.__setitem__(number, key.detach())

        def forward(number: int, layer: Any) -> Any:
            def run(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
                if number == 0:
                    merged.owners.clear()
                    merged.sizes.clear()
                    images, total = hidden_states.shape[:2]
                    owner = torch.arange(total, device=hidden_states.device).expand(images, -1)
                    sizes = torch.ones(images, total, device=hidden_states.device)
                else:
                    owner, sizes = merged.owners[-1], merged.sizes[-1]
                if self.proportional and bool((sizes != 1).any()):
                    attention_mask = sizes.log()[:, None, None].to(hidden_states.dtype)
                    attention_mask = attention_mask.expand(-1, -1, hidden_states.shape[1], -1)
                residual = hidden_states
                attended, _ = layer.self_attn(layer.layer_norm1(hidden_states), attention_mask=attention_mask, **kwargs)
                hidden_states = residual + attended
                step = match(keys.pop(number).mean(1), counts[number], protected=1)
                hidden_states, sizes = merge(hidden_states, sizes, step)
                merged.owners.append(step.gather(1, owner))
                merged.sizes.append(sizes)
                return hidden_states + layer.mlp(layer.layer_norm2(hidden_states))

            return run

        with contextlib.ExitStack() as undo:
            undo.enter_context(reading({layer.self_attn: reader(number) for number, layer in enumerate(layers)}))
            for number, layer in enumerate(layers):
                layer.forward = forward(number, layer)
                undo.callback(delattr, layer, "forward")
            yield merged
