"""Bounds of a tree from what a forward costs."""

from __future__ import annotations

import pytest
import torch

from everytoken.core.calibration import Curve
from everytoken.generation.dyspec import DySpec
from everytoken.generation.tree_shapes import TreeShape
from everytoken.testing.models import tiny_llama

ASKED = TreeShape(16, 0.08, 12)


def test_no_tree_costs_more_than_two_plain_steps():
    assert ASKED.within(lambda n: 1 + 0.01 * (n - 1)) == ASKED  # cheap nodes: as asked for
    assert ASKED.within(lambda n: 1 + 0.2 * (n - 1)).budget == 5
    assert ASKED.within(lambda n: float(n)).budget == 1
    assert ASKED.within(lambda n: 1 + 1.5 * (n - 1)).budget == 0  # plain steps are cheaper than any node


def test_no_node_is_kept_whose_chance_cannot_repay_the_cheapest_one():
    shape = ASKED.within(lambda n: 1 + 0.2 * (n - 1))
    assert shape.threshold == pytest.approx(0.2) and 0.8**shape.depth < 0.2 <= 0.8 ** (shape.depth - 2)
    step = ASKED.within(Curve((1, 2, 4, 8, 16), (1.0, 1.6, 1.7, 1.7, 1.9)))  # a kernel for several tokens at once
    assert step.budget == 16 and step.threshold == ASKED.threshold
    full = TreeShape(16, None, 12).within(lambda n: 1 + 0.2 * (n - 1))
    assert (full.budget, full.threshold, full.depth) == (5, None, 12)


def decode(target, **settings):
    decoder = DySpec(tiny_llama(11, seed=9), **settings)
    prompt = torch.tensor([[3, 5, 8, 2]])
    text = target.generate(prompt, max_new_tokens=24, do_sample=False, custom_generate=decoder).tolist()
    assert text == target.generate(prompt, max_new_tokens=24, do_sample=False).tolist()
    return decoder.stats


def test_dyspec_takes_the_curve_of_the_model_and_its_own_cost_before_that():
    target = tiny_llama(11, seed=1)
    assert decode(target).proposed > 0
    target.forward_cost = Curve((1, 8), (1.0, 80.0))
    assert decode(target).proposed == 0
    assert decode(target, cost=lambda n: 1 + 0.01 * n).proposed > 0
    assert decode(target, budget=4, threshold=None).proposed > 0  # the paper's tree is always full


def test_a_drawn_tree_does_not_depend_on_what_was_measured():
    """Else the same seed would give another sample on another machine."""
    target, texts = tiny_llama(11, seed=1), []
    for curve in (None, Curve((1, 8), (1.0, 80.0))):
        target.forward_cost = curve
        torch.manual_seed(3)
        decoder = DySpec(tiny_llama(11, seed=9), drawn=True)
        torch.manual_seed(3)
        prompt = torch.tensor([[3, 5, 8, 2]])
        texts.append(target.generate(prompt, max_new_tokens=24, do_sample=True, custom_generate=decoder).tolist())
    assert texts[0] == texts[1]
