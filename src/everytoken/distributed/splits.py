"""Where a step's tokens are cut: aligned halves, a table of offsets, or the cut that a cost finds best.

With ``c(n)`` the number of tokens rounded up to the padding (256), the first part gets::

    s = c(n) / 2 + offset(n)

tokens, and the second the rest. Halves of equal length are not halves of equal time. The second part of a long prompt
attends to the keys of both, and a matrix product takes whole waves of tiles. So the offset comes from a table that was
made from a profile, or the cut is searched for with a cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..core.errors import BadInputError, UnknownNameError

MINIMUM, ALIGN = 1024, 256
KEYS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
PUBLISHED: dict[str, tuple[int, ...]] = {
    "llama-3.3-70b-w8": (0, 0, 0, 256, 256, 0, 0),
    "llama-3.3-70b-w4": (0, 0, 0, 0, 256, 0, 0),
    "qwen2.5-72b-w8": (0, 0, 256, 0, 0, 0, 256),
    "qwen2.5-72b-w4": (0, 0, 256, 0, 256, 0, 0),
    "mixtral-8x22b-w8": (0, 0, 256, 256, 256, 128, 0),
}
"""The offsets at ``KEYS`` that the authors' code publishes, by model and number of H100s."""
Cost = Callable[[int, int], float]
"""``(tokens of part 1, tokens of part 2) -> seconds``, or any unit."""


class Part(NamedTuple):
    """One part of a step, as attention sees it.

    Attributes:
        requests: which requests have tokens in it.
        queries: tokens of each of them in this part.
        keys: keys that the last of these tokens attends to: cached ones and new ones up to itself.
    """

    requests: list[int]
    queries: list[int]
    keys: list[int]


@dataclass(frozen=True)
class Split:
    """A plan for one step.

    Attributes:
        tokens: of the step, all requests joined.
        first: tokens of part 1; all of them where the step is not woven.
        pads: rows of each part with padding: to a multiple of the ranks where it is not woven.
        parts: what each part holds of each request; empty where requests were not given.
    """

    tokens: int
    first: int
    pads: tuple[int, int]
    parts: tuple[Part, ...] = ()

    @property
    def woven(self) -> bool:
        """Whether there are two parts."""
        return self.first < self.tokens

    @property
    def second(self) -> int:
        """Tokens of part 2."""
        return self.tokens - self.first


def rounded(count: int, multiple: int) -> int:
    """The least multiple that is not smaller."""
    return multiple * math.ceil(count / multiple)


def offset_of(table: str | Mapping[int, int] | None, tokens: int) -> int:
    """A table's offset for a step: that of the nearest key; a tie takes the smaller key.

    Args:
        table: one of ``PUBLISHED`` by name, or key -> offset; None has no offsets.

    Raises:
        BadInputError: an unknown name or an empty table.
    """
    if table is None:
        return 0
    entries = entries_of(table)
    return entries[min(entries, key=lambda key: (abs(key - tokens), key))]


def entries_of(table: str | Mapping[int, int]) -> Mapping[int, int]:
    """A table's keys and offsets; raises as ``offset_of`` does."""
    if isinstance(table, str):
        if table not in PUBLISHED:
            raise UnknownNameError("offset table", table, PUBLISHED)
        table = dict(zip(KEYS, PUBLISHED[table], strict=True))
    if not table:
        raise BadInputError("An offset table needs an entry.")
    return table


def check_table(table: str | Mapping[int, int] | None, minimum: int, align: int) -> None:
    """Raises BadInputError where a table would cut some step out of range.

    The shortest step of every key is the one that its offset could miss.

    Args:
        minimum: steps of fewer tokens are not cut.
        align: the padding.
    """
    entries = {minimum: 0} if table is None else entries_of(table)
    last = None
    for key in sorted(entries):
        least = minimum if last is None else max(minimum, (last + key) // 2 + 1)
        first, last = rounded(least, align) // 2 + entries[key], key
        if not 0 < first < least:
            raise BadInputError(
                f"A step of {least} tokens would be cut after {first}.",
                f"Raise minimum, or lower align ({align}) or the offset ({entries[key]}).",
            )


def plan_split(
    tokens: int,
    table: str | Mapping[int, int] | None = None,
    cost: Cost | None = None,
    *,
    first: int | None = None,
    minimum: int = MINIMUM,
    align: int = ALIGN,
    world: int = 1,
    new: Sequence[int] | None = None,
    cached: Sequence[int] | None = None,
) -> Split:
    """Plans a step. All ranks must call it with the same values, or their collectives wait for each other for ever.

    Args:
        tokens: of the step, all requests joined.
        table: offsets, see ``offset_of``.
        cost: find the cheapest cut among the multiples of ``align / 2`` instead; a tie takes the cut nearest to the
            half, then the smaller.
        first: cut exactly here instead, whatever ``minimum`` says.
        minimum: steps of fewer tokens are not cut.
        align: the padding, an even number.
        world: ranks.
        new, cached: tokens and cached tokens of each request; default nothing is said about requests.

    Raises:
        BadInputError: no tokens, a cut out of range, numbers out of range, or requests that do not add up.
    """
    if tokens < 1 or minimum < 2 or align < 2 or align % 2 or world < 1:
        raise BadInputError(
            f"A step has tokens, a minimum of 2 or more, an even padding and ranks; got {tokens}, {minimum}, {align}, "
            f"{world}."
        )
    if sum(value is not None for value in (table, cost, first)) > 1:
        raise BadInputError("A cut comes from a table, from a cost or from a number.", "Give one of them.")
    whole, half = rounded(tokens, align), align // 2
    if first is None and tokens < minimum:
        return _split(tokens, tokens, (rounded(tokens, world), 0), new, cached)
    if first is None and cost is not None:
        cuts = range(half, tokens, half)
        if not cuts:
            return _split(tokens, tokens, (rounded(tokens, world), 0), new, cached)
        first = min(cuts, key=lambda cut: (cost(cut, tokens - cut), abs(2 * cut - tokens), cut))
    elif first is None:
        first = whole // 2 + offset_of(table, tokens)
    if not 0 < first < tokens:
        raise BadInputError(
            f"A step of {tokens} tokens cannot be cut after {first}.",
            f"Cut it after 1 to {tokens - 1} tokens, or raise the minimum so that it is not cut."
            if tokens > 1
            else "A step of one token is not cut.",
        )
    return _split(tokens, first, (first, max(whole - first, tokens - first)), new, cached)


def _split(
    tokens: int, first: int, pads: tuple[int, int], new: Sequence[int] | None, cached: Sequence[int] | None
) -> Split:
    if new is None:
        return Split(tokens, first, pads)
    if sum(new) != tokens:
        raise BadInputError(f"The requests have {sum(new)} tokens, the step has {tokens}.")
    parts = cut_requests(new, [0] * len(new) if cached is None else cached, first)
    return Split(tokens, first, pads, parts)


def cut_requests(new: Sequence[int], cached: Sequence[int], first: int) -> tuple[Part, Part]:
    """What both parts hold of each request; one that straddles the cut is in both.

    Args:
        new, cached: tokens and cached tokens of each request.
        first: tokens of part 1.

    Raises:
        BadInputError: lists of different lengths, or negative numbers.
    """
    if len(new) != len(cached) or any(count < 1 for count in new) or any(count < 0 for count in cached):
        raise BadInputError("Each request has one new token or more, and cached tokens.")
    parts = Part([], [], []), Part([], [], [])
    begin = 0
    for request, (count, before) in enumerate(zip(new, cached, strict=True)):
        inside = min(max(first - begin, 0), count)
        for part, queries, keys in ((0, inside, before + inside), (1, count - inside, before + count)):
            if queries:
                parts[part].requests.append(request)
                parts[part].queries.append(queries)
                parts[part].keys.append(keys)
        begin += count
    return parts


def offset_table(cost: Callable[[int], Cost], keys: Sequence[int] = KEYS, align: int = ALIGN) -> dict[int, int]:
    """A table of offsets made from costs: at every key the best cut among all, as its distance from the aligned half.

    Args:
        cost: a step's tokens -> the cost of its cuts.
        keys: the table's keys.
        align: the padding.
    """
    return {
        key: plan_split(key, cost=cost(key), minimum=2, align=align).first - rounded(key, align) // 2 for key in keys
    }


def waves(tokens: int, columns: int, processors: int = 132, tile: int = 128) -> int:
    """Waves of tiles of a matrix product ``[tokens, any] @ [any, columns]`` on a GPU: its time in steps.

    Args:
        columns: of the result.
        processors: streaming multiprocessors, each with one tile at a time; an H100 has 132.
        tile: rows and columns of a tile.
    """
    return math.ceil(math.ceil(tokens / tile) * math.ceil(columns / tile) / processors)
