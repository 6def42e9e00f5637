"""How Token-Shuffle draws: one step of the backbone a window, all tokens of the window at once.

With guidance, every image is computed twice, with its text (c) and without any (u), and tokens come from::

    l_u + w_m (l_c - l_u)            w_m by a schedule over the windows; 1 is no guidance

Temperature, top-k and top-p act on each token, not on the window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from ...core.errors import BadInputError
from ...core.progress import Report
from ...core.rng import numpy_generator
from ..grid import Grid
from ..images.guidance import check_guidance, guidance_scale, guide
from .shuffle import WindowOrder

if TYPE_CHECKING:
    from .modeling_token_shuffle import TokenShuffleForConditionalGeneration


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        guidance: w, the full scale; 1 is no guidance.
        schedule: of the scale over the windows (``images.guidance.SCHEDULES``).
        temperature: of the guided logits.
        top_k: keep so many tokens; 0 keeps all.
        top_p: keep the likeliest tokens that have this probability together.
        do_sample: False takes the likeliest token.

    Raises:
        BadInputError: a value out of range.
    """

    guidance: float = 1.0
    schedule: str = "half-linear"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    do_sample: bool = True

    def __post_init__(self) -> None:
        check_guidance(self.schedule, self.guidance)
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise BadInputError(f"temperature is positive; got {self.temperature}.", "do_sample=False is greedy.")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise BadInputError(f"top_k is 0 or more, top_p above 0 to 1; got {self.top_k} and {self.top_p}.")

    def scales(self, windows: int) -> list[float]:
        """The scale at every window: ``half-linear`` over m / M, as the paper has it; ``linear`` ends at the full
        scale, and an image of one window has it.
        """
        last = windows if self.schedule == "half-linear" else windows - 1
        shares = [1.0] if windows == 1 else [number / last for number in range(windows)]
        return [guidance_scale(self.schedule, self.guidance, share) for share in shares]

    def choose(self, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Tokens ``[B, w]`` from logits ``[B, w, V]`` and numbers ``[B, w]`` from 0 to below 1, one a token."""
        if not self.do_sample:
            return logits.argmax(-1)
        flat = logits.flatten(0, 1).float() / self.temperature
        ids = flat.new_zeros(len(flat), 1, dtype=torch.long)  # which the warpers do not read
        if 0 < self.top_k < flat.shape[-1]:
            flat = TopKLogitsWarper(self.top_k)(ids, flat)
        if self.top_p < 1:
            flat = TopPLogitsWarper(self.top_p)(ids, flat)
        reached = flat.double().softmax(-1).cumsum(-1)
        point = uniform.flatten()[:, None] * reached[:, -1:]
        return (reached <= point).sum(-1).view(logits.shape[:2])


@dataclass
class ImageGeneration:
    """Images and how they came about.

    Attributes:
        codes: ``[B, H, W]`` from 0, without the offset of image ids.
        logps: ``[B, H, W]`` log-probability of every token given the text, over the whole vocabulary, before guidance
            and temperature.
        guidance: ``[M]`` the scale at every window.
        window: ``[H, W]`` the number of the window of every token.
        positions: how many positions the backbone's cache held at the end; 0 without one.
    """

    codes: torch.Tensor
    logps: torch.Tensor
    guidance: list[float]
    window: torch.Tensor
    positions: int

    def grown(self, blank: int = 0) -> torch.Tensor:
        """The images after every window, ``[B, M, H, W]``; tokens that are not drawn yet are ``blank``."""
        steps = torch.arange(len(self.guidance), device=self.codes.device)
        return torch.where(self.window <= steps[:, None, None], self.codes[:, None], blank)


def left_padded(ids: torch.Tensor, mask: torch.Tensor | None, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``[B, T]`` with their padding moved to the left, and their mask."""
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    order = real.to(torch.int8).argsort(dim=1, stable=True)
    real = real.gather(1, order)
    return ids.gather(1, order).masked_fill(~real, pad), real


@torch.no_grad()
def draw_images(
    model: TokenShuffleForConditionalGeneration,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    grid: Grid,
    sampling: Sampling,
    seeds: Sequence[int] | None,
    report: Report,
    use_cache: bool,
) -> ImageGeneration:
    """The loop; arguments and errors as for ``TokenShuffleForConditionalGeneration.generate``."""
    config, device = model.config, model.device
    _check_texts(model, ids, mask)
    order = WindowOrder(*grid, tuple(config.window), device)  # type: ignore[arg-type]
    seeds = torch.randint(2**31, (len(ids),)).tolist() if seeds is None else list(seeds)
    if len(seeds) != len(ids):
        raise BadInputError(f"{len(seeds)} seeds for {len(ids)} images.", "Give one a row.")
    limit = getattr(config.backbone_config, "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + 1 + order.windows > limit:
        raise BadInputError(
            f"{ids.shape[1] + 1} positions of text and {order.windows} of windows are more than the {limit} of the "
            "backbone.",
            "Take a smaller grid or a larger window.",
        )
    drawn = [numpy_generator(seed, "token-shuffle").random((order.windows, order.tokens)) for seed in seeds]
    uniform = torch.from_numpy(np.stack(drawn)).to(device)
    scales = sampling.scales(order.windows)
    guided = any(scale != 1 for scale in scales)

    text, real = left_padded(ids.to(device), None if mask is None else mask.to(device), config.pad_token_id or 0)
    text = torch.nn.functional.pad(text, (0, 1), value=config.boi_token_id)
    real = torch.nn.functional.pad(real, (0, 1), value=True)
    if guided:  # the same number of rows without text, behind those with it
        nothing = torch.zeros_like(real)
        nothing[:, -1] = True
        text, real = torch.cat([text, text]), torch.cat([real, nothing])
    reader = _Reader(model, use_cache)
    state = reader.read(model.get_input_embeddings()(text), real)
    first, rows, windows, logps = config.image_token_start, len(ids), [], []
    assert first is not None
    for number, scale in enumerate(scales):
        logits = model.next_window(state).float()
        own = logits[:rows]
        codes = slice(first, first + config.num_image_tokens)
        choice = own[..., codes]
        if guided:
            choice = guide(choice, logits[rows:, :, codes], scale)
        chosen = sampling.choose(choice, uniform[:, number]) + first
        windows.append(chosen)
        logps.append(own.log_softmax(-1).gather(-1, chosen[..., None])[..., 0])
        report("drawing windows", number + 1, order.windows)
        if number + 1 < order.windows:
            fused = model.shuffle(model.get_input_embeddings()(chosen))[:, None]
            state = reader.read(fused.repeat(2, 1, 1) if guided else fused)
    place = torch.arange(order.windows, device=device)[None, :, None].expand(1, -1, order.tokens)
    return ImageGeneration(
        codes=order.scatter(torch.stack(windows, 1)).view(rows, *grid) - first,
        logps=order.scatter(torch.stack(logps, 1)).view(rows, *grid),
        guidance=scales,
        window=order.scatter(place).view(grid),
        positions=reader.positions,
    )


class _Reader:
    """The backbone, fed one part after the other: with a cache, or with everything so far at each step."""

    def __init__(self, model: TokenShuffleForConditionalGeneration, use_cache: bool):
        self.model = model
        self.cache = model.new_cache() if use_cache else None
        self.embeds: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None

    def read(self, embeds: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The last hidden state ``[B, d]`` after further positions ``[B, U, d]``; ``mask`` is theirs."""
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], 1)
        places = (self.mask.cumsum(1) - 1).clamp_min(0)
        if self.cache is None:
            self.embeds = embeds = embeds if self.embeds is None else torch.cat([self.embeds, embeds], 1)
        else:
            places = places[:, -embeds.shape[1] :]
        return self.model.read(embeds, self.mask, self.cache, places)[0][:, -1]

    @property
    def positions(self) -> int:
        return 0 if self.cache is None else int(self.cache.get_seq_length())


def _check_texts(model: TokenShuffleForConditionalGeneration, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    if ids.dim() != 2 or ids.is_floating_point() or not len(ids):
        raise BadInputError(f"Texts are ids of shape [B, T]; got {ids.dtype} {[*ids.shape]}.")
    if mask is not None and mask.shape != ids.shape:
        raise BadInputError(f"attention_mask must be [B, T], {tuple(ids.shape)}; got {tuple(mask.shape)}.")
    config = model.config
    if ids.numel() and not bool(((ids >= 0) & (ids < config.vocab_size)).all()):
        raise BadInputError(f"Ids lie from 0 to {config.vocab_size - 1}.")
    marks = (ids == config.boi_token_id) | (ids == config.eoi_token_id) | model.is_image(ids)
    if bool((marks if mask is None else marks & mask.bool()).any()):
        raise BadInputError("A text holds no image tokens, <boi> or <eoi>.", "<boi> follows of itself.")
