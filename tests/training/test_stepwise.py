"""The loop over steps: rates, a cut run that goes on as if it had not been cut, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.training.stepwise import Stage, fit


def line(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(3, 1)


def squares(model):
    """A loss whose data follow from the step's number alone."""

    def loss(step):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return (model(x)[:, 0] - x.sum(1)).square().mean()

    return loss


def test_the_rate_rises_holds_and_falls():
    stage = Stage("s", 100, 1.0, warmup=0.1, hold=0.6)
    assert stage.rate(0) == pytest.approx(1 / 11) and stage.rate(9) == pytest.approx(10 / 11)
    assert stage.rate(10) == stage.rate(59) == 1.0
    assert stage.rate(80) == pytest.approx(0.5) and stage.rate(99) == pytest.approx(
        0.5 * (1 + math.cos(math.pi * 39 / 40))
    )
    assert Stage("s", 10, 1.0, hold=1.0).rate(9) == 1.0


def test_it_learns_and_tells_of_it():
    model, told = line(), []
    curve = fit(model, squares(model), Stage("s", 200, 0.05), report=lambda *said: told.append(said))
    assert curve[0][1] > 100 * curve[-1][1]
    assert curve[-1][0] == 200 and len(curve) == len(told) == 50
    assert torch.allclose(model.weight, torch.ones(1, 3), atol=0.02)
    assert told[-1][1:] == (200, 200) and not model.training


def test_a_run_that_was_cut_ends_as_an_unbroken_one(tmp_path, monkeypatch):
    monkeypatch.setattr("everytoken.training.stepwise.time.time", iter(range(0, 10**6, 100)).__next__)
    stage, whole, cut = Stage("s", 30, 0.05), line(), line()
    curve = fit(whole, squares(whole), stage)

    class Cut(Exception):
        pass

    def cutting(step):
        if step == 17:
            raise Cut
        return squares(cut)(step)

    with pytest.raises(Cut):
        fit(cut, cutting, stage, tmp_path, save_every=5)
    again = line(5)
    steps = []

    def counted(step):
        steps.append(step)
        return squares(again)(step)

    assert [step for step, _ in fit(again, counted, stage, tmp_path, save_every=5)] == [step for step, _ in curve]
    assert steps == list(range(15, 30))
    assert torch.equal(again.weight, whole.weight)
    finished = line(6)
    assert fit(finished, counted, stage, tmp_path) and len(steps) == 15
    assert torch.equal(finished.weight, whole.weight)


def test_parts_of_a_batch_are_its_mean_in_value_and_gradient():
    """Two threads with half of the batch each end where one thread ends with all of it."""

    def half(model, part):
        def loss(step):
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))[4 * part : 4 * part + 4]
            return (model(x)[:, 0] - x.sum(1)).square().mean()

        return loss

    whole, apart = line(), line()
    curve = fit(whole, squares(whole), Stage("s", 6, 0.05))
    halves = fit(apart, [half(apart, 0), half(apart, 1)], Stage("s", 6, 0.05))
    assert torch.allclose(apart.weight, whole.weight, atol=1e-6)
    assert [value for _, value in halves] == pytest.approx([value for _, value in curve], rel=1e-5)


def test_weights_that_do_not_learn_stay():
    model = line()
    before = model.bias.clone()
    fit(model, squares(model), Stage("s", 5, 0.05), weights=[model.weight])
    assert torch.equal(model.bias, before)


def test_what_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="positive lr"):
        Stage("s", 10, 0.0)
    with pytest.raises(BadInputError, match="warms up before"):
        Stage("s", 10, 1.0, warmup=0.7)
    model = line()
    with pytest.raises(BadInputError, match="loss of s is nan at step 0"):
        fit(model, lambda step: model.weight.sum() * torch.nan, Stage("s", 5, 0.1))
    fit(model, squares(model), Stage("s", 5, 0.1), tmp_path)
    with pytest.raises(BadInputError, match="Delete it"):
        fit(model, squares(model), Stage("s", 6, 0.1), tmp_path)
    (tmp_path / "s.checkpoint").write_bytes(b"cut off")
    with pytest.raises(BadInputError, match="cannot be gone on from"):
        fit(model, squares(model), Stage("s", 5, 0.1), tmp_path)


def test_a_checkpoint_of_other_settings_or_data_is_refused(tmp_path):
    """Also of a stage that is finished, which would only be read: the weights would be those of the other training."""
    from dataclasses import dataclass

    from everytoken.training.stepwise import fingerprint

    @dataclass
    class Settings:
        order: str = "forward"
        save_every: int = 5

    def run(identity):
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1)
        fit(
            model, lambda step: model(torch.ones(1, 2)).square().sum(), Stage("s", 2, 1e-2), tmp_path, identity=identity
        )

    data = {"ids": torch.arange(4), "names": ["a"]}
    first = fingerprint(Settings(), data)
    run(first)
    run(fingerprint(Settings(save_every=7), {"names": ["a"], "ids": torch.arange(4)}))
    for other in (
        fingerprint(Settings("reversed"), data),
        fingerprint(Settings(), data | {"ids": torch.arange(4) + 1}),
    ):
        with pytest.raises(BadInputError, match="other settings or on other data"):
            run(other)
