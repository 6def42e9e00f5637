"""A step's timeline by simulation: when the lanes of a rank work, woven and plain, with given times.

Compute times are measured (``measurement``), times of the exchanges come from a model of the link (``base.Link``):
latency and bytes over bandwidth. So what comes out is simulated, and is called so wherever it is shown. It leaves out
that computing slows down where communication takes processors or memory bandwidth away.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..core.errors import BadInputError
from .base import COMMUNICATION, COMPUTE, Event, Link, Timeline


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one layer's pieces, one entry a part: two where a step is woven, one where it runs whole.

    Attributes:
        attention, mlp: on the compute lane.
        after_attention, after_mlp: of the exchanges that carry their results.
        norm: of the norm behind each exchange where it runs apart from it, on the compute lane.
    """

    attention: tuple[float, ...]
    mlp: tuple[float, ...]
    after_attention: tuple[float, ...]
    after_mlp: tuple[float, ...]
    norm: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        columns = [self.attention, self.mlp, self.after_attention, self.after_mlp, *([self.norm] if self.norm else [])]
        if len({len(column) for column in columns}) != 1 or not self.attention:
            raise BadInputError("A layer has a time for each part of each piece.")
        if any(not value >= 0 for column in columns for value in column):
            raise BadInputError("Times are 0 s or more.")


class Times(Protocol):
    """Compute times of one layer on one rank, in seconds."""

    def attention(self, tokens: int, keys: int) -> float:
        """Of new tokens, the last of which attends to so many keys."""

    def mlp(self, tokens: int) -> float:
        """Of new tokens."""

    def norm(self, rows: int) -> float:
        """Of residual and norm over rows."""


def simulate(layers: Sequence[LayerTimes], lockstep: bool = True) -> Timeline:
    """A woven step.

    Args:
        layers: two parts each.
        lockstep: whether the lanes meet after every stage, as they do; without it each lane goes on as soon as what it
            needs is there, which is the least that this order can take.

    Raises:
        BadInputError: no layers, or layers that have not two parts.
    """
    if not layers or any(len(layer.attention) != 2 for layer in layers):
        raise BadInputError("A woven step has layers of two parts each.")
    stages: list[tuple[Any, Any]] = []  # (kind, layer, part, seconds, what it needs)
    behind: Any = None
    for number, layer in enumerate(layers):
        a, m, fa, fm = layer.attention, layer.mlp, layer.after_attention, layer.after_mlp
        stages += [
            (("attention", number, 0, a[0], ("after mlp", number - 1, 0)), behind),
            (("attention", number, 1, a[1], ("after mlp", number - 1, 1)), ("after attention", number, 0, fa[0])),
            (("mlp", number, 0, m[0], ("after attention", number, 0)), ("after attention", number, 1, fa[1])),
            (("mlp", number, 1, m[1], ("after attention", number, 1)), ("after mlp", number, 0, fm[0])),
        ]
        behind = ("after mlp", number, 1, fm[1])
    stages.append((None, behind))
    ready: dict[tuple[str, int, int], float] = {}
    events: list[Event] = []
    free = {COMPUTE: 0.0, COMMUNICATION: 0.0}

    def put(lane: str, kind: str, key: tuple[str, int, int], needs: tuple[str, int, int], seconds: float) -> None:
        start = max(free[lane], ready.get(needs, 0.0))
        free[lane] = ready[key] = start + seconds
        events.append(Event(lane, kind, key[1], key[2], start, start + seconds))

    for compute, carry in stages:
        if carry is not None:
            what, number, part, seconds = carry
            put(COMMUNICATION, "exchange", (what, number, part), (what.removeprefix("after "), number, part), seconds)
        if compute is not None:
            kind, number, part, seconds, needs = compute
            put(COMPUTE, kind, (kind, number, part), needs, seconds)
        if lockstep:
            free = dict.fromkeys(free, max(free.values()))
    return Timeline(tuple(events))


def simulate_whole(layers: Iterable[LayerTimes]) -> Timeline:
    """A step in which nothing runs beside anything else: plain, or with the one operation alone.

    Args:
        layers: parts, if there are several, come one after the other.
    """
    events: list[Event] = []
    now = 0.0

    def put(lane: str, kind: str, number: int, part: int, seconds: float) -> None:
        nonlocal now
        events.append(Event(lane, kind, number, part, now, now + seconds))
        now += seconds

    for number, layer in enumerate(layers):
        for kind, compute, carry in (
            ("attention", layer.attention, layer.after_attention),
            ("mlp", layer.mlp, layer.after_mlp),
        ):
            for part, seconds in enumerate(compute):
                put(COMPUTE, kind, number, part, seconds)
            for part, seconds in enumerate(carry):
                put(COMMUNICATION, "exchange", number, part, seconds)
                if layer.norm:
                    put(COMPUTE, "norm", number, part, layer.norm[part])
    return Timeline(tuple(events))


@dataclass(frozen=True)
class Setting:
    """What a layer is simulated on.

    Args:
        times: compute times of one rank.
        link: what joins the ranks.
        world: ranks.
        hidden: the model's width.
        itemsize: bytes of an element on the wire.
        layers: of the model.
        cut: whether attention is cut over ranks; replicated attention is exchanged by an all-gather alone.
    """

    times: Times
    link: Link
    world: int
    hidden: int
    itemsize: int = 2
    layers: int = 1
    cut: bool = True

    def _exchange(self, rows: int, reduce: bool = True) -> float:
        """The one operation: the link, and the norm of own rows."""
        return self.link.seconds(rows, self.hidden, self.itemsize, self.world, reduce) + self.times.norm(
            -(-rows // self.world)
        )

    def parts(self, tokens: int, first: int, cached: int = 0) -> LayerTimes:
        """A layer of a woven step of one request.

        Args:
            tokens: of the step.
            first: of part 1, 1 to ``tokens - 1``.
            cached: keys that were there before.
        """
        if not 0 < first < tokens:
            raise BadInputError(f"A step of {tokens} tokens cannot be cut after {first}.")
        counts = (first, tokens - first)
        keys = (cached + first, cached + tokens)
        return LayerTimes(
            tuple(self.times.attention(count, seen) for count, seen in zip(counts, keys, strict=True)),
            tuple(map(self.times.mlp, counts)),
            tuple(self._exchange(count, self.cut) for count in counts),
            tuple(map(self._exchange, counts)),
        )

    def woven(self, tokens: int, first: int, cached: int = 0, lockstep: bool = True) -> Timeline:
        """A woven step; see ``parts``."""
        return simulate([self.parts(tokens, first, cached)] * self.layers, lockstep)

    def fused(self, tokens: int, cached: int = 0) -> Timeline:
        """A whole step with the one operation."""
        times = self.times
        whole = LayerTimes(
            (times.attention(tokens, cached + tokens),),
            (times.mlp(tokens),),
            (self._exchange(tokens, self.cut),),
            (self._exchange(tokens),),
        )
        return simulate_whole([whole] * self.layers)

    def plain(self, tokens: int, cached: int = 0) -> Timeline:
        """A whole step with all-reduces, and residual and norm of all rows on every rank.

        Replicated attention needs no all-reduce here.
        """
        times = self.times
        carry = self.link.seconds(tokens, self.hidden, self.itemsize, self.world)
        whole = LayerTimes(
            (times.attention(tokens, cached + tokens),),
            (times.mlp(tokens),),
            (carry if self.cut else 0.0,),
            (carry,),
            (times.norm(tokens),),
        )
        return simulate_whole([whole] * self.layers)

    def free(self, tokens: int, cached: int = 0) -> Timeline:
        """The plain step without any communication."""
        return Setting(
            self.times, Link(0.0, float("inf")), self.world, self.hidden, self.itemsize, self.layers, self.cut
        ).plain(tokens, cached)

    def cost(self, tokens: int, cached: int = 0) -> Any:
        """The cost of a step's cuts, for ``plan_split``: seconds of one layer in the middle of a model."""

        def seconds(first: int, _second: int) -> float:
            layer = self.parts(tokens, first, cached)
            (a1, a2), (m1, m2) = layer.attention, layer.mlp
            (c1, c2), (f1, f2) = layer.after_attention, layer.after_mlp
            return max(a1, f2) + max(a2, c1) + max(m1, c2) + max(m2, f1)

        return seconds


def pays_from(setting: Setting, counts: Sequence[int], first: Any = None) -> int | None:
    """From how many tokens on a woven step takes less time than the same step with the one operation alone.

    Args:
        counts: of tokens, ascending.
        first: a step's tokens -> its cut; default the half.

    Returns:
        The least count from which weaving pays at all that follow; None where it pays at none.
    """
    found: int | None = None
    for count in counts:
        cut = count // 2 if first is None else first(count)
        if 0 < cut < count and setting.woven(count, cut).seconds < setting.fused(count).seconds:
            found = count if found is None else found
        else:
            found = None
    return found
