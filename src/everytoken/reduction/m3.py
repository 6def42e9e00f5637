"""Matryoshka Multimodal Models: nested sets of visual tokens, and their number is a dial (M3, arXiv 2405.17430).

The projected features X ``[g, g, d]`` of an image are averaged in blocks of k x k, for several k at once. Every coarser
set is an average of the finer ones::

    X^s = avg_pool2d(X, k),    s = (g / k)^2 tokens
    loss = 1/|S| sum over s in S of CE(answer | X^s, question)

There are no new weights. The encoder runs once for all scales. At inference ``MatryoshkaPool`` chooses the scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn import functional as F

from ..core.errors import BadInputError, UnsupportedModelError
from .base import Declaration, Reduction, ReductionContext, check_features
from .families import square

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = Mapping[str, torch.Tensor]
"""``input_ids [B, T]``, ``attention_mask [B, T]``, ``labels [B, T]`` and ``pixel_values``, as processors make them."""


def legal_scales(rows: int, columns: int | None = None) -> list[int]:
    """The numbers of tokens into which a grid can be averaged in square blocks, the largest first."""
    columns = rows if columns is None else columns
    return [rows * columns // k**2 for k in range(1, min(rows, columns) + 1) if rows % k == 0 and columns % k == 0]


def block_side(num_tokens: int, grid: tuple[int, int]) -> int:
    """k: the side of the blocks that leave ``num_tokens`` of a grid.

    Raises:
        BadInputError: no square block does; names the numbers that there are.
    """
    known = legal_scales(*grid)
    if num_tokens not in known:
        raise BadInputError(
            f"A grid of {grid[0]} x {grid[1]} cannot be averaged into {num_tokens} tokens.",
            f"In square blocks it makes: {', '.join(map(str, known))}.",
        )
    return math.isqrt(grid[0] * grid[1] // num_tokens)


def pool_scale(features: torch.Tensor, num_tokens: int, grid: tuple[int, int] | None = None) -> torch.Tensor:
    """X^s: ``[..., N, d]`` in raster order -> ``[..., s, d]``, computed in float32 and cast back.

    Args:
        num_tokens: s.
        grid: ``(rows, columns)``; None is a square.

    Raises:
        BadInputError: N is no such grid, or s none of its scales.
    """
    grid = square_of(features.shape[-2]) if grid is None else grid
    if grid[0] * grid[1] != features.shape[-2]:
        raise BadInputError(f"{features.shape[-2]} features are no grid of {grid[0]} x {grid[1]}.")
    k = block_side(num_tokens, grid)
    if k == 1:
        return features
    flat = features.reshape(-1, *grid, features.shape[-1]).permute(0, 3, 1, 2)
    coarse = F.avg_pool2d(flat.float(), k).flatten(2).transpose(1, 2)
    return coarse.reshape(*features.shape[:-2], num_tokens, -1).to(features.dtype)


def square_of(count: int) -> tuple[int, int]:
    """The square grid of so many features.

    Raises:
        BadInputError: there is none.
    """
    if (grid := square(count)) is None:
        raise BadInputError(
            f"{count} features lie on no square grid.", "Drop the class token, or give the grid as (rows, columns)."
        )
    return grid


@dataclass
class MatryoshkaPool:
    """Averages an image's projected tokens in square blocks.

    Args:
        num_tokens: how many stay. A grid of 24 x 24 makes 576, 144, 64, 36, 16, 9, 4 or 1, one of 8 x 8 makes 64, 16, 4
            or 1.

    Raises:
        BadInputError: fewer than one token.
    """

    num_tokens: int = 16
    declares: ClassVar[Declaration] = Declaration(
        where=("model input",),
        criterion="none",
        strategy="pool",
        budget="a scale of the grid, chosen at every call",
        needs=("grid", "training"),
    )

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise BadInputError(f"An image keeps one token at least; got {self.num_tokens}.")

    def reduce(self, features: torch.Tensor, context: ReductionContext) -> Reduction:
        """Block means of ``features [N, d]``.

        Raises:
            BadInputError: the features lie on no full grid, or ``num_tokens`` is none of its scales.
        """
        check_features(features)
        grid = square_of(len(features)) if context.grid is None else context.grid
        k = block_side(self.num_tokens, grid)
        rows, columns = (torch.arange(length, device=features.device) // k for length in grid)
        owner = (rows[:, None] * (grid[1] // k) + columns).flatten()
        assignment = F.one_hot(owner, self.num_tokens).T.float() / k**2
        sizes = torch.full((self.num_tokens,), k**2, device=features.device)
        return Reduction(pool_scale(features, self.num_tokens, grid), None, assignment, sizes, len(features))


# -- training ---------------------------------------------------------------------------------------------------------
def projected(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """X: projected features ``[images, N, d]`` of a batch, one pass over the encoder.

    Raises:
        BadInputError: the batch has no images.
        UnsupportedModelError: the model hands back features that lie on no square grid (crops, unequal images).
    """
    pixels = batch.get("pixel_values")
    if pixels is None:
        raise BadInputError("The batch holds no images.", "Give pixel_values, as a processor makes them.")
    found = getattr(model, "get_image_features", None)
    if found is None or "mm_encoder_outputs" not in _arguments(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} takes no image features of its caller's.", "LLaVA does, and most others of v5."
        )
    rest = {name: batch[name] for name in ("image_sizes", "image_grid_thw") if name in batch}
    features = model.get_image_features(pixels, return_dict=True, **rest).pooler_output
    shapes = {tuple(item.shape) for item in features}
    if len(shapes) != 1 or square(next(iter(shapes))[-2]) is None or rest:
        raise UnsupportedModelError(
            f"{type(model).__name__} makes image features that lie on no one square grid.",
            "Nested scales need every image on the same full grid, as LLaVA has it.",
        )
    return torch.stack(list(features))


def _arguments(model: PreTrainedModel) -> set[str]:
    import inspect

    return set(inspect.signature(model.forward).parameters)


def shortened(batch: Batch, image_token: int, old: int, new: int) -> dict[str, torch.Tensor]:
    """The texts of a batch with ``new`` of every image's ``old`` placeholders: ids, mask and labels.

    Raises:
        BadInputError: the placeholders of a row are no whole number of images, or rows hold unequal numbers of images.
    """
    ids = batch["input_ids"]
    placeholder = ids == image_token
    counts = placeholder.sum(1)
    if bool((counts % old).any()) or len(counts.unique()) != 1:
        raise BadInputError(
            f"Rows hold {sorted(set(counts.tolist()))} image placeholders, which are not as many images of {old} each.",
            "Make them with the model's processor, with as many images in every row.",
        )
    place = placeholder.cumsum(1) - 1
    kept = ~placeholder | (place % old < new)
    width = int(kept[0].sum())
    names = [name for name in ("input_ids", "attention_mask", "labels") if name in batch]
    return {name: batch[name][kept].reshape(len(ids), width) for name in names}


def scale_loss(
    model: PreTrainedModel, batch: Batch, features: torch.Tensor, num_tokens: int, **kwargs: Any
) -> torch.Tensor:
    """CE(s): the model's own loss with ``num_tokens`` a image, positions numbered anew.

    Args:
        features: X, from ``projected``.
        kwargs: for the model's forward.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    coarse = pool_scale(features, num_tokens)
    texts = shortened(batch, model.config.image_token_id, features.shape[1], num_tokens)
    images = BaseModelOutputWithPooling(pooler_output=list(coarse))  # type: ignore[arg-type]
    loss: torch.Tensor = model(**texts, mm_encoder_outputs={"image": images}, **kwargs).loss
    return loss


def matryoshka_loss(
    model: PreTrainedModel,
    batch: Batch,
    scales: Sequence[int],
    weights: Sequence[float] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The mean of the losses at all scales, and the losses; the encoder runs once.

    Args:
        model: a vision-language model whose images lie on one square grid each.
        batch: with ``labels``.
        scales: S, numbers of tokens.
        weights: of the scales, with a sum of 1; None is equal ones.
        kwargs: for the model's forward.

    Raises:
        BadInputError: no scale, or one that is none of the grid; weights that do not fit; a batch without labels.
        UnsupportedModelError: see ``projected``.
    """
    shares = _shares(scales, weights, batch)
    features = projected(model, batch)
    losses = {s: scale_loss(model, batch, features, s, **kwargs) for s in scales}
    total = torch.stack([share * losses[s] for s, share in shares.items()]).sum()
    return total, {s: loss.detach() for s, loss in losses.items()}


def matryoshka_backward(
    model: PreTrainedModel,
    batch: Batch,
    scales: Sequence[int],
    weights: Sequence[float] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """``matryoshka_loss`` and its backward pass, one scale at a time, which needs the memory of the largest alone.

    The gradient that reaches the projected features is summed over the scales, then goes through the encoder once.
    Arguments, result and errors are those of ``matryoshka_loss``; the loss is detached.
    """
    shares = _shares(scales, weights, batch)
    features = projected(model, batch)
    held = features.detach().requires_grad_(features.requires_grad)
    losses = {}
    for s, share in shares.items():
        loss = scale_loss(model, batch, held, s, **kwargs)
        (share * loss).backward()
        losses[s] = loss.detach()
    if held.grad is not None:
        features.backward(held.grad)
    return torch.stack([share * losses[s] for s, share in shares.items()]).sum(), losses


def _shares(scales: Sequence[int], weights: Sequence[float] | None, batch: Batch) -> dict[int, float]:
    if not scales or len(set(scales)) != len(scales):
        raise BadInputError(f"Scales are different numbers of tokens, one at least; got {list(scales)}.")
    if "labels" not in batch:
        raise BadInputError("The batch holds no labels.", "Set those that are no answer to -100.")
    chosen = [1 / len(scales)] * len(scales) if weights is None else list(weights)
    if len(chosen) != len(scales) or min(chosen) < 0 or not math.isclose(sum(chosen), 1, abs_tol=1e-6):
        raise BadInputError(f"There is one weight a scale, 0 or more, with a sum of 1; got {chosen}.")
    return dict(zip(scales, chosen, strict=True))


class MatryoshkaMixin:
    """For transformers' trainers: the loss is the mean over ``scales``. Put it before the trainer::

    class Trained(MatryoshkaMixin, Trainer):
        scales = (576, 144, 36, 9, 1)
    """

    scales: tuple[int, ...] = (576, 144, 36, 9, 1)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> Any:
        """The loss of a batch.

        Raises:
            UnsupportedModelError: outputs are asked for; those of several scales have no common form.
        """
        if return_outputs:
            raise UnsupportedModelError(
                "Outputs of several scales have no common form.", "Set prediction_loss_only=True."
            )
        more: dict[str, Any] = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        return matryoshka_loss(model, inputs, self.scales, **more)[0]


# -- what a data set needs --------------------------------------------------------------------------------------------
@dataclass
class GranularityReport:
    """Which scale answers which question.

    Args:
        right: scale -> whether each question was answered right, the same questions in the same order.
        kinds: of the questions; empty where there are none.

    Raises:
        BadInputError: no scale, or unequal numbers of questions.
    """

    right: dict[int, list[bool]]
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = {len(values) for values in self.right.values()}
        if len(counts) != 1 or 0 in counts or (self.kinds and {len(self.kinds)} != counts):
            raise BadInputError("Every scale answers the same questions, one at least, and each question has a kind.")

    def accuracy(self, kind: str | None = None) -> dict[int, float]:
        """Share of right answers by scale, of one kind of question or of all."""
        places = [i for i in range(self.count) if kind is None or self.kinds[i] == kind]
        if not places:
            raise BadInputError(f"There is no question of the kind {kind!r}.", f"There are: {sorted(set(self.kinds))}.")
        return {s: sum(values[i] for i in places) / len(places) for s, values in sorted(self.right.items())}

    @property
    def count(self) -> int:
        """How many questions there are."""
        return len(next(iter(self.right.values())))

    def oracle(self) -> tuple[float, float]:
        """Accuracy and mean number of tokens where every question takes the smallest scale that answers it right.

        A question that no scale answers is charged the largest (the paper does not say; this is the careful choice).
        """
        scales = sorted(self.right)
        needed = [next((s for s in scales if self.right[s][i]), None) for i in range(self.count)]
        solved = sum(s is not None for s in needed) / self.count
        return solved, sum(scales[-1] if s is None else s for s in needed) / self.count
