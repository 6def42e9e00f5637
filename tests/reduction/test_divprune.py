"""DivPrune against the sheet's numbers, the published loop, exhaustive search and its invariances."""

from __future__ import annotations

import itertools

import pytest
import torch

from everytoken.core.errors import BadInputError
from everytoken.reduction.base import ReductionContext
from everytoken.reduction.divprune import DivPrune, max_min_diverse

VECTORS = [[1, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0, 0.9, 0.2], [-1, 0, 0], [0, 0, 1], [0.5, 0.5, 0.5]]


def draw(total, width=8, seed=0):
    return torch.randn(total, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distances(points):
    unit = points / points.norm(dim=-1, keepdim=True)
    return 1 - unit @ unit.T


def picks(points, count, **settings):
    return max_min_diverse(points, count, **settings)[0].tolist()


def published_loop(points, count):
    """The published selection as the paper describes it: the minimum over everything chosen, anew at every step."""
    matrix = distances(points)
    chosen = [int(matrix.topk(2, 0, largest=False).values[1].argmax())]
    while len(chosen) < count:
        chosen.append(int(matrix[chosen].min(0).values.argmax()))
    return chosen


def test_the_worked_example():
    assert picks(torch.tensor(VECTORS), 5) == [4, 0, 2, 5, 6]


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_published_loop_and_the_lazy_form(seed):
    points = draw(60, seed=seed)
    expected = published_loop(points, 25)
    assert picks(points, 25) == expected
    assert picks(points, 25, whole=0) == expected


def test_the_greedy_bound_holds_for_chords_and_only_a_quarter_for_cosines():
    worst = 1.0
    for seed in range(12):
        points = draw(9, 3, seed)
        matrix = distances(points)

        def smallest(chosen, matrix=matrix):
            return min(float(matrix[i, j]) for i, j in itertools.combinations(chosen, 2))

        best = max(smallest(chosen) for chosen in itertools.combinations(range(9), 4))
        ratio = smallest(picks(points, 4)) / best
        assert ratio**0.5 >= 0.5  # chords are the roots of twice the cosine distance
        worst = min(worst, ratio)
    assert 0.25 <= worst < 1


def test_distances_along_the_picks_fall_and_a_shorter_run_is_a_prefix():
    points = draw(40)
    order, scores = max_min_diverse(points, 40)
    along = scores[order][1:]
    assert bool((along[1:] <= along[:-1] + 1e-12).all())
    assert picks(points, 11) == order[:11].tolist()
    assert picks(points, 2)[1] == int(distances(points)[order[0]].argmax())


def test_rotations_scales_and_permutations_change_nothing():
    points = draw(30)
    turn = torch.linalg.qr(draw(8, seed=5)).Q
    scales = torch.rand(30, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    expected = picks(points, 9)
    assert picks(points @ turn, 9) == expected
    assert picks(points * scales, 9) == expected
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    assert order[picks(points[order], 9)].tolist() == expected
    assert picks(points + 3.0, 9) != expected


def test_equal_tokens_are_never_chosen_twice_and_last():
    axes = torch.eye(4).repeat_interleave(torch.tensor([1, 1, 2, 1]), 0)  # places 2 and 3 are equal
    order = picks(axes, 5)
    assert order[0] not in (2, 3)
    assert set(order[:4]) in ({0, 1, 2, 4}, {0, 1, 3, 4})
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert picks(torch.ones(5, 3), 4) == [0, 1, 2, 3]


def test_a_zero_vector_has_distance_one_to_everything():
    points = torch.tensor([[1.0, 0], [1, 0.1], [0, 0], [-1, 0]])
    order, scores = max_min_diverse(points, 4)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert float(scores[order[0]]) == 1.0  # the zero vector and the opposite one are equally isolated
    assert order[0] == 2


@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_other_metrics(metric):
    points = torch.tensor([[0.0, 0], [10, 0], [0, 9], [1, 1]])
    assert picks(points, 3, metric=metric) == [1, 2, 0]
    assert picks(points, 3, metric=metric, whole=0) == [1, 2, 0]


def test_counts_and_order():
    features = draw(576).float()
    reduction = DivPrune().reduce(features, ReductionContext())
    assert len(reduction.kept) == 56  # the paper's number for 576 tokens
    assert bool((reduction.kept[1:] > reduction.kept[:-1]).all())
    assert torch.equal(reduction.features, features[reduction.kept])
    assert reduction.scores.shape == (576,)
    assert len(DivPrune(keep=0.001).reduce(features, ReductionContext()).kept) == 1
    assert DivPrune(keep=1.0).reduce(features, ReductionContext()).features is features
    assert len(DivPrune(num_tokens=7).reduce(features[:5], ReductionContext()).kept) == 5
    assert DivPrune().reduce(features[:1], ReductionContext()).kept.tolist() == [0]


def test_gradients_flow_through_what_is_kept():
    features = draw(10).requires_grad_()
    reduction = DivPrune(keep=0.3).reduce(features, ReductionContext())
    (gradient,) = torch.autograd.grad(reduction.features.sum(), features)
    assert gradient.sum(-1).nonzero()[:, 0].tolist() == reduction.kept.tolist()


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.5])
def test_bad_shares(keep):
    with pytest.raises(BadInputError, match="keep"):
        DivPrune(keep=keep)


def test_other_bad_input():
    with pytest.raises(BadInputError, match="num_tokens"):
        DivPrune(num_tokens=0)
    with pytest.raises(BadInputError, match="metric"):
        DivPrune(metric="l3")
    with pytest.raises(BadInputError, match="between 1 and 7"):
        max_min_diverse(torch.tensor(VECTORS), 8)
    bad = torch.tensor(VECTORS)
    bad[2, 1] = torch.nan
    with pytest.raises(BadInputError, match="NaN"):
        DivPrune().reduce(bad, ReductionContext())
    with pytest.raises(BadInputError, match=r"\[N, d\]"):
        DivPrune().reduce(torch.ones(3), ReductionContext())
