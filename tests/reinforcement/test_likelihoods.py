"""Likelihoods in any order: against all subsets and all orders, the tables of biases, seeds, padding."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from everytoken.core.errors import BadInputError, UnknownNameError
from everytoken.decoding.canvas.denoising import DenoisingSampler
from everytoken.decoding.canvas.model import CanvasModel
from everytoken.reinforcement.likelihoods import (
    elbo,
    elbo_masks,
    exact_elbo,
    masked_logps,
    one_step,
    quadrature,
    trajectory_logps,
)
from everytoken.testing.canvas import MASK, TinyDenoiser


class Pairs(nn.Module):
    """Logits of each position: a table plus a term for every other token that is shown; 3 is the mask."""

    def __init__(self, length=4):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(length, 3, generator=generator).double())
        self.pairs = nn.Parameter(torch.randn(length, length, 4, 3, generator=generator).double())
        self.config = PreTrainedConfig(vocab_size=4, mask_token_id=3)

    def forward(self, input_ids, attention_mask=None):
        length = input_ids.shape[1]
        shown = (input_ids != 3)[:, None, :] & ~torch.eye(length, dtype=torch.bool)
        others = torch.arange(length)
        terms = self.pairs[others[:, None], others, input_ids[:, None, :]]  # [B, L, L, 3]
        logits = self.table + (terms * shown[..., None]).sum(2)
        return type("Output", (), {"logits": logits})()


IDS = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1]])
EVERY = torch.ones_like(IDS, dtype=torch.bool)


def any_order(model, ids, order):
    """The log-likelihood of one row, token by token."""
    canvas, total = torch.full((1, len(ids)), 3), 0.0
    for place in order:
        total = total + model(canvas.clone()).logits[0, place].log_softmax(-1)[ids[place]]
        canvas[0, place] = ids[place]
    return total


def test_the_exact_bound_is_the_mean_over_all_orders_in_value_and_gradient():
    model = Pairs()
    exact = exact_elbo(model, IDS, EVERY)
    orders = list(itertools.permutations(range(4)))
    for row in range(2):
        mean = sum(any_order(model, IDS[row], order) for order in orders) / 24
        torch.testing.assert_close(exact[row], mean.float(), rtol=1e-5, atol=1e-5)
    exact[0].backward()
    ours = model.table.grad.clone()
    model.zero_grad()
    (sum(any_order(model, IDS[0], order) for order in orders) / 24).backward()
    torch.testing.assert_close(ours, model.table.grad, rtol=1e-5, atol=1e-6)


def test_gauss_of_half_the_length_is_exact_once_masks_are_averaged():
    """g(t) = E f(S) / t is a polynomial of degree L - 1: N points suffice for L <= 2 N."""
    model = Pairs()
    sets = [torch.tensor(bits).bool() for bits in itertools.product((0, 1), repeat=4) if any(bits)]
    masked = torch.stack(sets)[:, None].expand(-1, 2, -1)
    with torch.no_grad():
        f = masked_logps(model, IDS, masked).sum(-1)
        exact = exact_elbo(model, IDS, EVERY)
    errors = []
    for rule in ("gauss-1", "gauss-2", "gauss-3"):
        total = torch.zeros(2)
        for t, w in zip(*quadrature(rule), strict=True):
            chance = torch.tensor([t ** int(s.sum()) * (1 - t) ** int(4 - s.sum()) for s in sets])
            total += w / t * (chance[:, None] * f).sum(0)
        errors.append(float((total - exact).abs().max()))
    assert errors[0] > 1e-3 and errors[1] < 1e-5 and errors[2] < 1e-5


@pytest.mark.parametrize(
    ("length", "two", "three"),
    [(4, 1.067, 1.295), (8, 0.771, 1.027), (16, 0.919, 0.872), (32, 0.939, 0.949), (64, 0.976, 0.988),
     (128, 0.994, 0.990), (256, 0.997, 0.992)],
)  # fmt: skip
def test_a_fixed_count_with_one_over_t_is_biased_by_the_table(length, two, three):
    """For a model that ignores its input the estimate over the truth is sum w k / (t L)."""
    scored = torch.ones(1, length, dtype=torch.bool)
    for rule, expected in (("gauss-2", two), ("gauss-3", three)):
        sets, weights = elbo_masks(scored, [0], rule, weight="1/t")
        assert float((sets.sum(-1) * weights).sum()) / length == pytest.approx(expected, abs=1e-3)
        sets, weights = elbo_masks(scored, [0], rule)
        assert float((sets.sum(-1) * weights).sum()) / length == pytest.approx(1, abs=1e-6)


def test_nodes():
    assert quadrature("gauss-2")[0] == pytest.approx([0.2113, 0.7887], abs=1e-4)
    nodes, weights = quadrature("gauss-3")
    assert nodes == pytest.approx([0.1127, 0.5, 0.8873], abs=1e-4)
    assert weights == pytest.approx([0.2778, 0.4444, 0.2778], abs=1e-4)
    assert quadrature("simpson") == ([0.1, 0.5, 1.0], [1 / 6, 4 / 6, 1 / 6])
    with pytest.raises(UnknownNameError, match="gauss"):
        quadrature("gaus-2")


def test_means_and_variances_of_the_estimators():
    """All but the biased one are right on average; a fixed count is quieter, and a drawn level the noisiest."""
    model, repeats = Pairs(), 1800
    with torch.no_grad():
        exact = float(exact_elbo(model, IDS[:1], EVERY[:1])[0])
        rows, every = IDS[:1].repeat(repeats, 1), EVERY[:1].repeat(repeats, 1)
        found = {
            name: elbo(model, rows, every, seeds=range(repeats), **settings)
            for name, settings in {
                "double": {"rule": "mc", "masks": 2, "count": "bernoulli", "weight": "1/t", "floor": 0.02},
                "semi": {"rule": "gauss-2", "count": "bernoulli", "weight": "1/t"},
                "count": {"rule": "mc", "masks": 2},
            }.items()
        }
    variances = {name: float(item.sequence.var()) for name, item in found.items()}
    for name, item in found.items():
        assert item.forwards == 2
        assert float(item.sequence.mean()) == pytest.approx(exact, abs=4 * (variances[name] / repeats) ** 0.5 + 0.06)
    assert variances["count"] < 0.6 * variances["semi"] < 0.5 * variances["double"]


def test_seeds_decide_and_micro_batches_and_padding_change_nothing():
    model, ids = TinyDenoiser(), torch.randint(MASK, (3, 9), generator=torch.Generator().manual_seed(1))
    scored = torch.arange(9).expand(3, -1) >= 3
    for settings in ({}, {"count": "bernoulli", "weight": "1/t"}, {"rule": "mc", "masks": 2}):
        whole = elbo(model, ids, scored, seeds=[5, 6, 7], **settings).per_position
        assert torch.equal(whole, elbo(model, ids, scored, seeds=[5, 6, 7], **settings).per_position)
        chunks = elbo(model, ids, scored, seeds=[5, 6, 7], chunk=2, **settings).per_position
        torch.testing.assert_close(whole, chunks, rtol=1e-5, atol=1e-5)
        for row in range(3):
            part = slice(row, row + 1)
            alone = elbo(model, ids[part], scored[part], seeds=[5 + row], **settings).per_position
            torch.testing.assert_close(whole[part], alone, rtol=1e-4, atol=1e-5)
        pad = torch.nn.functional.pad
        padded = elbo(
            model, pad(ids, (2, 0)), pad(scored, (2, 0)), pad(torch.ones_like(ids), (2, 0)), seeds=[5, 6, 7], **settings
        ).per_position
        torch.testing.assert_close(padded[:, 2:], whole, rtol=1e-4, atol=1e-5)
        assert not bool(whole[~scored].any())


def test_one_step_masks_all_and_its_gradient_is_plain():
    model = Pairs()
    found = one_step(model, IDS, EVERY)
    wanted = model(torch.full_like(IDS, 3)).logits.float().log_softmax(-1).gather(-1, IDS[..., None])[..., 0]
    torch.testing.assert_close(found.per_position, wanted)
    assert found.forwards == 1
    last = torch.tensor([[0, 0, 1, 1]] * 2).bool()
    some = one_step(model, IDS, last, seeds=[1, 2], prompt_mask_prob=0.999999)
    torch.testing.assert_close(some.per_position, wanted * last)
    shown = one_step(model, IDS, last)
    assert not torch.allclose(shown.per_position, some.per_position)
    node = elbo(model, IDS, EVERY, seeds=[0, 1], rule="simpson").forwards
    assert node == 3


@pytest.mark.parametrize("settings", [{"steps": 4}, {"steps": 12}, {"steps": 1}, {"steps": 4, "temperature": 1.0}])
def test_a_trajectory_has_the_recorded_likelihood(settings):
    model, ids = TinyDenoiser(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    found = DenoisingSampler(gen_length=12, **settings)(model, ids, seeds=[0, 1])
    again = trajectory_logps(model, found)
    torch.testing.assert_close(again.per_position[found.editable], found.choice_prob[found.editable].log())
    assert again.forwards == settings["steps"]
    part = trajectory_logps(model, found, steps=[0])
    assert torch.equal(part.per_position != 0, found.fix_step == 0) and part.forwards == 1
    if settings["steps"] == 1:
        torch.testing.assert_close(again.per_position, one_step(model, found.final_ids, found.editable).per_position)
    if settings["steps"] == 12:  # one token a step is an any-order likelihood
        canvas = found.final_ids[:1].masked_fill(found.editable[:1], MASK)
        total = 0.0
        for place in found.fix_step[0].argsort()[3:]:
            logp = CanvasModel(model, MASK).logits(canvas)[0, place].log_softmax(-1)
            total += logp[found.final_ids[0, place]]
            canvas[0, place] = found.final_ids[0, place]
        torch.testing.assert_close(again.sequence[0], total, rtol=1e-4, atol=1e-4)


def test_what_is_refused():
    model = Pairs()
    for arguments, message in (
        ({"scored": EVERY[:, :2]}, "scored must be"),
        ({"scored": torch.zeros_like(EVERY)}, "no response"),
        ({"attention_mask": torch.zeros_like(IDS)}, "padding"),
        ({"seeds": [1]}, "one a row"),
        ({"count": "some"}, "fixed or bernoulli"),
        ({"count": "bernoulli"}, "weight='1/t'"),
        ({"masks": 0}, "at least 1"),
    ):
        with pytest.raises(BadInputError, match=message):
            elbo(model, IDS, **{"scored": EVERY, "seeds": [1, 2]} | arguments)
    with pytest.raises(BadInputError, match="seeds"):
        one_step(model, IDS, EVERY, prompt_mask_prob=0.1)
    with pytest.raises(BadInputError, match="14 tokens"):
        exact_elbo(model, torch.zeros(1, 20).long(), torch.ones(1, 20).bool())
