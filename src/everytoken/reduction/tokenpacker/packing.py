"""TokenPacker in a LLaVA: another projector, and nothing else of the model is touched.

::

    with packed(model, TokenPacker(scale=2)) as projector:
        inputs = packed_processor(processor, projector)(images=image, text=text, return_tensors="pt")
        model.generate(**inputs)                # a quarter of the visual tokens

Behind the block the model is what it was.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...core.errors import BadInputError, UnsupportedModelError
from ...core.quiet import quiet_transformers
from ...core.weights import safetensors_file, weights_for
from ..base import Declaration, Reduction, ReductionContext, check_features
from ..changed_weights import read_changed, save_changed, swapped
from .configuration_tokenpacker import TokenPackerConfig, check_query_pool
from .modeling_tokenpacker import TokenPackerProjector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

KIND = "tokenpacker"
"""The kind of shipped weights."""


@dataclass
class TokenPacker:
    """A projector that lets every coarse point of an image attend to its own region of several encoder levels.

    Args:
        scale: s, a token stands for s x s features.
        query_pool: how coarse points are made, ``"bilinear"`` or ``"mean"``; see ``TokenPackerConfig``. A trained
            projector keeps its own.
        weights: folder of a trained projector (``everytoken train tokenpacker``); None takes the one that ships for the
            model, where there is one of this scale.

    Raises:
        BadInputError: a value out of range.
    """

    scale: int = 2
    query_pool: str = "bilinear"
    weights: str | None = None
    projector: TokenPackerProjector | None = None
    declares: ClassVar[Declaration] = Declaration(
        where=("projector",),
        criterion="attention of a coarse point to its region",
        strategy="distil",
        budget="1 / s^2",
        needs=("grid", "levels", "training"),
    )

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise BadInputError(f"A token stands for one feature a side at least; got {self.scale}.")
        check_query_pool(self.query_pool)

    def folder(self, model: PreTrainedModel) -> Path:
        """Where the trained projector for a model lies.

        Raises:
            BadInputError: none is given, and none ships for this model.
        """
        found = Path(self.weights).expanduser() if self.weights else weights_for(model.config, KIND)
        if found is None or not (found / "config.json").is_file():
            raise BadInputError(
                f"There is no trained TokenPacker in {found}." if found else "No TokenPacker ships for this model.",
                "Train one: everytoken train tokenpacker --out packer; then set weights=packer.",
            )
        return found

    def load(self, model: PreTrainedModel) -> TokenPackerProjector:
        """The trained projector for a model.

        Raises:
            BadInputError: there is none, or it was trained for another scale.
        """
        if self.projector is None:
            folder = self.folder(model)
            safetensors_file(folder)  # pickles are named as such
            with quiet_transformers():
                loaded = TokenPackerProjector.from_pretrained(folder, use_safetensors=True)
            self.projector = loaded.to(model.device).eval()
        if self.projector.config.scale != self.scale:
            raise BadInputError(
                f"This projector was trained for scale {self.projector.config.scale}, not {self.scale}.",
                "Set scale to it, or train another.",
            )
        return self.projector

    def reduce(self, features: torch.Tensor, context: ReductionContext) -> Reduction:
        """The projector on the features of one image, outside any model.

        Args:
            features: ``[N, C]``, the query's encoder level without the class token.
            context: with ``levels``, each ``[N, C]``, and the ``grid`` where it is no square.

        Raises:
            BadInputError: no projector was loaded, or the levels are not those that it reads.
        """
        check_features(features)
        if self.projector is None:
            raise BadInputError("TokenPacker has no projector yet.", "Call load(model), or give projector=...")
        if len(context.levels) != self.projector.config.num_levels:
            raise BadInputError(
                f"This projector reads {self.projector.config.num_levels} levels; got {len(context.levels)}."
            )
        levels = torch.cat(context.levels, -1)
        packed_features, weights = self.projector.packed(features[None], levels[None], context.grid, need_weights=True)
        assert weights is not None
        shape = context.grid or (round(len(features) ** 0.5),) * 2
        assignment = region_matrix(weights[0], shape, self.scale)
        sizes = torch.full((len(assignment),), self.scale**2, device=features.device)
        return Reduction(packed_features[0], None, assignment, sizes, len(features))


def region_matrix(weights: torch.Tensor, shape: tuple[int, int], scale: int) -> torch.Tensor:
    """Attention inside regions ``[M, s^2]`` as a matrix over all features ``[M, N]``."""
    rows, columns = (torch.arange(length, device=weights.device) for length in shape)
    owner = ((rows[:, None] // scale) * (shape[1] // scale) + columns // scale).flatten()
    inside = ((rows[:, None] % scale) * scale + columns % scale).flatten()
    matrix = torch.zeros(len(weights), len(owner), dtype=weights.dtype, device=weights.device)
    places = torch.arange(len(owner), device=weights.device)
    matrix[owner, places] = weights[owner, inside]
    return matrix


# -- in a model -------------------------------------------------------------------------------------------------------
def check_llava(model: PreTrainedModel) -> None:
    """Refuses models whose projector cannot be replaced by this one.

    Raises:
        UnsupportedModelError: not a LLaVA, or one that keeps the class token among its features.
    """
    kind = getattr(model.config, "model_type", "")
    if kind != "llava" or not hasattr(model.base_model, "multi_modal_projector"):
        raise UnsupportedModelError(
            f"TokenPacker takes the place of LLaVA's projector; {type(model).__name__} ({kind or 'no type'}) has none "
            "of that form.",
            "Models that lay out tiles after the projector need its full grid.",
        )
    if model.config.vision_feature_select_strategy != "default":
        raise UnsupportedModelError(
            "TokenPacker reads a full grid of features, and this model keeps the class token among them.",
            'It works with vision_feature_select_strategy="default".',
        )


def new_projector(
    model: PreTrainedModel,
    scale: int = 2,
    levels: tuple[int, ...] | None = None,
    query_pool: str = "bilinear",
    width: int | None = None,
) -> TokenPackerProjector:
    """An untrained projector of a model's sizes.

    Args:
        scale, query_pool, width: see ``TokenPackerConfig``.
        levels: hidden states of the encoder, the query's last; None takes half of its depth, two thirds, and the two
            last but one, as the paper does for 24 layers (12, 16, 22, 23), or all layers of one with four or fewer.

    Raises:
        UnsupportedModelError: see ``check_llava``.
        BadInputError: a level that the encoder has not, or a value out of range.
    """
    check_llava(model)
    vision = model.config.vision_config
    depth = vision.num_hidden_layers
    if levels is None:
        levels = tuple(range(1, depth + 1)) if depth <= 4 else (depth // 2, 2 * depth // 3, depth - 2, depth - 1)
    if not levels or not all(-depth - 1 <= level <= depth for level in levels):
        raise BadInputError(f"The encoder has the levels 0 to {depth}; got {list(levels)}.")
    config = TokenPackerConfig(
        vision_hidden_size=vision.hidden_size,
        text_hidden_size=model.config.get_text_config().hidden_size,
        grid=vision.image_size // vision.patch_size,
        scale=scale,
        levels=levels,
        query_pool=query_pool,
        width=width,
    )
    return TokenPackerProjector(config).to(device=model.device, dtype=model.dtype)


@contextlib.contextmanager
def packed(model: PreTrainedModel, packer: TokenPacker | TokenPackerProjector) -> Iterator[TokenPackerProjector]:
    """Inside the block the model projects its images with a TokenPacker.

    Args:
        model: a LLaVA.
        packer: a projector; or settings, whose trained projector is loaded. The language model's weights that were
            trained with it are used inside the block too.

    Raises:
        UnsupportedModelError: see ``check_llava``.
        BadInputError: there is no trained projector, or it has other sizes than the model.
    """
    check_llava(model)
    changed: dict[str, torch.Tensor] = {}
    if isinstance(packer, TokenPacker):
        given = packer.projector is not None
        projector = packer.load(model)
        changed = {} if given and packer.weights is None else read_changed(packer.folder(model))
    else:
        projector = packer
    sizes, config = projector.config, model.config
    vision = config.vision_config
    theirs = (vision.hidden_size, config.get_text_config().hidden_size, vision.image_size // vision.patch_size)
    if theirs != (sizes.vision_hidden_size, sizes.text_hidden_size, sizes.grid):
        raise BadInputError(
            f"This projector is for widths of {sizes.vision_hidden_size} and {sizes.text_hidden_size} and a grid of "
            f"{sizes.grid}; the model has {theirs[0]}, {theirs[1]} and {theirs[2]}.",
            "Train one for this model.",
        )
    base, before = model.base_model, (config.vision_feature_layer, config.image_seq_length)
    own, weights = base.multi_modal_projector, swapped(model, changed)
    base.multi_modal_projector = projector
    config.vision_feature_layer, config.image_seq_length = list(sizes.levels), sizes.num_tokens
    try:
        yield projector
    finally:
        base.multi_modal_projector = own
        config.vision_feature_layer, config.image_seq_length = before
        swapped(model, weights)


def packed_processor(processor: ProcessorMixin, projector: TokenPackerProjector) -> Any:
    """A processor that puts as many placeholders into a text as the projector makes tokens; the given one stays.

    Raises:
        UnsupportedModelError: not LLaVA's processor.
    """
    if type(processor).__name__ != "LlavaProcessor":
        raise UnsupportedModelError(f"TokenPacker works with LLaVA's processor, not with {type(processor).__name__}.")
    changed = copy.copy(processor)
    # it counts placeholders by the size of patches, and a token stands for scale x scale of them
    changed.patch_size = processor.patch_size * projector.config.scale
    return changed


# -- on disk ----------------------------------------------------------------------------------------------------------
def save_packer(
    projector: TokenPackerProjector, folder: Path, changed: Mapping[str, torch.Tensor] | None = None
) -> None:
    """A projector and the model's weights that were trained with it.

    Args:
        changed: names and values of those weights; the language model's, as a rule.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        projector.save_pretrained(folder)
    save_changed(folder, changed or {})
