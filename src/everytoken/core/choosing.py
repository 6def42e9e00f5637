"""Which way of running a model's weights is used where nobody names one: the fastest that changes no result.

Weights as they come and packed ones are the same numbers. Weights of 4 bits are, where the model is a GGUF file of
exactly 4 bits. Where a way that rounds would be faster, ``Choice.advice`` says so and how to ask for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .calibration import NEEDED, SPREAD, Calibration, Curve, calibrate, lookup, machine_key, shape_hash
from .converted import cache_dir, exact_in_4_bits
from .loading import dtype_and_device, load_config, load_model
from .progress import Report, silent

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

OFF = "EVERYTOKEN_CALIBRATE"
"""With ``0`` in this variable of the environment nothing is measured, as with ``--no-calibrate``."""
FASTER = 1.1
"""A way that rounds is spoken of where it is faster by so much."""


@dataclass(frozen=True)
class Choice:
    """How a model's weights will run, and why.

    Attributes:
        way: see ``core.loading.WEIGHTS``.
        why: in words, for output.
        calibration: what was measured, or None.
        advice: a sentence on a faster way that rounds weights, or empty.
    """

    way: str
    why: str
    calibration: Calibration | None = None
    advice: str = ""

    @property
    def curve(self) -> Curve | None:
        """What a forward costs, this way; None where it was not measured, for single tokens only, or while the machine
        was busy: which way is the fastest can still be seen then, but not what one more token costs."""
        found = None if self.calibration is None else self.calibration.ways.get(self.way)
        return None if found is None or found.widths[-1] < NEEDED or found.spread > SPREAD else found

    def __str__(self) -> str:
        return f"{self.way} ({self.why})"


def choose_weights(
    model: str | os.PathLike[str] | None = None,
    weights: str = "auto",
    dtype: str = "auto",
    *,
    compiled: bool = True,
    measure: bool = True,
    report: Report = silent,
    timed: Callable[..., Calibration | None] = calibrate,
) -> Choice:
    """How to run a model's weights on this machine.

    Args:
        model, dtype: as for ``load_model``.
        weights: a way, which is taken as it is; or ``"auto"``.
        compiled: whether what will run gains from a compiled forward, which weights of 4 bits bring.
        measure: measure what is not known yet. Otherwise what was measured before counts.
        report: called with ``(stage, done, total)``.
        timed: measures; see ``calibrate``.

    Raises:
        BadInputError: a model's path that does not exist, an unknown way, or one that the dtype contradicts.
        EverytokenError: its configuration cannot be had.
    """
    import torch

    measure = measure and os.environ.get(OFF) != "0"
    asked = weights if weights != "auto" else None
    dtype_and_device(asked, False, dtype, None)  # refuses ways that are unknown, or that the dtype contradicts
    if torch.cuda.is_available():
        return Choice(asked or "as they come", "asked for" if asked else "on a GPU")
    config = load_config(model)
    come = _dtype(config, dtype)
    exact = ["as they come", "packed"]
    four = come == torch.float32 and compiled and exact_in_4_bits(model)
    if four:
        exact.append("int4")
    rounds = [] if asked else _rounding(come, four, compiled)
    ways = [asked] if asked else [*exact, *rounds]
    known = _known(config, come, ways, measure, report, timed)
    if asked:
        return Choice(asked, "asked for", known)
    best = known.fastest(exact) if known is not None else None
    if known is None or best is None:
        why = "these weights have 4 bits; nothing was measured" if four else "nothing was measured"
        return Choice("int4" if four else "as they come", why)
    others = [way for way in exact if way in known.ways and way != best]
    ratios = ", ".join(f"{known.ways[way](1) / known.ways[best](1):.2f}x {way}" for way in others)
    why = f"measured for a single token{'; time of the others: ' + ratios if others else ''}"
    if known.busy:
        why += "; the machine was busy meanwhile"
    return Choice(best, why, known, _advice(known, best, rounds))


def load_fastest(
    model: str | os.PathLike[str] | None = None,
    weights: str = "auto",
    dtype: str = "auto",
    *,
    compiled: bool = True,
    measure: bool = True,
    report: Report = silent,
    **kwargs: Any,
) -> tuple[PreTrainedModel, Choice]:
    """A model with its weights run as ``choose_weights`` says; ``model.forward_cost`` is the measured curve, or None.

    Args:
        kwargs: passed on to ``load_model``.

    Raises:
        EverytokenError: as ``choose_weights`` and ``load_model`` do.
    """
    choice = choose_weights(model, weights, dtype, compiled=compiled, measure=measure, report=report)
    loaded = load_model(model, dtype=dtype, weights=choice.way, **kwargs)
    loaded.forward_cost = choice.curve
    return loaded, choice


def _dtype(config: PreTrainedConfig, dtype: str) -> torch.dtype:
    """In which the weights come."""
    import torch

    found = config.get_text_config().dtype or config.dtype if dtype == "auto" else getattr(torch, dtype, None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _rounding(come: torch.dtype, four: bool, compiled: bool) -> list[str]:
    """Ways that would change the weights and are worth timing. Kernels for 4 bits are not compiled for that alone."""
    import torch

    if come != torch.float32:
        return []
    kernels = Path(__file__).parent / "grouped" / "__pycache__"
    ready = any(kernels.glob("kernels.llama_forward-*.nbi"))
    return ["bfloat16", *(["int4"] if compiled and ready and not four else [])]


def _known(
    config: PreTrainedConfig,
    come: torch.dtype,
    ways: list[str],
    measure: bool,
    report: Report,
    timed: Callable[..., Calibration | None],
) -> Calibration | None:
    if measure:
        return timed(config, come, ways, cache_dir(), report=report)
    return lookup(cache_dir(), machine_key() | {"model": shape_hash(config.get_text_config(), come)})


def _advice(known: Calibration, best: str, rounds: list[str]) -> str:
    way = known.fastest([best, *rounds])
    if way is None or way == best:
        return ""
    gain = known.ways[best](1) / known.ways[way](1)
    if gain < FASTER:
        return ""
    return f"--weights {way} would be about {gain:.1f}x as fast for single tokens; it rounds the weights."
