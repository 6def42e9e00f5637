"""Configurations of ``everytoken train``: YAML, --set, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from everytoken.core.errors import BadInputError, UnknownNameError
from everytoken.training.base import Training, TrainingResult, read_config


@dataclass
class Config:
    steps: int
    lr: float = 0.1
    name: str | None = None
    fast: bool = False


TRAINING = Training("toy", "a toy", Config, lambda config, context: TrainingResult({}))


def test_values_come_from_the_file_and_then_from_the_command_line(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text("steps: 3\nlr: 1.0e-4\nname: null\nfast: true\n")
    assert read_config(TRAINING, path, []) == Config(3, 1e-4, None, True)
    assert read_config(TRAINING, path, ["steps=5", "name=x"]) == Config(5, 1e-4, "x", True)
    assert read_config(TRAINING, None, ["steps=1"]) == Config(1)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("steps: [", BadInputError, "is not YAML"),
        ("- 1\n- 2\n", BadInputError, "holds no settings"),
        ("steps: many\n", BadInputError, "takes int"),
        ("step: 3\n", UnknownNameError, "steps"),
        ("lr: 0.5\n", BadInputError, "needs steps"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, error, words):
    path = tmp_path / "toy.yaml"
    path.write_text(text)
    with pytest.raises(error) as caught:
        read_config(TRAINING, path, [])
    assert words in f"{caught.value.message} {caught.value.hint}"


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(BadInputError, match="no file"):
        read_config(TRAINING, tmp_path / "none.yaml", [])
