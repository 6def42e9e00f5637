"""What of the adapter for lmms-eval needs no lmms-eval: its reducers, settings and texts, and the entry point."""

from __future__ import annotations

import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from everytoken.core.errors import BadInputError, MissingExtraError, UnknownNameError
from everytoken.integrations import lmms_eval as module
from everytoken.reduction.divprune import DivPrune
from everytoken.reduction.fastv import FastV


def test_reducers_by_name():
    made = module.make_reducer("divprune", {"keep": 0.1})
    assert isinstance(made, DivPrune) and made.keep == 0.1
    assert isinstance(module.make_reducer("FastV", {"layer": 2}), FastV)
    assert module.make_reducer("none", {}) is None
    assert {"catp", "token-correlation", "m3", "tome", "randomtokens"} <= set(module.reducer_classes())
    for name, settings, error in (
        ("divprun", {}, UnknownNameError),
        ("divprune", {"share": 1}, UnknownNameError),
        ("none", {"keep": 1}, UnknownNameError),
        ("divprune", {"keep": 0}, BadInputError),
    ):
        with pytest.raises(error):
            module.make_reducer(name, settings)


def test_settings_of_tasks():
    assert module.generation({}) == {"max_new_tokens": 128, "num_beams": 1, "do_sample": False}
    cold = module.generation({"temperature": 0, "top_p": 0.9, "max_new_tokens": 4, "until": ["."], "num_beams": None})
    assert cold == {"max_new_tokens": 4, "num_beams": 1, "do_sample": False}
    warm = module.generation({"temperature": 0.7, "top_p": 0.9})
    assert warm["do_sample"] and warm["temperature"] == 0.7 and warm["top_p"] == 0.9


def test_texts_end_at_the_first_of_some_words():
    assert module.cut_at(" a cat.\nQ: next", ["\n", "Q:"]) == "a cat."
    assert module.cut_at("a cat", None) == "a cat" and module.cut_at("a; b", ";") == "a"


def test_the_entry_point_leads_to_the_manifest():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (path,) = project["entry-points"]["lmms_eval.models"].values()
    assert path == f"{module.__name__}:{module.manifest.__name__}"


@pytest.mark.skipif(find_spec("lmms_eval") is not None, reason="lmms-eval is installed")
def test_without_lmms_eval_it_says_so():
    with pytest.raises(MissingExtraError, match="lmms"):
        module.ReducedModel()
