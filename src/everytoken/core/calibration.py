"""How long a model's forward over n tokens takes on this machine, for each way of running the weights.

Which way is the fastest depends on the processor: packing pays on one and hurts on another, and 4 bits pay where memory
is what is waited for. So it is measured, once for a machine and a shape of model, and kept in the cache folder. Timed
are one layer and the head (``one_layer``), in a few seconds. A busy machine only ever makes things slower, so the
smallest of several runs counts. Where the runs differ much, the next uses measure again, and the smallest is kept.

``Calibration.fastest`` chooses a way. Its ``Curve`` is what speculative decoding asks: ``curve(n)`` is the price of a
forward over n tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from .files import write_text_whole
from .machine import processor
from .progress import Report, silent

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

WIDTHS = (1, 2, 4, 8, 16, 32, 64)
"""Tokens of a forward that are timed."""
SWEEPS = 6
"""Each is timed so often, where time allows."""
AT_LEAST = 3
"""One token is timed so often, however long that takes."""
NEEDED = 8
"""Widths up to this one are timed once at least: a curve of less says nothing about trees."""
SMALL, LARGE = 2.5, 9.0
"""Seconds for all ways together, for models whose timed weights are fewer than ``MANY``, and for others."""
MANY = 100_000_000
HOPELESS = 3.0
"""A way that takes so many times the fastest one's time for one token is not timed for more."""
TIE = 0.05
"""Ways that differ by less for one token are ranked by ``WIDE`` tokens."""
WIDE = 16
SPREAD = 0.5
"""A median that lies so far above the smallest says that the machine was busy."""
TRIES = 3
"""So often a busy machine's figures are measured again."""
KEPT = 100
"""Models and machines that are remembered."""
TABLE = "calibration.json"


@dataclass(frozen=True)
class Curve:
    """Seconds of a forward over n tokens: straight lines between those measured, and on beyond the last.

    Attributes:
        widths: rising numbers of tokens, from 1 on.
        seconds: of a forward over so many; none is below one before it.
        spread: by how much of the smallest run the median run lies above it, at the worst of the narrow widths.
    """

    widths: tuple[int, ...]
    seconds: tuple[float, ...]
    spread: float = 0.0

    def __post_init__(self) -> None:
        same = len(self.widths) == len(self.seconds) > 0 and self.widths[0] == 1
        if not same or list(self.widths) != sorted(set(self.widths)) or not all(0 < x < math.inf for x in self.seconds):
            raise ValueError(f"no curve: {self.widths}, {self.seconds}")
        rising = tuple(max(self.seconds[: place + 1]) for place in range(len(self.seconds)))
        object.__setattr__(self, "seconds", rising)

    def __call__(self, tokens: int) -> float:
        """Seconds of a forward over so many tokens."""
        if len(self.widths) == 1:
            return self.seconds[0] * tokens
        place = next((k for k in range(1, len(self.widths)) if tokens <= self.widths[k]), len(self.widths) - 1)
        first, last = self.widths[place - 1], self.widths[place]
        slope = (self.seconds[place] - self.seconds[place - 1]) / (last - first)
        return self.seconds[place - 1] + slope * (max(tokens, 1) - first)

    def merged(self, other: Curve) -> Curve:
        """The smaller figure of two measurements at every width."""
        mine, theirs = (dict(zip(item.widths, item.seconds, strict=True)) for item in (self, other))
        widths = tuple(sorted(mine | theirs))
        seconds = tuple(min(mine.get(width, math.inf), theirs.get(width, math.inf)) for width in widths)
        return Curve(widths, seconds, min(self.spread, other.spread))


@dataclass
class Calibration:
    """What was measured for one shape of model on one machine.

    Attributes:
        key: what it holds for: processor, cores, threads, version of torch, hash of the kernels' source, hash of the
            model's shape and dtype.
        model: the shape in words.
        ways: curves by way (``core.loading.WEIGHTS``).
        runs: how often it was measured.
        took: seconds of the last time.
        date: of the last time, in ISO form.
    """

    key: dict[str, Any]
    model: str
    ways: dict[str, Curve] = field(default_factory=dict)
    runs: int = 0
    took: float = 0.0
    date: str = ""

    @property
    def busy(self) -> bool:
        """Whether the runs differed so much that something else must have been running."""
        return any(curve.spread > SPREAD for curve in self.ways.values())

    def fastest(self, ways: Iterable[str] | None = None) -> str | None:
        """The way with the cheapest single token among those named, or None if none of them was measured. Where two are
        about as fast (``TIE``), the one that is cheaper for ``WIDE`` tokens."""
        known = {way: self.ways[way] for way in (self.ways if ways is None else ways) if way in self.ways}
        if not known:
            return None
        best = min(curve(1) for curve in known.values())
        close = [way for way, curve in known.items() if curve(1) <= (1 + TIE) * best]
        return min(close, key=lambda way: known[way](WIDE))

    @classmethod
    def read(cls, item: dict[str, Any]) -> Calibration:
        """From what ``asdict`` made of it, by way of JSON.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        ways = {
            str(way): Curve(tuple(map(int, one["widths"])), tuple(map(float, one["seconds"])), float(one["spread"]))
            for way, one in item["ways"].items()
        }
        if not isinstance(item["key"], dict):
            raise TypeError("no key")
        facts = str(item["model"]), ways, int(item["runs"]), float(item["took"]), str(item["date"])
        return cls(item["key"], *facts)


class Bench(Protocol):
    """What ``calibrate`` times: see ``one_layer.OneLayer``."""

    def __call__(self, tokens: int) -> tuple[float, ...]: ...

    def seconds(self, parts: Any) -> float: ...


MakeBench = Callable[["PreTrainedConfig", "torch.dtype", str], Bench]


def calibrate(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    ways: Sequence[str],
    folder: Path,
    *,
    report: Report = silent,
    make: MakeBench | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Calibration | None:
    """The curves of these ways for a model of this shape: from the cache, or measured now and kept there.

    Args:
        config: the model's; of one that reads more than text, the text part counts.
        dtype: in which its weights come.
        ways: what is wanted; those that are not known are measured.
        folder: the cache folder.
        report: called with ``(stage, done, total)``.
        make: makes what is timed; default ``OneLayer``.
        clock: seconds; decides when there is no time for more runs.

    Returns:
        None where the model cannot be built in one layer.
    """
    config = config.get_text_config()
    key = machine_key() | {"model": shape_hash(config, dtype)}
    found = lookup(folder, key) or Calibration(key, shape_words(config, dtype))
    again = found.busy and found.runs < TRIES
    missing = list(ways) if again else [way for way in ways if way not in found.ways]
    if not missing:
        return found
    if make is None:
        from .one_layer import OneLayer

        make = OneLayer
    began, allowed = clock(), _allowed(config)
    for place, way in enumerate(missing):
        report("timing ways of running the weights", place, len(missing))
        best = min((curve(1) for curve in found.ways.values()), default=math.inf)
        try:
            bench = make(config, dtype, way)
            curve = _curve(bench, best, clock, (began + allowed - clock()) / (len(missing) - place))
        except Exception:  # transformers' models raise all kinds of errors where they are not what is expected
            continue
        found.ways[way] = found.ways[way].merged(curve) if way in found.ways else curve
        del bench
    if not found.ways:
        return None
    found.runs, found.took, found.date = found.runs + 1, round(clock() - began, 2), time.strftime("%Y-%m-%d")
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the next start a few seconds, no more
        _keep(folder, found)
    return found


def _allowed(config: PreTrainedConfig) -> float:
    """Seconds for all ways."""
    layer = 12 * config.hidden_size**2  # attention and a network of four times the width, about
    return LARGE if layer + config.hidden_size * config.vocab_size > MANY else SMALL


def _curve(bench: Bench, best: float, clock: Callable[[], float], allowed: float) -> Curve:
    """Several sweeps over the widths, narrow ones first, while there is time. Of each part the smallest run counts.

    Args:
        best: the fastest way's seconds for one token so far.
        allowed: seconds for this way. Widths up to ``NEEDED`` are timed in any case, but for a hopeless way.
    """
    end = clock() + allowed
    runs: dict[int, list[tuple[float, ...]]] = {1: [bench(1) for _ in range(AT_LEAST)]}
    lasted: dict[int, float] = {}
    hopeless = bench.seconds(_smallest(runs[1])) > HOPELESS * best
    for sweep in range(0 if hopeless else SWEEPS):
        for width in WIDTHS:
            before = clock()
            expected = lasted.get(width, 2 * lasted.get(width // 2, 0.0))
            if (sweep or width > NEEDED) and before + expected > end:
                break
            runs.setdefault(width, []).append(bench(width))
            lasted[width] = clock() - before
    seconds = {width: [bench.seconds(parts) for parts in found] for width, found in runs.items()}
    spread = max(median(found) / min(found) - 1 for width, found in seconds.items() if width <= NEEDED)
    smallest = tuple(bench.seconds(_smallest(found)) for found in runs.values())
    return Curve(tuple(runs), smallest, spread)


def _smallest(runs: list[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(min(column) for column in zip(*runs, strict=True))


# -- what it holds for -------------------------------------------------------------------------------------------------
def machine_key() -> dict[str, Any]:
    """What of this machine and of the installed software the figures depend on."""
    import torch

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": kernels_hash(),
    }


@lru_cache
def kernels_hash() -> str:
    """Of the source of everything that is timed here, and of how."""
    here = Path(__file__).parent
    files = [*sorted((here / "grouped").glob("*.py")), here / "packing.py", here / "one_layer.py", Path(__file__)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def shape_hash(config: PreTrainedConfig, dtype: torch.dtype) -> str:
    """Of what decides how long a forward takes: sizes and kinds of the layers, and not names, tokens or versions."""
    facts = {
        name: value
        for name, value in config.to_dict().items()
        if not name.startswith("_") and not name.endswith(("token_id", "_name", "version", "architectures", "dtype"))
    }
    text = json.dumps([type(config).__name__, facts, str(dtype)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def shape_words(config: PreTrainedConfig, dtype: torch.dtype) -> str:
    """The shape for readers."""
    return (
        f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"{str(dtype).removeprefix('torch.')}"
    )


# -- the cache ---------------------------------------------------------------------------------------------------------
def kept(folder: Path) -> list[Calibration]:
    """All calibrations of a cache folder; what cannot be read does not count."""
    try:
        items = json.loads((folder / TABLE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    found = []
    for item in items if isinstance(items, list) else []:
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            found.append(Calibration.read(item))
    return found


def lookup(folder: Path, key: dict[str, Any]) -> Calibration | None:
    """The calibration for a key, or None."""
    return next((item for item in kept(folder) if item.key == key), None)


def _keep(folder: Path, calibration: Calibration) -> None:
    others = [item for item in kept(folder) if item.key != calibration.key][-KEPT + 1 :]
    write_text_whole(folder / TABLE, json.dumps([asdict(item) for item in [*others, calibration]]) + "\n")
