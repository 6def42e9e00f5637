"""ASSD: the joint distribution by enumeration, calls, padding, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import XLNetConfig, XLNetLMHeadModel

from everytoken.architectures.any_order.configuration_any_order import AnyOrderConfig
from everytoken.architectures.any_order.modeling_any_order import AnyOrderLM
from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.decoding.canvas.denoising import DenoisingSampler
from everytoken.generation.assd import AnySubsetSequential, AnySubsetSpeculative, forwards_by_row, subset_logps

VOCAB, MASK = 5, 4
IDS = torch.tensor([[1, 0, 2, 0, 0, 3]])
OPEN = torch.tensor([[0, 1, 0, 1, 1, 0]]).bool()


def any_order(streams=2):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.7}
    return AnyOrderLM(AnyOrderConfig(vocab_size=VOCAB, streams=streams, **shape)).eval()


def xlnet():
    torch.manual_seed(1)
    config = XLNetConfig(vocab_size=VOCAB, d_model=16, n_layer=1, n_head=2, d_inner=16, initializer_range=0.7)
    return XLNetLMHeadModel(config).eval()


def joint(model, ids=IDS, open_=OPEN):
    """Every completion with its log-probability, by one pass each."""
    count = int(open_.sum())
    found = torch.tensor(list(itertools.product(range(MASK), repeat=count)))
    whole = ids.repeat(len(found), 1)
    whole[open_.expand(len(found), -1)] = found.flatten()
    return whole, subset_logps(model, whole, ~open_.expand(len(found), -1), MASK).sum(1)


@pytest.mark.parametrize("make", [any_order, xlnet])
def test_all_completions_sum_to_one(make):
    assert float(joint(make())[1].double().exp().sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("make", [any_order, xlnet])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"k": 2}, marks=pytest.mark.slow),
        {"k": 3},
        pytest.param({"k": 8}, marks=pytest.mark.slow),
        pytest.param({"k": 2, "bonus": True}, marks=pytest.mark.slow),
    ],
)
def test_texts_have_the_models_own_joint_distribution(make, settings):
    model, repeats = make(), 1200
    logps = joint(model)[1]
    sampler = AnySubsetSpeculative(mask_id=MASK, check=False, **settings)
    found = sampler(model, IDS.repeat(repeats, 1), editable=OPEN.repeat(repeats, 1), seeds=range(repeats))
    code = (found.final_ids[:, OPEN[0]] * MASK ** torch.arange(2, -1, -1)).sum(1)
    counts, expected = torch.bincount(code, minlength=MASK**3), logps.double().exp() * repeats
    large = expected >= 5
    chi = ((counts - expected) ** 2 / expected)[large].sum()
    chi += (counts[~large].sum() - expected[~large].sum()) ** 2 / expected[~large].sum().clamp(min=1e-9)
    freedom = int(large.sum())
    assert float(chi) < freedom + 4 * (2 * freedom) ** 0.5
    assert torch.equal(found.counts.sum(1), torch.full((repeats,), 3)) and not bool((found.final_ids == MASK).any())
    scored = subset_logps(model, found.final_ids, ~OPEN.expand(repeats, -1), MASK).exp()
    torch.testing.assert_close(found.choice_prob[:, OPEN[0]], scored[:, OPEN[0]], rtol=1e-3, atol=1e-5)


def test_calls_never_exceed_the_tokens():
    model, many = any_order(), torch.cat([torch.tensor([[1]]), torch.zeros(1, 9).long()], 1)
    open_ = torch.tensor([[False] + [True] * 9])
    for k in (2, 3, 20):
        for seed in range(2):
            sampler = AnySubsetSpeculative(k=k, check=False)
            sampler(model, many, editable=open_, seeds=[seed])
            assert sampler.stats.target_forwards <= 9
            if k == 2:
                assert sampler.stats.target_forwards == 9
    with torch.no_grad():  # nothing attends: positions are independent, so no draft is refused
        for layer in model.layers:
            layer.attention.o_proj.weight.zero_()
    sampler = AnySubsetSpeculative(k=9, check=False)
    sampler(model, many, editable=open_, seeds=[0])
    assert sampler.stats.target_forwards == 2


@pytest.mark.parametrize("name", AnySubsetSpeculative.examples())
def test_rows_padding_and_replay(name):
    sampler, model = AnySubsetSpeculative.examples()[name], any_order()
    ids = torch.tensor([[1, 0, 2, 0, 0, 0, 3], [0, 3, 1, 0, 0, 0, 0]])
    open_ = torch.tensor([[0, 1, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1]]).bool()
    found = sampler(model, ids, editable=open_, seeds=[3, 4])
    assert torch.equal(found.final_ids[~open_], ids[~open_]) and torch.equal(list(found.states())[-1], found.final_ids)
    pad = torch.nn.functional.pad
    padded = sampler(
        model,
        pad(ids, (2, 0)),
        editable=pad(open_, (2, 0)),
        attention_mask=pad(torch.ones_like(ids), (2, 0)),
        seeds=[3, 4],
    )
    for row in range(2):
        alone = sampler(model, ids[row : row + 1], editable=open_[row : row + 1], seeds=[3 + row])
        assert torch.equal(alone.final_ids[0], found.final_ids[row])
    assert torch.equal(padded.final_ids[:, 2:], found.final_ids)


def test_greedy_is_one_by_one():
    model = any_order()
    found = AnySubsetSpeculative(temperature=0.0, k=3)(model, IDS, editable=OPEN, seeds=[0])
    canvas, known = IDS.masked_fill(OPEN, MASK), ~OPEN
    for place in OPEN[0].nonzero()[:, 0].tolist():
        best = []
        for token in range(MASK):
            canvas[0, place] = token
            best.append(float(subset_logps(model, canvas, known, MASK)[0, place]))
        canvas[0, place] = int(torch.tensor(best).argmax())
    assert torch.equal(found.final_ids, canvas)


def test_what_is_refused():
    for settings in ({"k": 1}, {"temperature": -1.0}):
        with pytest.raises(BadInputError):
            AnySubsetSpeculative(**settings)
    with pytest.raises(BadInputError, match="first token"):
        AnySubsetSpeculative()(any_order(), IDS, editable=torch.ones_like(OPEN))
    with pytest.raises(UnsupportedModelError, match="one stream"):
        AnySubsetSpeculative()(any_order(streams=1), IDS, editable=OPEN)
    with pytest.raises(BadInputError, match="not know how long"):
        AnySubsetSpeculative()(any_order(), IDS)
    assert DenoisingSampler().writes_masks and not AnySubsetSpeculative().writes_masks


def test_one_by_one_costs_a_forward_a_token_and_rows_are_counted_alone():
    model, sampler = any_order(), AnySubsetSequential()
    sampler(model, IDS, editable=OPEN, seeds=[0])
    assert sampler.stats.target_forwards == 3
    both, open_ = IDS.repeat(2, 1), torch.cat([OPEN, torch.tensor([[0, 1, 0, 0, 0, 0]]).bool()])
    for k in (2, 3):
        made = AnySubsetSpeculative(k=k)
        together = forwards_by_row(made(model, both, editable=open_, seeds=[5, 6]), k)
        for row in range(2):
            made(model, IDS, editable=open_[row : row + 1], seeds=[5 + row])
            assert made.stats.target_forwards == together[row]
    name, plain = AnySubsetSpeculative(temperature=0.5).baseline()
    assert name == "one by one" and plain.temperature == 0.5 and isinstance(plain, AnySubsetSequential)
