"""Training configurations: common settings, and those that are derived from a method's dataclasses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from everytoken.core.errors import BadInputError, UnknownNameError
from everytoken.core.settings import settable
from everytoken.training.base import Training, TrainingResult, read_config
from everytoken.training.config import TrainConfig, derive_config


@dataclass
class Loss:
    beta: float = 0.1
    name: str | None = None
    shape: Callable[[float], float] | None = None

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise BadInputError(f"beta must be positive; got {self.beta}.")


@dataclass
class Maker:
    guide: str | None = None
    guide_steps: int = 50


Derived = derive_config("Derived", TrainConfig, Loss, Maker)


def test_settings_of_every_part_stand_side_by_side():
    config = Derived(beta=0.5, guide_steps=3, lr=1e-3)
    assert config.part(Loss) == Loss(beta=0.5)
    assert config.part(Maker) == Maker(guide_steps=3)
    assert config.lr == 1e-3
    assert set(settable(Derived)) == set(settable(TrainConfig)) | {"beta", "name", "guide", "guide_steps"}
    training = Training("it", "", Derived, lambda config, context: TrainingResult({}))
    assert read_config(training, None, ["beta=2", "name=none", "steps=7"]) == Derived(beta=2.0, steps=7)


def test_every_part_is_checked_when_the_configuration_is_made():
    with pytest.raises(BadInputError, match="beta must be positive"):
        Derived(beta=0.0)
    with pytest.raises(BadInputError, match="batch_size must be"):
        Derived(batch_size=0)


def test_integrations_are_checked_and_handed_on(monkeypatch, tmp_path):
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    class Absent:
        def __init__(self):
            raise RuntimeError("It requires a library.")

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "notes", object)
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "absent", Absent)
    assert TrainConfig(report_to="notes, notes").arguments(tmp_path)["report_to"] == ["notes", "notes"]
    assert TrainConfig().arguments(tmp_path)["report_to"] == []
    with pytest.raises(UnknownNameError, match="integration for report_to"):
        TrainConfig(report_to="note")
    with pytest.raises(BadInputError, match="Logs cannot go to absent: It requires a library"):
        TrainConfig(report_to="notes,absent")


def test_what_cannot_be_derived_is_refused():
    @dataclass
    class Twice:
        lr: float = 0.1

    @dataclass
    class NeedsAnObject:
        model: Callable[[int], int]

    class Plain:
        pass

    for part, message in (
        (Twice, "setting lr of Twice is one of TrainConfig"),
        (NeedsAnObject, "needs model"),
        (Plain, "is no dataclass"),
    ):
        with pytest.raises(TypeError, match=message):
            derive_config("It", TrainConfig, part)
    with pytest.raises(TypeError, match="setting beta of Loss is one of Loss"):
        derive_config("It", TrainConfig, Loss, Loss)


def test_a_setting_without_a_default_is_asked_for():
    @dataclass
    class Needs:
        alpha: float

    training = Training("it", "", derive_config("It", TrainConfig, Needs), lambda *_: TrainingResult({}))
    with pytest.raises(BadInputError, match="needs alpha"):
        read_config(training, None, [])
    assert read_config(training, None, ["alpha=1"]).part(Needs) == Needs(1.0)
