"""Token correlation: how many tokens of a page's crop, and which, by its own repetitiveness and its summary token.

After Zhang and others (arXiv 2407.14439), who published a figure and no code; what they leave open is chosen here and
is a setting. For the patches' keys ``k_i`` of a shallow encoder layer (all heads in a row)::

    redundant_i = #{j != i : cos(k_i, k_j) > threshold} >= min_neighbors
    density     = share of patches that are not redundant
    a^l         = mean over heads of softmax_j(q_cls^l . k_j^l / sqrt(dk))          correlation with the summary token
    G           = {i : a_i^high > Q3 + iqr_factor (Q3 - Q1)}                        outliers of a deep layer
    local       = round(density N) patches, drawn without replacement with probabilities a^low

and ``G`` together with ``local`` stay. Without parameters, without the question. Drawing is the Gumbel top-m trick,
``log a_i + g_i``, seeded by the crop's content, so that the same crop is always reduced alike; ``strategy="topk"``
takes the largest instead.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..core.errors import BadInputError
from ..core.noise import gumbel, open_uniform
from ..core.rng import derive_seed
from .arithmetic import cosines, means_of, top_indices, unit_rows
from .base import Declaration, Reduction, ReductionContext, check_features, combination, selection

FEWEST = 4
"""At least so many tokens of a crop stay."""
MOST_OUTLIERS = 10
"""Where the quartiles agree, every larger value is an outlier: then at most one patch in so many."""
ROWS = 2048


def information_density(
    keys: torch.Tensor, threshold: float = 0.9, min_neighbors: int = 1
) -> tuple[float, torch.Tensor]:
    """The share of patches that are not redundant.

    Args:
        keys: ``[heads, N, dk]``, or ``[N, d]`` with the heads in a row.
        threshold: of the cosine, above which two patches are alike.
        min_neighbors: so many others make a patch redundant.

    Returns:
        The density in [0, 1], and ``[N]``, how many others each patch is like.
    """
    rows = keys.transpose(0, 1).flatten(1) if keys.dim() == 3 else keys
    units, counts = unit_rows(rows), []
    for chosen in torch.arange(len(rows), device=rows.device).split(ROWS):
        alike = units[chosen] @ units.T > threshold
        alike[torch.arange(len(chosen), device=rows.device), chosen] = False
        counts.append(alike.sum(-1))
    neighbors = torch.cat(counts)
    return float((neighbors < min_neighbors).float().mean()), neighbors


def summary_correlation(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """``query [heads, dk], keys [heads, N, dk]`` -> ``[N]`` softmax weights averaged over heads; they sum to 1."""
    logits = torch.einsum("hd,hnd->hn", query.float(), keys.float()) * query.shape[-1] ** -0.5
    return logits.softmax(-1).mean(0)


def upper_outliers(values: torch.Tensor, factor: float = 1.5) -> torch.Tensor:
    """Indices of values above ``Q3 + factor (Q3 - Q1)``, quartiles by linear interpolation."""
    low, high = values.float().quantile(torch.tensor([0.25, 0.75], device=values.device))
    return (values > high + factor * (high - low)).nonzero()[:, 0]


def gumbel_top_m(weights: torch.Tensor, count: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draws without replacement, each time with probabilities proportional to the weights that are left.

    Args:
        weights: ``[N]``, not negative.
        count: how many.
        generator: of the draws, on the CPU.

    Returns:
        ``[count]`` distinct indices in the order of the draws.
    """
    noise = gumbel(open_uniform(len(weights), generator=generator))
    keys = weights.double().log() + noise.to(weights.device)
    return top_indices(keys, count)


@dataclass
class CorrelationCompressor:
    """Keeps as many tokens of every crop as its patches differ, chosen by their correlation with the summary token.

    Args:
        threshold: cosine of keys above which two patches are alike; it depends on encoder and layer.
        min_neighbors: so many alike make a patch redundant.
        low_layer, high_layer: encoder layers, from 0, from -1 backwards, or as a share of the depth.
        iqr_factor: how far above the quartiles an outlier lies.
        min_keep: the least share to keep (and at least ``FEWEST`` tokens).
        strategy: ``"sample"`` or ``"topk"`` for the local tokens.
        merge: add what is dropped to the most similar token that stays.
        seed: of the draws, together with the crop's content; a generator of the context comes first.

    Raises:
        BadInputError: a setting out of range.
    """

    threshold: float = 0.9
    min_neighbors: int = 1
    low_layer: float = 0.25
    high_layer: float = -2
    iqr_factor: float = 1.5
    min_keep: float = 0.02
    strategy: str = "sample"
    merge: bool = False
    seed: int = 0
    declares: ClassVar[Declaration] = Declaration(
        where=("model input",),
        criterion="likeness of patches; correlation with the summary token of two encoder layers",
        strategy="select",
        budget="by the content of every crop",
        needs=("cls", "keys", "generator"),
    )

    def __post_init__(self) -> None:
        if self.strategy not in ("sample", "topk"):
            raise BadInputError(f"strategy is 'sample' or 'topk'; got {self.strategy!r}.")
        if self.min_neighbors < 1 or self.iqr_factor < 0 or not 0 <= self.min_keep <= 1:
            raise BadInputError("min_neighbors is at least 1, iqr_factor at least 0, and min_keep a share.")

    def encoder_layers(self, depth: int) -> tuple[int, int]:
        """The two layers of an encoder of ``depth`` layers whose queries and keys are read.

        Raises:
            BadInputError: a layer that does not exist.
        """
        found = []
        for layer in (self.low_layer, self.high_layer):
            place = int(layer * depth) if 0 < layer < 1 else int(layer) + (depth if layer < 0 else 0)
            if not 0 <= place < depth:
                raise BadInputError(f"The encoder has {depth} layers; there is no layer {layer}.")
            found.append(place)
        return found[0], found[1]

    def reduce(self, features: torch.Tensor, context: ReductionContext) -> Reduction:
        """``features [N, d]`` of one crop, with queries and keys of two layers in the context.

        Raises:
            BadInputError: the context lacks them, or they are of another number of patches.
        """
        check_features(features)
        total = len(features)
        if len(context.cls_queries) != 2 or len(context.keys) != 2:
            raise BadInputError("CorrelationCompressor needs queries and keys of two encoder layers.")
        low, high = (summary_correlation(q, k) for q, k in zip(context.cls_queries, context.keys, strict=True))
        if len(low) != total:
            raise BadInputError(f"There are {total} features, but keys of {len(low)} patches.")
        keys = context.keys[0].transpose(0, 1).flatten(1)
        density, _ = information_density(keys, self.threshold, self.min_neighbors)
        outliers = upper_outliers(high, self.iqr_factor)
        quartiles = high.quantile(torch.tensor([0.25, 0.75], device=high.device))
        if bool(quartiles[0] == quartiles[1]):
            outliers = outliers[top_indices(high[outliers], total // MOST_OUTLIERS)]
        fewest = min(total, max(FEWEST, round(self.min_keep * total)))
        count = min(total, max(fewest, round(density * total)))
        rest = torch.ones(total, dtype=torch.bool, device=features.device)
        rest[outliers] = False
        left = rest.nonzero()[:, 0]
        if self.strategy == "topk":
            local = left[top_indices(low[left], count)]
        else:
            local = left[gumbel_top_m(low[left], count, context.generator or self._generator(features))]
        kept = torch.cat([outliers, local]).sort().values
        if not self.merge or len(kept) == total:
            return selection(features, kept, low)
        owner = cosines(keys, keys[kept]).argmax(-1)
        owner[kept] = torch.arange(len(kept), device=features.device)
        reduction = combination(features, *means_of(owner, len(kept)))
        reduction.places, reduction.scores = kept, low
        return reduction

    def _generator(self, features: torch.Tensor) -> torch.Generator:
        """Seeded by the setting and the crop's content."""
        content = hashlib.sha256(features.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()
        return torch.Generator().manual_seed(derive_seed(self.seed, content))
