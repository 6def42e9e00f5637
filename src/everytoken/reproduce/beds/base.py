"""The contract of a test bed: a start, data, a measurement, and something known to help.

Before a method is judged on a bed, the bed has to show that it can decide: a positive control (something known to help)
must help, and the start must neither sit at chance nor at the ceiling. ``control`` makes an experiment of that, which
runs, keeps its parts and gets its verdicts like any other::

    everytoken reproduce sums --control
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar, runtime_checkable

from ...core.errors import UnknownNameError
from ...core.results import Arms, Claim, Values
from ..base import Context, Reproduction, Result

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

START, CONTROL = "start", "positive control"
Row = TypeVar("Row")
BEDS = {
    "sentiment": "sentiment:SentimentBed",
    "star-graphs": "star_graphs:StarGraphBed",
    "sudoku": "sudoku:SudokuBed",
    "sums": "sums:SumsBed",
}
"""name -> where it is."""


@runtime_checkable
class Bed(Protocol[Row]):
    """What an experiment stands on.

    Attributes:
        name, summary: for people.
        metric: what ``measure`` is judged by; higher is better.
        bounds: a start below the first value sits at chance, one above the second at the ceiling.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    metric: ClassVar[str]
    bounds: ClassVar[tuple[float, float]]

    def start(self, context: Context) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model that every arm starts from (a fresh copy), and its tokenizer."""
        ...

    def rows(self, context: Context) -> list[Row]:
        """What arms learn from, the same for all arms of a seed."""
        ...

    def measure(self, context: Context, model: PreTrainedModel) -> dict[str, Values]:
        """Metric -> one value a held-out question, the same questions for all arms of a seed."""
        ...

    def positive_control(self, context: Context) -> PreTrainedModel:
        """The start after something that is known to help."""
        ...


@dataclass
class _ControlRun:
    """One seed of a bed's positive control."""

    bed: Bed[object] = field(repr=False)

    def __call__(self, context: Context) -> Arms:
        def start() -> dict[str, Values]:
            return self.bed.measure(context, self.bed.start(context)[0])

        def control() -> dict[str, Values]:
            return self.bed.measure(context, self.bed.positive_control(context))

        return {START: context.part(START, start), CONTROL: context.part(CONTROL, control)}


def control(bed: Bed[object], seeds: int = 3) -> Reproduction:
    """The experiment that says whether a bed can decide."""
    low, high = bed.bounds
    run = _ControlRun(bed)
    return Reproduction(
        name=f"bed-{bed.name}",
        summary=f"{bed.summary}: does something known to help show?",
        run=run,
        claims=[
            Claim(bed.metric, CONTROL, START, "something known to help helps", kind="difference"),
            Claim(bed.metric, START, "", "above chance", kind="value", threshold=low),
            Claim(bed.metric, START, "", "below the ceiling", "value", higher_is_better=False, threshold=high),
        ],
        seeds=seeds,
        extra=("train", "trl"),
    )


def can_decide(result: Result) -> bool:
    """Whether a positive control's result says that the bed can decide: all three claims hold."""
    return all(claim["verdict"] == "holds" for claim in result["claims"])


def find_bed(name: str) -> Bed[object]:
    """A bed by its name.

    Raises:
        UnknownNameError: there is none of that name.
    """
    if name not in BEDS:
        raise UnknownNameError("test bed", name, BEDS)
    module, _, attribute = BEDS[name].partition(":")
    found: Bed[object] = getattr(import_module(f"{__package__}.{module}"), attribute)()
    return found
