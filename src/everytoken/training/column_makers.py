"""Data columns: constant values for every response token that a loss reads, who computes them, and how that is set up.

A loss names its columns in ``data_columns``. A *token annotator* computes one: it holds frozen models and gives a value
for every response token. A *column maker* builds the annotator where the user brings none: it is a dataclass of
settings (a guide's folder, the steps that train one) and is called with ``ColumnSources``, the models and rows at hand.
A maker stands in its loss's module; training configurations take over its settings by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ..core.errors import BadInputError
from ..core.progress import Report, silent
from .distributed import in_shards

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Example:
    """One response to annotate.

    Attributes:
        prompt: as the dataset has it: text, or a list of messages.
        prompt_ids, response_ids: as the policy reads them.
        tools: the row's tools, as a list or as JSON text, or None.
        chat_template_kwargs: further arguments of the row's chat template, or None.
    """

    prompt: Any
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    tools: list[dict[str, Any]] | str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


@runtime_checkable
class TokenAnnotator(Protocol):
    """A constant value for every response token: ``annotate(examples) -> one [len(response_ids)] tensor each``.

    ``column`` is the name that losses know the values by. ``fingerprint()`` identifies the annotator's models and
    settings, so that values can be kept and used again. Models that it holds as attributes are checked against the
    policy's vocabulary.
    """

    column: str

    def annotate(self, examples: Sequence[Example], report: Report = silent) -> list[torch.Tensor]: ...

    def fingerprint(self) -> str: ...


@dataclass
class ColumnSources:
    """What a column maker works from.

    Attributes:
        load: loads a fresh copy of the initial model.
        reference: the initial model itself, or None where it is not held.
        tokenizer: the policy's.
        rows: the tokenized training rows (``prompt_ids``, ``chosen_ids``, ``rejected_ids``).
        batch_size: rows a step for guides that are trained.
        seed, bf16: as for the training that the column is for.
        max_steps: no guide is trained for more optimiser steps (a trial's short work); None leaves it to the maker.
        report: called with ``(stage, done, total)``.
    """

    load: Callable[[], Any]
    reference: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset
    batch_size: int = 4
    seed: int = 0
    bf16: bool = False
    max_steps: int | None = None
    report: Report = silent

    def initial_model(self) -> Any:
        """The initial model, to be read only: the reference, or a copy where there is none or where it would be sharded
        too early.
        """
        return self.load() if self.reference is None or in_shards() else self.reference

    def steps(self, wanted: int) -> int:
        """Optimiser steps of a guide: as many as wanted, but no more than ``max_steps``."""
        return wanted if self.max_steps is None else min(wanted, self.max_steps)


@runtime_checkable
class ColumnMaker(Protocol):
    """A dataclass of settings that makes a token annotator; see the module's docstring."""

    def __call__(self, sources: ColumnSources) -> TokenAnnotator: ...


def make_annotators(makers: Mapping[str, ColumnMaker | None], sources: ColumnSources) -> list[TokenAnnotator]:
    """An annotator for every column.

    Args:
        makers: column -> its maker with its settings, or None where only the dataset can bring the column.

    Raises:
        BadInputError: a column without a maker.
        TypeError: a maker returned the annotator of another column.
    """
    missing = [column for column, maker in makers.items() if maker is None]
    if missing:  # before any guide is trained
        raise BadInputError(
            f"Nothing makes the column {missing[0]!r}.",
            f"Add the columns chosen_{missing[0]} and rejected_{missing[0]} to the data.",
        )
    found = []
    for column, maker in makers.items():
        assert maker is not None
        annotator = maker(sources)
        if annotator.column != column:
            raise TypeError(f"The maker of {column} returned an annotator of {annotator.column}.")
        found.append(annotator)
    return found
