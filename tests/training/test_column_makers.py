"""Column makers: what they are given, and what is refused before any guide is trained."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from everytoken.core.errors import BadInputError
from everytoken.training.column_makers import ColumnMaker, ColumnSources, TokenAnnotator, make_annotators


@dataclass
class Annotator:
    column: str = "one"

    def annotate(self, examples, report=lambda *_: None):
        return []

    def fingerprint(self):
        return self.column


@dataclass
class Maker:
    column: str = "one"
    calls: int = 0

    def __call__(self, sources):
        self.calls += 1
        return Annotator(self.column)


def sources(**changes):
    return ColumnSources(**dict(load=lambda: "a copy", reference="the model", tokenizer=None, rows=[]) | changes)


def test_contract():
    assert isinstance(Maker(), ColumnMaker)
    assert isinstance(Annotator(), TokenAnnotator)


def test_annotators_are_made_for_every_column():
    found = make_annotators({"one": Maker(), "two": Maker("two")}, sources())
    assert [item.column for item in found] == ["one", "two"]


def test_a_column_without_a_maker_is_refused_before_others_are_made():
    first = Maker()
    with pytest.raises(BadInputError, match="Nothing makes the column 'two'") as caught:
        make_annotators({"one": first, "two": None}, sources())
    assert "chosen_two" in caught.value.hint
    assert first.calls == 0


def test_a_maker_of_another_column_is_refused():
    with pytest.raises(TypeError, match="The maker of two returned an annotator of one"):
        make_annotators({"two": Maker("one")}, sources())


def test_the_initial_model_is_the_reference_or_a_copy():
    assert sources().initial_model() == "the model"
    assert sources(reference=None).initial_model() == "a copy"


def test_a_trial_bounds_the_steps_of_guides():
    assert sources().steps(50) == 50
    assert sources(max_steps=6).steps(50) == 6
    assert sources(max_steps=60).steps(50) == 50
