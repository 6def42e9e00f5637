"""What canvas samplers and likelihoods ask of a model: logits of every position that see the whole canvas.

Any model with ``.logits`` whose attention looks both ways fits: BERT and ModernBERT, LLaDA, ``AnyOrderLM``; models such
as Dream, whose row i predicts position i + 1, say so by ``config.shift_logits``. Whether a model fits is found out by
changing its inputs, since no attribute tells it for sure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ...core.errors import BadInputError, UnsupportedModelError
from ...core.modes import evaluating
from ..inputs import takes

PROBE = 8
"""Tokens of the rows that a model is tested with."""
_tested: WeakKeyDictionary[torch.nn.Module, set[str]] = WeakKeyDictionary()


def positions_of(attention: torch.Tensor) -> torch.Tensor:
    """``[B, T]`` positions that count what is attended to, so that padding shifts nothing."""
    return (attention.long().cumsum(1) - 1).clamp(min=0)


def mask_token(model: Any, given: int | None = None) -> int:
    """The id that stands for an open position: the given one, or the configuration's.

    Raises:
        BadInputError: there is neither, or the model has no vector for it.
    """
    config = model.config.get_text_config() if hasattr(model, "config") else None  # a wrapper of processes has none
    found = given if given is not None else getattr(config, "mask_token_id", None)
    if found is None:
        raise BadInputError(f"{type(model).__name__} names no mask token.", "Give it: mask_id=tokenizer.mask_token_id.")
    size = getattr(config, "vocab_size", None)
    if size is not None and not 0 <= found < size:
        raise BadInputError(f"mask_id={found} is no token: the vocabulary has {size}.")
    return int(found)


@dataclass
class CanvasModel:
    """A model as a function from canvases to logits.

    Args:
        model: any model with ``.logits [B, T, V]``.
        mask_id: never predicted; its logit is minus infinity. None predicts all ids.
        shift: row i of the logits predicts position i + 1, and is moved; None asks ``config.shift_logits``.

    Attributes:
        forwards: how many forward passes were made.
    """

    model: Any
    mask_id: int | None = None
    shift: bool | None = None
    forwards: int = 0

    def __post_init__(self) -> None:
        if self.shift is None:
            self.shift = bool(getattr(getattr(self.model, "config", None), "shift_logits", False))

    def logits(
        self, ids: torch.Tensor, attention: torch.Tensor | None = None, where: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Float32 logits ``[B, T, V]``, or ``[N, V]`` of the positions that ``where [B, T]`` names."""
        found = self.model(**self._inputs(ids, attention)).logits
        self.forwards += 1
        if self.shift:
            found = torch.cat([found[:, :1], found[:, :-1]], 1)
        found = found.float() if where is None else found[where].float()
        if self.mask_id is not None and self.mask_id < found.shape[-1]:
            if where is not None and not found.requires_grad:  # a copy already, and a large one
                found[..., self.mask_id] = -torch.inf
                return found
            closed = torch.zeros(found.shape[-1], dtype=torch.bool, device=found.device)
            closed[self.mask_id] = True
            found = found.masked_fill(closed, -torch.inf)
        return found

    def _inputs(self, ids: torch.Tensor, attention: torch.Tensor | None) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": ids}
        if attention is None or bool(attention.all()):
            return inputs
        inputs["attention_mask"] = attention.long()
        if takes(self.model, "position_ids"):
            inputs["position_ids"] = positions_of(attention)
        return inputs

    # -- what a model must do ------------------------------------------------------------------------------------------
    @torch.no_grad()
    def check(self, padded: bool = False) -> None:
        """Finds out, once a model, whether its attention looks both ways and, for padded rows, whether it leaves
        padding out.

        Raises:
            UnsupportedModelError: it does not; says which logits moved.
        """
        done = _tested.setdefault(self.model, set())
        if "both ways" not in done:
            with evaluating(self.model):
                self._check_both_ways()
            done.add("both ways")
        if padded and "padding" not in done:
            with evaluating(self.model):
                self._check_padding()
            done.add("padding")

    def _probe(self) -> torch.Tensor:
        size = int(self.model.config.get_text_config().vocab_size)
        ids = torch.randint(size, (2, PROBE), generator=torch.Generator().manual_seed(0))
        ids[1] = ids[0]
        ids[1, -1] = (ids[0, -1] + 1 + size // 2) % size
        return ids.to(next(self.model.parameters()).device)

    def _check_both_ways(self) -> None:
        name = type(self.model).__name__
        output = self.model(input_ids=self._probe())
        logits = getattr(output, "logits", None)
        if logits is None or logits.dim() != 3 or logits.shape[1] != PROBE:
            raise UnsupportedModelError(
                f"{name} gives no logits of every position.", "Load it as a masked language model."
            )
        moved = (logits[0] - logits[1]).abs().amax(-1) > 0
        if not bool(moved[:-1].any()):
            raise UnsupportedModelError(
                f"{name} is causal: with another last token only the logits of the last of {PROBE} positions moved.",
                "A canvas is written in any order; take a model whose attention looks both ways.",
            )
        if not bool(moved[:2].any()):
            where = ", ".join(str(place) for place in moved.nonzero()[:, 0].tolist())
            raise UnsupportedModelError(
                f"{name} looks ahead only in part: with another last token the logits of positions {where} of "
                f"{PROBE} moved.",
                "Take a model whose attention looks both ways.",
            )

    def _check_padding(self) -> None:
        name, hint = type(self.model).__name__, "Write rows of one length, or one row at a time."
        if not takes(self.model, "attention_mask"):
            raise UnsupportedModelError(f"{name}.forward takes no attention_mask, and these rows are padded.", hint)
        ids = self._probe()[:1]
        attention = torch.ones_like(ids)
        attention[:, :3] = 0
        alone = self.model(input_ids=ids[:, 3:]).logits[0]
        padded = self.model(**self._inputs(ids, attention)).logits[0, 3:]
        scale = alone.abs().max().clamp(min=1.0)
        if float((alone - padded).abs().max() / scale) > 0.02:
            raise UnsupportedModelError(f"{name} reads a padded row in another way than the row alone.", hint)
