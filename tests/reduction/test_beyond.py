"""Metrics beyond speed, on a model of the shipped one's form without its weights."""

from __future__ import annotations

import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.reduction.base import selection
from everytoken.reduction.baselines import RandomTokens
from everytoken.reduction.beyond import absent, answers_behind, beyond_efficiency, kept_rows, loss_spread
from everytoken.reduction.seam import reduce_tokens
from everytoken.training.datasets.scenes import IDS, SceneMaker
from everytoken.training.vision import held_out, new_vlm, right_answers, vlm_config


def untrained():
    torch.manual_seed(0)
    return new_vlm(vlm_config(hidden=16)).eval()


def test_all_metrics_with_and_without_a_reducer():
    model = untrained()
    full = beyond_efficiency(model, 4)
    with reduce_tokens(model, RandomTokens(0.25), generator=torch.Generator().manual_seed(0)) as run:
        fewer = beyond_efficiency(model, 4)
    assert run.last.tokens_after == 4 * 16
    assert full.values.keys() == fewer.values.keys() and all(len(found) == 4 for found in full.values.values())
    assert all(0 <= share <= 1 for share in full.means().values())
    with pytest.raises(BadInputError, match="one question"):
        beyond_efficiency(model, 0)


def test_a_model_that_always_says_yes_is_caught():
    model = untrained()

    def yes(_module, _args, output):
        output.logits[..., IDS["yes"]] = 1e9

    model.register_forward_hook(yes)
    found = beyond_efficiency(model, 3).means()
    assert {share for name, share in found.items() if name.startswith("false yes")} == {1.0}


def test_what_is_absent_is_absent():
    scenes, _ = held_out(6)
    for place, scene in enumerate(scenes):
        question = absent(scene, 3, place)
        assert question.answer == "no" and question.about not in {thing.colour for thing in scene.things}
    (full,) = SceneMaker(least=6, most=6).draw(1, 0)
    with pytest.raises(BadInputError, match="every colour"):
        absent(full, 0, 0)


def test_behind_no_other_question_it_is_the_plain_answer():
    model = untrained()
    scenes, asked = held_out(5)
    assert answers_behind(model, scenes, asked, 0) == right_answers(model, scenes, asked)
    assert len(answers_behind(model, scenes, asked, 3, batch=2)) == 5


def test_rows_of_what_is_kept():
    features = torch.randn(12, 2)
    one, other = selection(features, torch.tensor([0, 1, 11])), selection(features, torch.tensor([8]))
    assert kept_rows([one, other], (3, 4)) == [0.5, 0.0, 0.5]
    with pytest.raises(BadInputError, match="2 x 4"):
        kept_rows([one], (2, 4))


def test_spread_of_a_loss():
    assert loss_spread([(step, 5.0 - step) for step in range(10)]) == 0
    assert loss_spread([(step, float(step % 2)) for step in range(10)]) > 1
    with pytest.raises(BadInputError, match="no spread"):
        loss_spread([(0, 1.0)] * 5)
