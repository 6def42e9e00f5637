"""The reducer battery over all reducers that have a card or are exported, and over ones that break the laws."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch

from everytoken.catalog import load_catalog
from everytoken.catalog.house import load_house
from everytoken.reduction.base import Declaration, comparison_table, selection
from everytoken.testing.reducer import ReducerConformance


def found():
    """Classes of the station that reduce features and need no argument: name -> class."""
    places = [card.implementation for card in load_catalog().values() if card.station == "reduction"]
    places += load_house()["reduction"].exports
    classes = {}
    for place in filter(None, places):
        module, _, name = place.partition(":")
        item = getattr(importlib.import_module(module), name)
        if not (hasattr(item, "reduce") and hasattr(item, "declares") and dataclasses.is_dataclass(item)):
            continue
        if "projector" in item.declares.where:  # it works on the encoder's levels and has weights of its own
            continue
        if all(f.default is not f.default_factory for f in dataclasses.fields(item) if f.init):
            classes[name] = item
    return classes


class TestReducers(ReducerConformance):
    def reducers(self):
        return {name: item() for name, item in found().items()}


def test_the_battery_covers_the_station():
    assert {"DivPrune", "FastV", "RandomTokens", "ToMe"} <= set(found())


def test_the_table_of_the_docs_names_every_reducer_once():
    """It is written by scripts/write_docs.py from the declarations."""
    text = (Path(__file__).parents[2] / "docs" / "assets" / "reducers.md").read_text(encoding="utf-8")
    names = [line.split("|")[1].strip() for line in text.splitlines()[2:]]
    assert sorted(names) == names and len(set(names)) == len(names)
    assert set(found()) <= set(names)
    rows = comparison_table(sorted(found().items())).splitlines()[2:]
    assert set(rows) <= set(text.splitlines())


class First:
    """Keeps the first half; each law is broken once below."""

    declares = Declaration(("model input",), "place", "select", "half")

    def reduce(self, features, context):
        from everytoken.reduction.base import check_features

        check_features(features)
        return selection(features, torch.arange(max(1, len(features) // 2)))


def battery(reducer):
    return type("Battery", (ReducerConformance,), {"reducers": lambda self: {"it": reducer}})()


LAWS = [name for name in dir(ReducerConformance) if name.startswith("test_")]


@pytest.mark.parametrize("law", LAWS)
def test_a_sound_one_passes(law):
    getattr(battery(First()), law)()


def broken(change):
    class Broken(First):
        def reduce(self, features, context):
            return change(self, features, super().reduce(features, context))

    return Broken()


def unsorted(_self, features, reduction):
    reduction.kept = reduction.kept.flip(0)
    reduction.features = reduction.features.flip(0)
    return reduction


def other_features(_self, features, reduction):
    return dataclasses.replace(reduction, features=reduction.features + 1)


def forgetful(self, features, reduction):
    self.calls = getattr(self, "calls", 0) + 1
    return selection(features, torch.arange(min(self.calls, len(features))))


@pytest.mark.parametrize(
    ("law", "change"),
    [
        ("test_what_comes_out_is_fewer_and_in_order", unsorted),
        ("test_features_are_what_kept_or_assignment_says", other_features),
        ("test_it_is_a_function_of_its_input", forgetful),
        ("test_precision_stays", lambda _s, _f, r: dataclasses.replace(r, features=r.features.float())),
        ("test_gradients_reach_what_is_left", lambda _s, _f, r: dataclasses.replace(r, kept=r.kept + 1)),
    ],
)  # fmt: skip
def test_a_broken_one_fails(law, change):
    with pytest.raises(AssertionError):
        getattr(battery(broken(change)), law)()
