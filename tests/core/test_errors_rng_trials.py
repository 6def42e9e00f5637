"""Errors that help, seeds that repeat, settings from text."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from everytoken.core.errors import BadInputError, MissingExtraError, UnknownNameError, require
from everytoken.core.rng import derive_seed, numpy_generator, seed_everything
from everytoken.core.settings import parse_settings, settable


@dataclass
class Method:
    model: object = None
    budget: int = 4
    share: float = 0.5
    threshold: float | None = None
    fast: bool = False
    kind: str = "a"


def test_settings():
    assert set(settable(Method)) == {"budget", "share", "threshold", "fast", "kind"}
    parsed = parse_settings("m", Method, ["budget=8", "share=1e-2", "threshold=none", "fast=yes", "kind=b"])
    assert parsed == {"budget": 8, "share": 0.01, "threshold": None, "fast": True, "kind": "b"}
    with pytest.raises(UnknownNameError, match="Did you mean budget"):
        parse_settings("m", Method, ["buget=8"])
    for bad in ("budget=many", "budget=1.5", "fast=perhaps", "threshold=high", "budget"):
        with pytest.raises(BadInputError):
            parse_settings("m", Method, [bad])


def test_unknown_names():
    assert "Known: aa, bb." in str(UnknownNameError("thing", "zz", ["bb", "aa"]))
    error = UnknownNameError("thing", "Dispec", ["dyspec", "tdpo"])
    assert error.suggestions == ["dyspec"]
    assert isinstance(error, KeyError)
    assert "\n" in str(error)  # not the repr that KeyError prints


def test_missing_extras():
    require("json", "train", "Reading")
    with pytest.raises(MissingExtraError, match=r"pip install 'everytoken\[train\]'"):
        require("no_such_library", "train", "Training")


def test_seeding():
    draws = []
    for _ in range(2):
        seed_everything(7)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
    assert derive_seed(1, "a") == derive_seed(1, "a") != derive_seed(1, "b")
    assert derive_seed(1, "ab", "c") != derive_seed(1, "a", "bc")
    assert numpy_generator(3, "x").random() == numpy_generator(3, "x").random()
    for bad in (-1, 2**32, 1.5, True):
        with pytest.raises(ValueError, match="seed"):
            seed_everything(bad)
