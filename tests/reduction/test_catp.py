"""CATP: its numbers by the sheet, greedy against exhaustive search, and the whole method against a masked model."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.reduction.arithmetic import cosines, whole_part
from everytoken.reduction.base import ReductionContext
from everytoken.reduction.catp import CATP, facility_location
from everytoken.reduction.inside import DecoderView
from everytoken.reduction.seam import reduce_tokens

from .models import IMAGE, batch, images, tiny
from .test_decoder_cut import eager_row, hidden_behind
from .test_divprune import VECTORS
from .test_seam import TOLERANCE, decoder_logits, embeddings

TEXT = torch.tensor([[0.0, 1, 0], [0, 1, 1]])


def value(similarity, chosen, bonus):
    return float(similarity[list(chosen)].max(0).values.sum() + bonus[list(chosen)].sum())


def problem(size, seed, weight=0.7):
    points = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    text = torch.randn(1, 4, generator=torch.Generator().manual_seed(seed + 99), dtype=torch.float64)
    return (1 + cosines(points, points)) / 2, weight * (1 + cosines(points, text)[:, 0]) / 2


@pytest.mark.parametrize(
    ("weight", "expected", "total"),
    [(0.0, [6, 4, 0, 2, 5], 6.985035), (0.7, [6, 3, 4, 1, 5], 9.536789), (100.0, [3, 2, 6, 5, 1], None)],
)
def test_the_worked_example(weight, expected, total):
    points = torch.tensor(VECTORS)
    similarity = (1 + cosines(points, points)) / 2
    bonus = weight * (1 + cosines(points, TEXT.mean(0, keepdim=True))[:, 0]) / 2
    assert facility_location(similarity, 5, bonus).tolist() == expected
    if total is not None:
        assert value(similarity, expected, bonus) == pytest.approx(total, abs=1e-5)
    kept = CATP(remove=0.5, align_weight=weight).reduce(points, ReductionContext(text=TEXT)).kept
    assert kept.tolist() == sorted(expected)


@pytest.mark.parametrize("seed", range(6))
def test_lazy_greedy_is_plain_greedy_and_near_the_optimum(seed):
    similarity, bonus = problem(9, seed)
    chosen: list[int] = []
    for _ in range(4):
        rest = [index for index in range(9) if index not in chosen]
        chosen.append(max(rest, key=lambda index: value(similarity, [*chosen, index], bonus)))
    assert facility_location(similarity, 4, bonus).tolist() == chosen
    assert facility_location(similarity, 4, bonus, small=0).tolist() == chosen
    best = max(value(similarity, subset, bonus) for subset in itertools.combinations(range(9), 4))
    assert value(similarity, chosen, bonus) >= (1 - 1 / math.e) * best
    larger, more = problem(80, seed)
    plain: list[int] = []
    covered = torch.zeros(80, dtype=torch.float64)
    for _ in range(40):
        gains = (larger - covered).clamp(min=0).sum(-1) + more
        gains[plain] = -torch.inf
        plain.append(int(gains.argmax()))
        covered = torch.maximum(covered, larger[plain[-1]])
    assert facility_location(larger, 40, more).tolist() == plain
    assert facility_location(larger, 40, more, small=0).tolist() == plain


def test_the_objective_is_monotone_and_submodular():
    similarity, bonus = problem(9, 3)
    for small in itertools.combinations(range(6), 2):
        large = sorted({*small, 6, 7})
        gains = [value(similarity, [*chosen, 8], bonus) - value(similarity, chosen, bonus) for chosen in (small, large)]
        assert gains[0] >= gains[1] - 1e-12
        assert gains[1] >= 0


def test_weights_at_both_ends_and_scales():
    points = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    text = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    context = ReductionContext(text=text)
    agreement = cosines(points, text.mean(0, keepdim=True))[:, 0]
    kept = CATP(remove=0.5, align_weight=1e6).reduce(points, context).kept
    assert kept.tolist() == agreement.topk(9).indices.sort().values.tolist()
    plain = CATP(remove=0.5, align_weight=0).reduce(points, context).kept
    assert torch.equal(plain, CATP(remove=0.5).reduce(points, ReductionContext()).kept)
    scales = torch.rand(12, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.1
    scaled = CATP(remove=0.5).reduce(points * scales, ReductionContext(text=text * 3)).kept
    assert torch.equal(scaled, CATP(remove=0.5).reduce(points, context).kept)


def test_a_second_copy_covers_nothing_more():
    points = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    assert facility_location((1 + cosines(points, points)) / 2, 3).tolist() == [0, 2, 1]


def test_budgets_of_shares_that_are_no_exact_floats():
    assert whole_part(576, 1 - 7 / 18) == 352
    assert len(CATP(remove=7 / 9).reduce(torch.randn(18, 4), ReductionContext()).kept) == 11
    assert len(CATP(remove=0.999).reduce(torch.randn(1, 4), ReductionContext()).kept) == 1
    features = torch.randn(5, 3)
    assert CATP(remove=0.0).reduce(features, ReductionContext()).features is features


def view(growth, normalize=False):
    """Three demonstrations of two tokens and a text token each, and a query."""
    units = torch.tensor([-1, 0, 0, -1, 1, 1, -1, 2, 2, -1])
    segments = torch.tensor([-1, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    hidden = torch.randn(10, 4, generator=torch.Generator().manual_seed(4))
    before = torch.full((10,), 0.1)
    return DecoderView(hidden, units, segments, {0: before, 1: before + growth}, {0: 4, 1: 4, 2: 4})


def test_growth_and_relevance_rank_all_demonstrations_together():
    growth = torch.zeros(10)
    growth[4] = 5.0
    given = view(growth)
    keep = CATP(remove=0.75, layer=1)._demonstrations(given)
    relevance = cosines(given.hidden, given.hidden[7:].mean(0, keepdim=True))[:, 0]
    expected = {4, max((1, 2, 5), key=lambda index: float(relevance[index]))}
    assert set(keep[:7].nonzero()[:, 0].tolist()) - {0, 3, 6} == expected
    assert bool(keep[[0, 3, 6, 7, 8, 9]].all())
    none = view(-growth)  # what falls does not count
    kept = CATP(remove=0.75, layer=1, normalize="minmax")._demonstrations(none)
    best = relevance[[1, 2, 4, 5]].topk(2).indices
    assert kept[[1, 2, 4, 5]].nonzero()[:, 0].tolist() == best.sort().values.tolist()


def test_the_query_is_compared_with_what_is_left_of_the_demonstrations():
    given = view(torch.zeros(10))
    for context, others in (("all", slice(1, 7)), ("images", [1, 2, 4, 5])):
        keep = CATP(remove=0.75, layer=1, context=context)._query(given)
        scores = cosines(given.hidden[7:9], given.hidden[others].mean(0, keepdim=True))[:, 0]
        assert keep[7:9].tolist() == [bool(scores[0] > scores[1]), bool(scores[1] > scores[0])]
    alone = DecoderView(given.hidden[6:], given.units[6:], torch.tensor([-1, 0, 0, 0]), {}, {2: 4})
    scores = cosines(alone.hidden[1:3], alone.hidden[3:])[:, 0]
    assert CATP(remove=0.75)._query(alone)[1:3].tolist() == [bool(scores[0] > scores[1]), bool(scores[1] > scores[0])]
    assert bool(CATP(remove=0.75)._demonstrations(alone).all())


def few_shot():
    """Two prompts of different length with two demonstrations and a query, and one with a question only."""
    model = tiny("llava")
    prompts = [[3, (IMAGE, 16), 2, (IMAGE, 16), 3, (IMAGE, 16), 4], [2, (IMAGE, 16), 5]]
    return model, batch(model, prompts) | {"pixel_values": images((4, 3, 32, 32))}


@torch.no_grad()
@pytest.mark.parametrize("remove", [7 / 9, pytest.param(0.5, marks=pytest.mark.slow)])
def test_the_whole_method_equals_a_masked_full_model(remove):
    model, inputs = few_shot()
    method, steps = CATP(remove=remove, layer=1), 3
    with reduce_tokens(model, method) as run:
        output = model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    index = run.last.index
    there, units = index >= 0, run.last.units
    first = math.floor(16 * (1 - remove / 2) + 1e-9)
    assert [len(item.features) for item in run.last.reductions] == [first] * 4
    # the first step's text: what follows the image
    words = model.get_input_embeddings()(inputs["input_ids"])
    features = model.model.get_image_features(
        inputs["pixel_values"], vision_feature_layer=-2, vision_feature_select_strategy="default", return_dict=True
    ).pooler_output
    for number, (row, begin, end) in enumerate([(0, 19, 21), (0, 37, 40), (0, 56, 60), (1, 55, 60)]):
        expected = method.reduce(features[number], ReductionContext(text=words[row, begin:end])).kept
        assert torch.equal(run.last.reductions[number].kept, expected)
    embeds = embeddings(model, inputs).gather(1, index.clamp(min=0)[..., None].expand(-1, -1, 32))
    positions = (there.long().cumsum(-1) - 1).clamp(min=0)
    # behind layer 1: the demonstrations' tokens
    rows = {layer: eager_row(model, embeds, positions, there, layer) for layer in (0, 1)}
    hide = {2: torch.zeros_like(there), 3: torch.zeros_like(there)}

    def output_of(layer):
        length = embeds.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril() & there[:, None, None]
        kept = []
        handle = model.get_decoder().layers[layer].register_forward_hook(lambda *args: kept.append(args[2]))
        with hidden_behind(model, hide):
            model.get_decoder()(
                inputs_embeds=embeds, position_ids=positions, attention_mask=mask | torch.eye(length, dtype=torch.bool)
            )
        handle.remove()
        return kept[0]

    hidden = output_of(1)
    query = {0: units[0] >= 2, 1: units[1] >= 3}
    query[0][query[0].nonzero()[0, 0] :] = True
    query[1][query[1].nonzero()[0, 0] :] = True
    candidates = ((units[0] >= 0) & ~query[0]).nonzero()[:, 0]
    growth = (rows[1] - rows[0]).clamp(min=0)[0, candidates]
    score = growth + 0.6 * cosines(hidden[0, candidates], hidden[0, query[0]].mean(0, keepdim=True))[:, 0]
    budget = math.floor(32 * (1 - remove) + 1e-9)
    dropped = candidates[score.argsort(descending=True)[budget:]]
    hide[2][0, dropped] = hide[3][0, dropped] = True
    # behind layer 2: the queries' tokens
    hidden = output_of(2)
    own = math.floor(16 * (1 - remove) + 1e-9)
    for row in range(2):
        candidates = ((units[row] >= 0) & query[row]).nonzero()[:, 0]
        others = there[row] & ~query[row] & (run.last.segments[row] >= 0) & ~hide[2][row]
        if row == 1:
            others = query[row] & (units[row] < 0)
        score = cosines(hidden[row, candidates], hidden[row, others].mean(0, keepdim=True))[:, 0]
        hide[3][row, candidates[score.argsort(descending=True)[own:]]] = True
    text = int((there & (units < 0)).sum())
    assert sum(run.lengths[3]) == text + budget + 2 * own
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    visible = there
    for step in range(steps):
        with hidden_behind(model, hide):
            expected = decoder_logits(model, embeds, positions, visible)[:, -1]
        torch.testing.assert_close(output.logits[step], expected, **TOLERANCE)
        embeds = torch.cat([embeds, model.get_input_embeddings()(new[:, step : step + 1])], 1)
        positions = torch.cat([positions, positions[..., -1:] + 1], -1)
        visible = torch.cat([visible, torch.ones(len(visible), 1, dtype=torch.bool)], 1)


@torch.no_grad()
def test_removing_nothing_is_the_whole_model_bit_by_bit():
    model, inputs = few_shot()
    plain = model.generate(
        **inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    with reduce_tokens(model, CATP(remove=0.0, layer=1)):
        same = model.generate(
            **inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    for ours, theirs in zip(same.logits, plain.logits, strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_segments_may_be_given():
    """Text before its image: the question belongs to the image that follows."""
    model = tiny("llava")
    inputs = batch(model, [[4, (IMAGE, 16), 1]]) | {"pixel_values": images((1, 3, 32, 32))}
    ids = inputs["input_ids"]
    with reduce_tokens(model, CATP(remove=0.5, layer=1)) as run:
        model.generate(**inputs, max_new_tokens=1, segments=torch.zeros_like(ids))
    words = model.get_input_embeddings()(ids[0][ids[0] != IMAGE])
    features = model.model.get_image_features(
        inputs["pixel_values"], vision_feature_layer=-2, vision_feature_select_strategy="default", return_dict=True
    ).pooler_output[0]
    expected = CATP(remove=0.5).reduce(features, ReductionContext(text=words)).kept
    assert torch.equal(run.last.reductions[0].kept, expected)


@pytest.mark.parametrize(
    "settings",
    [{"remove": 1.0}, {"remove": -0.1}, {"layer": 0}, {"align_weight": -1}, {"normalize": "z"}, {"context": "text"}],
)
def test_bad_settings(settings):
    with pytest.raises(BadInputError):
        CATP(**settings)
