"""A batch of prompts with images -> the same batch with fewer visual tokens.

The encoder runs once, every image's features are reduced by themselves, and ``input_ids``, the masks and the labels
lose the placeholders of what was dropped. What comes out is what ``model(...)`` and ``model.generate(...)`` of
transformers take: ready features in ``mm_encoder_outputs``. Prompts that keep different numbers of tokens are padded
anew.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import BadInputError, UnsupportedModelError
from .base import POSITIONS, Reducer, Reduction, ReductionContext
from .capture import encoder_rows
from .families import MODALITIES, Family, Unit, encoded, encoder_arguments, family_of, positions_of, square, take_back
from .inside import EncoderReducer, ModelReducer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILLS = {"attention_mask": 0, "labels": -100, "mm_token_type_ids": 0, "token_type_ids": 0}
"""Inputs that are aligned with the tokens, and what stands in their padding."""


@dataclass
class ReducedInputs:
    """A batch after the reduction at the language model's input.

    Attributes:
        arguments: for ``model(...)`` or ``model.generate(...)``.
        index: ``[B, L']``, each token's place in the batch as it was given, -1 for padding.
        units: ``[B, L']``, the number of the image (video, crop) that a token belongs to, -1 for text and padding.
        segments: ``[B, L']``, the number of the part of the prompt, -1 for text before the first image.
        reductions: one a unit, in order; empty where nothing reduces at the input.
        totals: unit -> how many tokens it had.
        modalities: unit -> ``"image"`` or ``"video"``.
        grids: unit -> ``(rows, columns)``, or None.
        owners: unit -> the row of the batch.
        input_ids: ``[B, L]`` as given.
    """

    arguments: dict[str, Any]
    index: torch.Tensor
    units: torch.Tensor
    segments: torch.Tensor
    input_ids: torch.Tensor
    reductions: list[Reduction] = field(default_factory=list)
    totals: dict[int, int] = field(default_factory=dict)
    modalities: dict[int, str] = field(default_factory=dict)
    grids: dict[int, tuple[int, int] | None] = field(default_factory=dict)
    owners: dict[int, int] = field(default_factory=dict)

    @property
    def tokens_before(self) -> int:
        """Visual tokens of the whole batch before the reduction."""
        return sum(self.totals.values())

    @property
    def tokens_after(self) -> int:
        """Visual tokens of the whole batch after the reduction at the input."""
        return int((self.units >= 0).sum())


def check_reducer(model: PreTrainedModel, reducer: Reducer, positions: str | None) -> tuple[Family, str]:
    """How the model's class works, and the positions to use; all that can be refused before any input is known.

    Raises:
        UnsupportedModelError: a class that has not been tried, or an encoder that lacks what the reducer needs.
        BadInputError: unknown positions, or packed ones where positions have axes; a model that the reducer was not
            trained for.
    """
    family, name, kind = family_of(model), type(reducer).__name__, type(model).__name__
    if "projector" in reducer.declares.where:
        raise UnsupportedModelError(f"{name} replaces the projector: it is not a reducer of projected features.")
    if positions is not None and positions not in POSITIONS:
        raise BadInputError(f"positions is one of {', '.join(POSITIONS)}; got {positions!r}.")
    needs = reducer.declares.needs
    if family.axes and positions == "packed":
        raise BadInputError(
            f"{kind} places image tokens on rows and columns: a shorter sequence cannot be numbered anew.",
            'Use positions="original".',
        )
    if "grid" in needs and not family.gridded:
        raise UnsupportedModelError(f"{name} needs a full grid of features; {kind} pads and joins tiles of its images.")
    encoder = model.config.vision_config.model_type
    if {"cls", "keys"} & set(needs) and (not family.summary or encoder != family.summary):
        lacks = "a summary token (CLS)" if "cls" in needs else "one key a feature"
        raise UnsupportedModelError(f"{name} needs an encoder with {lacks}; {kind} has {encoder}.")
    if isinstance(reducer, ModelReducer):
        reducer.check_model(model)
    if positions is None:
        positions = "original" if family.axes else reducer.declares.positions
    return family, positions


def placeholders(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    """``[B, L]``: which tokens stand for image or video features.

    Raises:
        BadInputError: no ``input_ids``, no pixels, or no placeholder in them; said before the encoder runs.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        raise BadInputError("Reduction reads input_ids of shape [batch, length].", "Pass what the processor returns.")
    found = torch.zeros_like(ids, dtype=torch.bool)
    given = encoder_arguments(model, inputs)
    for modality in MODALITIES:
        token = getattr(model.config, f"{modality}_token_id", None)
        marks = ids == token if token is not None else torch.zeros_like(found)
        if modality in given and not bool(marks.any()):
            raise BadInputError(f"There are pixels of a {modality}, but the prompt has no place for its features.")
        if modality not in given and bool(marks.any()) and modality == "image":
            raise BadInputError("The prompt has places for image features, but there are no pixels.")
        found |= marks
    if not given:
        raise BadInputError("The prompt is text only: there are no visual tokens to reduce.", "Leave the reducer out.")
    return found


def default_segments(units: torch.Tensor) -> torch.Tensor:
    """``[B, L]``: text belongs to the images right before it; images without text between them are one segment.

    Args:
        units: ``[B, L]`` numbers of the images, -1 for text.
    """
    visual = units >= 0
    begins = visual.clone()
    begins[:, 1:] &= ~visual[:, :-1]
    return begins.long().cumsum(-1) - 1


def reduce_inputs(
    model: PreTrainedModel,
    reducer: Reducer,
    inputs: dict[str, Any],
    positions: str | None = None,
    segments: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> ReducedInputs:
    """Reduces the visual tokens of a batch.

    Args:
        inputs: what the processor returned, with ``labels`` if there are any; other arguments are passed on.
        positions: ``"packed"`` numbers the shorter sequence anew, ``"original"`` keeps every token's number; None takes
            what the reducer declares, or the original ones where they have axes.
        segments: ``[B, L]``, which part of the prompt (an image with its text) a token belongs to, -1 for none; None
            takes the text that follows an image.
        generator: of random choices.

    Raises:
        UnsupportedModelError, BadInputError: see ``check_reducer`` and ``placeholders``; and inputs that are aligned
            with the tokens in a way that is not known.
    """
    family, positions = check_reducer(model, reducer, positions)
    visual = placeholders(model, inputs)
    ids: torch.Tensor = inputs["input_ids"]
    check_aligned(inputs)
    given = inputs.get("attention_mask")
    mask = torch.ones_like(ids, dtype=torch.bool) if given is None else given.bool()
    needs = reducer.declares.needs
    reduces = "model input" in reducer.declares.where
    rows = merged = None
    with contextlib.ExitStack() as reads:
        if isinstance(reducer, EncoderReducer):
            merged = reads.enter_context(reducer.inside(model))
        elif {"cls", "keys"} & set(needs):
            rows = reads.enter_context(encoder_rows(model, reducer))
        outputs, units, used = encoded(model, family, inputs)
    ready = None if merged is None else [merged.reduction(number, unit.features) for number, unit in enumerate(units)]
    totals = [len(unit.features) for unit in units] if ready is None else [item.total for item in ready]
    places, owners = _places(model, ids, units, totals)
    numbers = torch.full_like(ids, -1)
    for number, place in enumerate(places):
        numbers.view(-1)[place] = number
    if segments is None:
        segments = default_segments(numbers)
    result = ReducedInputs({}, ids, numbers, segments, ids, owners=dict(enumerate(owners)))
    keep = mask & ~visual
    chosen: dict[str, list[torch.Tensor]] = {modality: [] for modality in outputs}
    for number, unit in enumerate(units):
        row, place = owners[number], places[number]
        context = ReductionContext(unit.grid, generator=generator)
        if "text" in needs:
            context.text = _text_of(model, ids[row], mask[row], numbers[row], segments[row], number)
        if rows is not None:
            context.cls_queries, context.keys = rows.of(number)
        result.totals[number], result.modalities[number] = totals[number], unit.modality
        result.grids[number] = unit.grid if ready is None else square(totals[number])
        anchors = torch.arange(len(place), device=ids.device)
        features = unit.features
        if ready is not None or reduces:
            reduction = reducer.reduce(unit.features, context) if ready is None else ready[number]
            result.reductions.append(reduction)
            anchors, features = reduction.anchors.to(ids.device), reduction.features
        chosen[unit.modality].append(features)
        keep.view(-1)[place[anchors]] = True
    for modality, output in outputs.items():
        take_back(output, chosen[modality])
    order, there = compact(keep, given is not None and bool((~mask[:, -1]).any()))
    result.index = torch.where(there, order, -1)
    result.units = torch.where(there, numbers.gather(1, order), -1)
    result.segments = torch.where(there, segments.gather(1, order), -1)
    rest = {name: value for name, value in inputs.items() if name not in used}
    if positions == "original":
        full = positions_of(model, family, inputs, mask)
        rest["position_ids"] = torch.where(there, full.gather(-1, order.expand(*full.shape[:-1], -1)), 0)
    if given is not None or not bool(there.all()) or positions == "original":
        # original positions have gaps; without a mask transformers would take those for separate texts
        rest["attention_mask"] = there.to(ids.dtype if given is None else given.dtype)
    for name, fill in FILLS.items():
        if name != "attention_mask" and inputs.get(name) is not None:
            rest[name] = torch.where(there, inputs[name].gather(1, order), fill)
    rest["input_ids"] = torch.where(there, ids.gather(1, order), padding_token(model))
    for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts"):
        rest.pop(name, None)  # they say how to number the full prompt
    result.arguments = rest | {"mm_encoder_outputs": outputs}
    return result


def compact(keep: torch.Tensor, right: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that stay, in their order, as a dense batch.

    Args:
        keep: ``[B, L]`` bool.
        right: pad behind the tokens instead of before them.

    Returns:
        ``[B, L']`` places in the old batch, and ``[B, L']`` bool, False for padding.
    """
    length = int(keep.sum(-1).max())
    if right:
        order = (~keep).int().argsort(dim=-1, stable=True)[:, :length]
    else:
        order = keep.int().argsort(dim=-1, stable=True)[:, keep.shape[1] - length :]
    return order, keep.gather(1, order)


def check_aligned(inputs: dict[str, Any]) -> None:
    """Raises BadInputError for inputs that are aligned with the tokens and would have to be cut in an unknown way."""
    shape = inputs["input_ids"].shape
    for name in ("inputs_embeds", "position_ids", "mm_encoder_outputs"):
        if inputs.get(name) is not None:
            raise BadInputError(f"Reduction makes its own {name}.", f"Leave {name} out.")
    known = {"input_ids", *FILLS}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and name not in known and value.shape[:2] == shape and value.dim() == 2:
            raise BadInputError(f"Reduction does not know how to shorten {name}, which has one value a token.")
    for name in known & set(inputs):
        if inputs[name] is not None and inputs[name].shape != shape:
            raise BadInputError(f"{name} has shape {tuple(inputs[name].shape)}, the prompts have {tuple(shape)}.")


def _places(
    model: PreTrainedModel, ids: torch.Tensor, units: list[Unit], totals: list[int]
) -> tuple[list[torch.Tensor], list[int]]:
    """The places of every unit's placeholders in the flattened batch, and its row.

    Args:
        totals: how many placeholders each unit has.

    Raises:
        BadInputError: as many features as placeholders are needed, and no image may lie in two prompts.
    """
    places: list[torch.Tensor] = []
    owners: list[int] = []
    for modality in dict.fromkeys(unit.modality for unit in units):
        token = getattr(model.config, f"{modality}_token_id")
        found = (ids == token).flatten().nonzero()[:, 0]
        counts = [total for unit, total in zip(units, totals, strict=True) if unit.modality == modality]
        if sum(counts) != len(found):
            raise BadInputError(
                f"The prompts have {len(found)} places for {modality} features; the encoder returned {sum(counts)}.",
                "Use the model's own processor.",
            )
        for place in found.split(counts):
            rows = place // ids.shape[1]
            if bool((rows != rows[0]).any()):
                raise BadInputError(f"The places of one {modality} lie in two prompts of the batch.")
            places.append(place)
            owners.append(int(rows[0]))
    return places, owners


def _text_of(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    units: torch.Tensor,
    segments: torch.Tensor,
    number: int,
) -> torch.Tensor | None:
    """Embeddings of the text in the segment of one unit, or None where there is none; all ``[L]`` of one prompt."""
    segment = segments[units == number][0]
    chosen = ids[mask & (units < 0) & (segments == segment)]
    return model.get_input_embeddings()(chosen).detach() if len(chosen) else None


def padding_token(model: PreTrainedModel) -> int:
    """A token for padding that is no place of a feature."""
    config = model.config
    special = {getattr(config, f"{modality}_token_id", None) for modality in MODALITIES}
    pads = (getattr(config, "pad_token_id", None), getattr(config.get_text_config(), "pad_token_id", None))
    return next(token for token in (*pads, 0, 1, 2) if token is not None and token not in special)
